"""What keeping the first tokens exact does, and does not do, to the rest of the cache."""

from __future__ import annotations

import pytest
import torch

from kvpack.parts.policies.sink_recent import SinkRecent
from kvpack.runtime.install import new_cache
from tests.runtime.schemes import Scheme, per_channel, per_token, tiny


def held(sinks: int, keys: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Keys as the next token reads them, after all but the newest block were encoded."""
    scheme = Scheme(per_channel(2), per_token(2), SinkRecent(sink_tokens=sinks, recent_tokens=0))
    cache = new_cache(scheme.install(tiny(num_hidden_layers=1)))
    batch, _, tokens, _ = keys.shape
    cache.begin(batch, tokens, mask)
    cache.update(keys, keys, 0)
    longer = None if mask is None else torch.cat((mask, torch.ones(batch, 1, dtype=mask.dtype)), 1)
    cache.begin(batch, 1, longer)
    got, _ = cache.update(keys[:, :, :1], keys[:, :, :1], 0)
    return got[:, :, :tokens]


def random_keys(tokens: int = 24, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 2, tokens, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sinks", [1, 4, 9])
def test_the_size_of_protected_rows_changes_no_other_row(sinks: int) -> None:
    keys = random_keys()
    larger = keys.clone()
    larger[:, :, :sinks] *= 100
    before, after = held(sinks, keys), held(sinks, larger)
    assert torch.equal(before[:, :, sinks:], after[:, :, sinks:])
    assert torch.equal(after[:, :, :sinks], larger[:, :, :sinks])
    assert not torch.equal(held(0, keys)[:, :, sinks:], held(0, larger)[:, :, sinks:])


def test_as_many_sinks_as_tokens_leave_everything_exact() -> None:
    keys = random_keys()
    assert torch.equal(held(24, keys), keys)
    assert torch.equal(held(100, keys), keys)
    assert not torch.equal(held(20, keys), keys)


def test_padding_in_front_moves_protection_to_the_first_tokens() -> None:
    keys = random_keys(24, 2)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :5] = 0
    got = held(3, keys, mask)
    exact = (got == keys).all(-1).all(1)
    assert exact[0, :3].all()
    assert exact[1, 5:8].all()
    assert not exact[0, 3:].any()
    assert not exact[1, 8:].any()
