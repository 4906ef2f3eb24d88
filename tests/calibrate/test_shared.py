"""Calibrating together gives what calibrating alone gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvpack.calibrate.shared import calibrate_shared, sharing
from kvpack.calibrate.store import Calibration
from kvpack.core.errors import KvpackError, RecipeError
from kvpack.parts.transforms.channel_reorder import ChannelReorder
from kvpack.recipe.kv_plan import PLANES
from tests.calibrate.conftest import Job, job_for

UNFOLDED = "kv_cache.value.fold=false"
REORDERED = "kv_cache.value.transforms=[{kind: hadamard}, {kind: channel_reorder}]"
LATE = "kv_cache.key.transforms=[{kind: channel_reorder}, {kind: hadamard}, {kind: channel_reorder}]"


@pytest.fixture(scope="module")
def jobs(checkpoint: Callable[[str], Path]) -> dict[str, Job]:
    """Plans that need one pass, two passes, or none in a plane."""
    settings = {"one": (UNFOLDED,), "values": (UNFOLDED, REORDERED), "two": (UNFOLDED, LATE)}
    return {name: job_for(checkpoint("llama"), "rotatekv", *own) for name, own in settings.items()}


def together(jobs: list[Job], folder: Path) -> list[Path | KvpackError]:
    outs = [folder / f"together-{i}" for i in range(len(jobs))]
    return calibrate_shared([j.plan for j in jobs], jobs[0].samples, outs, hashes=jobs[0].hashes)


def test_the_folders_are_equal_byte_for_byte(jobs: dict[str, Job], tmp_path: Path) -> None:
    shared = together(list(jobs.values()), tmp_path)
    for (name, job), path in zip(jobs.items(), shared, strict=True):
        alone = job.run(tmp_path / name)
        files = sorted(p.name for p in alone.path.iterdir())
        assert isinstance(path, Path)
        assert files == sorted(p.name for p in path.iterdir())
        for file in files:
            assert (path / file).read_bytes() == (alone.path / file).read_bytes(), (name, file)
        Calibration.open(path).matches(job.plan, job.hashes, job.samples.tokens_sha256)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_folded_values_are_equal_up_to_rounding(
    family: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    jobs = [job_for(checkpoint(family), "rotatekv"), job_for(checkpoint(family), "rotatekv", LATE)]
    shared = together(jobs, tmp_path)
    for i, (job, path) in enumerate(zip(jobs, shared, strict=True)):
        assert isinstance(path, Path)
        alone, found = job.run(tmp_path / f"alone-{i}"), Calibration.open(path)
        found.matches(job.plan, job.hashes, job.samples.tokens_sha256)
        for layer in job.plan.kv:
            for plane in PLANES:
                states = zip(
                    alone.states(layer.attention.layer, plane),
                    found.states(layer.attention.layer, plane),
                    strict=True,
                )
                for a, b in states:
                    assert a.keys() == b.keys()
                    for name in a:
                        torch.testing.assert_close(b[name], a[name], atol=1e-3, rtol=1e-3)


def test_a_plan_that_cannot_be_fitted_leaves_the_others_alone(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = jobs["one"].run(tmp_path / "alone")
    fit, calls = ChannelReorder.fit, []

    def fussy(self, stats):
        calls.append(stats)
        if len(calls) == 2:
            raise RecipeError("too few rows")
        return fit(self, stats)

    monkeypatch.setattr(ChannelReorder, "fit", fussy)
    # The second fit of a pass is that of the second plan's keys.
    good, bad = together([jobs["one"], jobs["two"]], tmp_path)
    assert isinstance(bad, RecipeError)
    assert isinstance(good, Path)
    assert not list(tmp_path.glob("together-1*"))
    assert not list(tmp_path.glob(".together*"))
    file = "block-00001.safetensors"
    assert (good / file).read_bytes() == (expected.path / file).read_bytes()


def test_an_interruption_leaves_nothing(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ChannelReorder, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        together([jobs["one"], jobs["two"]], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_who_shares_what(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    names = ("rotatekv", "kivi", "rotatekv@4bit", "w4", "rotatekv-w4", "rotatekv")
    jobs = [job_for(folder, name) for name in names]
    jobs[-1] = job_for(folder, "rotatekv", "calibration.seed=1")
    other = job_for(folder, "rotatekv", LATE)
    plans = [*(job.plan for job in jobs), other.plan]
    # 0 and 2 differ in codecs that learn nothing; 6 shares their passes; 3, 4 and 5 are alone.
    assert sharing(plans, jobs[0].hashes) == [[[0, 2], [6]], [[3]], [[4]], [[5]]]
