"""K-sort's permutations against a direct computation, and that they change no product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvpack.calibrate.stats import accumulator
from kvpack.core.errors import KvpackError
from kvpack.core.types import Site
from kvpack.parts.transforms.channel_sort import ChannelSort
from tests.contracts.discovery import stats_of

AT = Site(0, kv_heads=2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [8, 48, 64, 80, 128])
def test_weight_rows_are_sorted_by_their_norm_within_each_head(width: int) -> None:
    weight = normal(2 * width, 24) * normal(2 * width, 1, seed=1).exp()
    state = ChannelSort().fit({"projection.weight": {"weight": weight, "heads": torch.tensor(2)}})
    for head in range(2):
        norms = [sum(v * v for v in row) for row in weight[head * width :][:width].double().tolist()]
        assert state["perm"][head].tolist() == sorted(range(width), key=norms.__getitem__)
    assert state["perm"].dtype == torch.uint8


@pytest.mark.parametrize("by", ["rms", "max"])
@pytest.mark.parametrize("tokens", [1, 100])
def test_measured_sizes_are_those_of_the_tokens(by: str, tokens: int) -> None:
    x = normal(2, 2, tokens, 48) * normal(48, seed=1).exp()
    (stat,) = ChannelSort(by=by).requires()
    measured = accumulator(stat.kind)
    measured.update(x)
    perm = ChannelSort(by=by).fit({stat.name: measured.state()})["perm"].long()
    exact = x.double()
    size = exact.square().mean((0, 2)) if by == "rms" else exact.abs().amax((0, 2))
    ordered = size.gather(-1, perm)
    assert (ordered.diff(dim=-1) >= -1e-9 * ordered[:, 1:]).all()
    assert torch.equal(perm.sort(-1).values, torch.arange(48).expand(2, 48))


def test_equal_channels_keep_their_order() -> None:
    x = torch.ones(1, 2, 5, 8)
    assert ChannelSort(by="max").fit(stats_of(ChannelSort(by="max"), x))["perm"].tolist() == [[*range(8)]] * 2


def test_wide_heads_get_wider_entries() -> None:
    x = normal(1, 2, 3, 320)
    state = ChannelSort(by="max").fit(stats_of(ChannelSort(by="max"), x))
    assert state["perm"].dtype == torch.int16
    assert torch.equal(ChannelSort().inverse(ChannelSort().forward(x, state, AT), state, AT), x)


def test_heads_have_orders_of_their_own_and_nothing_is_rounded() -> None:
    part = ChannelSort(by="max")
    x, q = normal(2, 2, 9, 64), normal(2, 6, 9, 64, seed=1)
    x[:, 0, :, 3] *= 9
    x[:, 1, :, 60] *= 9
    state = part.fit(stats_of(part, x))
    assert state["perm"][:, -1].tolist() == [3, 60]
    z = part.forward(x, state, AT)
    assert torch.equal(part.inverse(z, state, AT), x)
    scores = part.dual(q, state, AT).double() @ z.double().repeat_interleave(3, 1).mT
    assert torch.allclose(scores, q.double() @ x.double().repeat_interleave(3, 1).mT)


def test_bad_statistics_are_refused() -> None:
    with pytest.raises(KvpackError, match="missing"):
        ChannelSort().fit({})
    x = normal(1, 2, 3, 8)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(KvpackError, match="not finite"):
        ChannelSort(by="max").fit(stats_of(ChannelSort(by="max"), x))
