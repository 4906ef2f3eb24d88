from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvpack.calibrate.data import Samples, draw
from kvpack.calibrate.sequential import calibrate
from kvpack.calibrate.store import Calibration
from kvpack.models import open_model
from kvpack.models.scan import scan
from kvpack.models.tokenizer import load_tokenizer
from kvpack.recipe.load import load
from kvpack.recipe.plan import Plan
from kvpack.recipe.resolve import resolve

SMALL = ("calibration.samples=6", "calibration.sample_tokens=48", "calibration.batch=4")


@dataclass(frozen=True)
class Job:
    """A plan with everything that calibrating it takes."""

    plan: Plan
    samples: Samples
    hashes: dict[str, str]

    def run(self, out: Path, **options) -> Calibration:
        return calibrate(self.plan, self.samples, out, hashes=self.hashes, **options)


def job_for(folder: Path, recipe: str, *overrides: str) -> Job:
    spec = open_model(folder)
    plan = resolve(load(recipe, [*SMALL, *overrides]), spec)
    samples = draw(plan.recipe.recipe.calibration, load_tokenizer(spec))
    return Job(plan, samples, scan(spec))


@pytest.fixture(scope="session")
def job(checkpoint: Callable[[str], Path]) -> Job:
    return job_for(checkpoint("llama"), "rotatekv-w4")


@pytest.fixture(scope="session")
def done(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return job.run(tmp_path_factory.mktemp("done") / "calibration")
