"""What every threshold promises."""

import pytest
import torch

from kvpack.core.roles import Thresholds
from kvpack.core.roles.sparsity import NEVER
from kvpack.ops.thresholds import masked
from tests.contracts.discovery import fitted, parts, random, specs, stats_of

THRESHOLDS = parts("thresholds")


@pytest.mark.parametrize("part", THRESHOLDS)
@pytest.mark.parametrize("channels", [48, 80, 172])
def test_the_share_that_is_kept(part: Thresholds, channels: int) -> None:
    x = random(400, channels) * torch.linspace(0.1, 3, channels)
    kept = masked(x, fitted(part, x)["threshold"])
    assert float((kept != 0).float().mean()) == pytest.approx(part.keep_fraction, abs=0.01)
    assert ((kept == x) | (kept == 0)).all()


@pytest.mark.parametrize("part", THRESHOLDS)
@pytest.mark.parametrize("channels", [1, 64, 172])
def test_spec_is_what_is_learned(part: Thresholds, channels: int) -> None:
    state = fitted(part, random(30, channels))
    assert specs(state) == dict(part.state_spec((1, 1, 30, channels)))


@pytest.mark.parametrize("part", THRESHOLDS)
def test_thresholds_are_finite_and_not_negative(part: Thresholds) -> None:
    x = random(50, 24)
    for scale in (0.0, 1e-30, 1.0, 1e30):
        threshold = fitted(part, x * scale)["threshold"].float()
        assert threshold.isfinite().all()
        assert (threshold >= 0).all()
    one = fitted(part, x[:1])["threshold"].float()
    assert one.isfinite().all()


@pytest.mark.parametrize("part", THRESHOLDS)
def test_cutting_the_text_into_batches_changes_nothing(part: Thresholds) -> None:
    """Short documents count by their tokens; a mean of quantiles per document would differ."""
    x = random(300, 16)
    whole, parts_ = stats_of(part, x), stats_of(part, x[:7])
    from kvpack.calibrate.stats import accumulator

    split = accumulator("magnitudes")
    for piece in x.split([7, 100, 1, 192]):
        split.update(piece[None, None])
    assert torch.equal(split.state()["counts"], whole["magnitudes"]["counts"])
    assert int(parts_["magnitudes"]["counts"].sum()) == 7 * 16


@pytest.mark.parametrize("part", THRESHOLDS)
def test_a_threshold_that_nothing_reaches_is_finite_in_bfloat16(part: Thresholds) -> None:
    assert torch.tensor(NEVER).bfloat16().isfinite()
    assert part.keep_fraction <= 1
