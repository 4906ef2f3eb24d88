"""Padding, and rows of a batch that move, multiply and go."""

import pytest
import torch
from transformers import DynamicCache

from kvpack.parts.policies.sink_detect import SinkDetect
from kvpack.parts.policies.sink_recent import SinkRecent
from kvpack.runtime.cache import KVPackCache
from kvpack.runtime.install import new_cache
from tests.runtime.rows import ROW_CHANGES, change_rows, generated, padded
from tests.runtime.schemes import (
    KIVI,
    ROTATE,
    Scheme,
    logits,
    per_channel,
    per_token,
    text,
    tiny,
)
from tests.tiny_models import FAMILIES

PER_TOKEN = Scheme(per_token(3), per_token(3), SinkRecent(sink_tokens=2, recent_tokens=6))
DETECT = Scheme(per_token(3), per_token(3), SinkDetect(top_values=3))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("scheme", "pad"),
    [(KIVI, 16), (PER_TOKEN, 5), (ROTATE, 7), (DETECT, 5)],
    ids=["kivi", "token", "rotate", "detect"],
)
def test_a_left_padded_row_equals_its_single_run(family: str, scheme: Scheme, pad: int) -> None:
    """Token blocks are counted in slots, so KIVI's padding is a multiple of its window here."""
    model = scheme.install(tiny(family))
    ids = text(30)
    expected, _ = generated(model, ids)
    ours, cache = generated(model, *padded(ids, pad))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert cache.encoded_tokens > 0


def test_padding_does_not_shape_the_groups_it_falls_into() -> None:
    model = Scheme(per_channel(4), per_token(4), SinkRecent(recent_tokens=0)).install(
        tiny(num_hidden_layers=1)
    )
    cache = new_cache(model)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, :5] = 0
    cache.begin(2, 16, mask)
    keys = torch.randn(2, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    keys[1, :, :5] = 1e4
    cache.update(keys, keys, 0)
    cache.begin(2, 1, torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1))
    got, _ = cache.update(keys[:, :, :1], keys[:, :, :1], 0)
    assert (got[1, :, 5:16] - keys[1, :, 5:]).abs().max() < 5 / 15
    assert got.isfinite().all()


def test_sinks_are_the_first_tokens_that_are_not_padding() -> None:
    model = PER_TOKEN.install(tiny())
    both, mask = padded(text(20), 5)
    cache = new_cache(model)
    logits(model, both[:, :6], cache, attention_mask=mask[:, :6])
    logits(model, both[:, 6:], cache, attention_mask=mask)
    overlay = cache.layers[1]._overlay
    found = sorted(zip(overlay.rows.tolist(), overlay.slots.tolist(), strict=True))
    assert found == [(0, 0), (0, 1), (1, 5), (1, 6)]
    assert cache.track.nbytes == 2 * 25 + 4 * 25, "validity per row, positions shared"


@pytest.mark.parametrize("change", ROW_CHANGES)
@pytest.mark.parametrize("scheme", [KIVI, ROTATE, PER_TOKEN], ids=["kivi", "rotate", "token"])
def test_rows_can_be_selected_repeated_and_reordered(scheme: Scheme, change: str) -> None:
    model = scheme.install(tiny())
    both, mask = padded(text(40), 16)
    ids = torch.cat((both, text(56, seed=3)))
    mask = torch.cat((mask, torch.ones(1, 56, dtype=torch.long)))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def ended(index: list[int], cache: KVPackCache) -> torch.Tensor:
        kwargs = {"attention_mask": mask[index], "position_ids": positions[index, 50:]}
        return logits(model, ids[index, 50:], cache, **kwargs)

    changed, plain = new_cache(model), new_cache(model)
    for cache in (changed, plain):
        logits(model, ids[:, :50], cache, attention_mask=mask[:, :50], position_ids=positions[:, :50])
    index = change_rows(changed, change)
    ours, expected = ended(index, changed), ended([0, 1, 2], plain)[index]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-4)


def test_two_turns_with_padding() -> None:
    model = PER_TOKEN.install(tiny())
    both, mask = padded(text(30), 9)
    single = text(30)
    more = text(12, seed=5)
    cache, alone = new_cache(model), new_cache(model)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits(model, both, cache, attention_mask=mask, position_ids=positions)
    logits(model, single, alone)
    mask = torch.cat((mask, torch.ones(2, 12, dtype=torch.long)), 1)
    positions = (mask.cumsum(-1) - 1)[:, -12:]
    ours = logits(model, more.expand(2, -1), cache, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(ours[1:], logits(model, more, alone), rtol=1e-3, atol=1e-3)


def test_the_dense_cache_has_the_same_tolerance() -> None:
    """The comparison above is fair: padding alone moves logits no more than its tolerance."""
    model = tiny()
    ids = text(30)
    both, mask = padded(ids, 5)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = model(ids, past_key_values=DynamicCache()).logits[0]
        batch = model(both, attention_mask=mask, position_ids=positions).logits[1, 5:]
    torch.testing.assert_close(batch, alone, rtol=1e-3, atol=1e-3)


def test_rows_at_equal_positions_share_them() -> None:
    model = ROTATE.install(tiny())
    out = model.generate(text(9, batch=3), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values.track.positions.tolist() == [list(range(13))]
    assert out.past_key_values.track.valid is None
