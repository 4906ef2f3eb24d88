from __future__ import annotations

import pytest
import torch

from kvpack.calibrate.stats import accumulator
from kvpack.core.errors import KvpackError

KINDS = ("gram", "channel_sum")


def _data() -> torch.Tensor:
    return torch.randn(6, 3, 20, 8, generator=torch.Generator().manual_seed(0))


def _expected(kind: str, x: torch.Tensor) -> torch.Tensor:
    flat = x.double().reshape(-1, x.shape[-1])
    return {
        "gram": flat.T @ flat,
        "channel_sum": x.double().sum((0, 2)),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_merges_equal_one_pass(kind):
    x = _data()
    whole, first, second = accumulator(kind), accumulator(kind), accumulator(kind)
    whole.update(x)
    for part in x[:4].split(1):
        first.update(part)
    second.update(x[4:])
    first.merge(second)
    first.merge(accumulator(kind))
    one, many = whole.state(), first.state()
    assert set(one) == set(many)
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=1e-5, atol=1e-5)
    value = next(t for n, t in one.items() if n != "count")
    torch.testing.assert_close(value.double(), _expected(kind, x), rtol=1e-5, atol=1e-4)
    assert int(one["count"]) == 120


@pytest.mark.parametrize("kind", KINDS)
def test_merging_leaves_the_other_accumulator_alone(kind):
    x = _data()
    first, second = accumulator(kind), accumulator(kind)
    second.update(x)
    before = {n: t.clone() for n, t in second.state().items()}
    first.merge(second)
    first.update(10 * x)
    for name, tensor in second.state().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_input_is_summed_precisely(kind):
    x = (_data() + 3).bfloat16()
    found = accumulator(kind)
    for _ in range(50):
        found.update(x)
    value = next(t for n, t in found.state().items() if n != "count")
    torch.testing.assert_close(value.double(), 50 * _expected(kind, x), rtol=1e-4, atol=1e-3)


def test_mistakes_are_refused():
    with pytest.raises(KvpackError, match="no statistic is called 'gramm'") as info:
        accumulator("gramm")
    assert "channel_sum" in info.value.hint
    with pytest.raises(ValueError, match="cannot merge"):
        accumulator("gram").merge(accumulator("channel_sum"))
    with pytest.raises(ValueError, match="no data"):
        accumulator("gram").state()


def test_ranges_of_channels_merge() -> None:
    x = _data()
    whole, first, second = (accumulator("channel_range") for _ in range(3))
    whole.update(x)
    first.update(x[:4].bfloat16().float())
    second.update(x[4:])
    first.update(x[:4])
    first.merge(second)
    assert torch.equal(whole.state()["low"], x.amin((0, 2)))
    assert torch.equal(whole.state()["high"], x.amax((0, 2)))
    assert int(whole.state()["count"]) == 120
    assert (first.state()["low"] <= whole.state()["low"]).all()
    assert (first.state()["high"] >= whole.state()["high"]).all()
    again = accumulator("channel_range")
    for part in x.split(1):
        one = accumulator("channel_range")
        one.update(part)
        again.merge(one)
    for name, tensor in whole.state().items():
        assert torch.equal(again.state()[name], tensor), name
