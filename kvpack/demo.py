"""The whole main job on the embedded model and text, without a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvpack.core.data_files import data_dir
from kvpack.core.errors import CheckFailed
from kvpack.core.progress import SILENT, Progress
from kvpack.evaluate.artifact import EvaluationSettings, evaluate
from kvpack.evaluate.scores import Evaluation
from kvpack.pipeline import export, make_plan
from kvpack.recipe.plan import Plan
from kvpack.verify import Verification, verify

PROMPTS = (
    "The captain looked out over the sea and",
    "To install the program, first",
)
NEW_TOKENS = 40
EVALUATION = EvaluationSettings()


@dataclass(frozen=True)
class Continuation:
    """What source and artifact make of one prompt."""

    prompt: str
    source: str
    packed: str


@dataclass(frozen=True)
class Demo:
    """Everything that the demonstration found."""

    plan: Plan
    artifact_bytes: int
    verification: Verification
    evaluation: Evaluation
    continuations: tuple[Continuation, ...]


def run(recipe: str, out: Path, *, force: bool = False, progress: Progress = SILENT) -> Demo:
    """Calibrate, export, verify, evaluate and generate with the embedded model.

    Args:
        recipe: a recipe's name or path.
        out: folder for the artifact.
        force: replace it if it exists.
        progress: told about every stage.

    Raises:
        CheckFailed: the artifact that was just written does not verify.
    """
    source = data_dir("calibration") / "demo_model"
    plan = make_plan(source, recipe)
    exported = export(plan, out, force=force, progress=progress)
    verification = verify(out, source, progress=progress)
    if not verification.passed:
        failed = next(check for check in verification.checks if not check.passed)
        raise CheckFailed(f"{failed.name}: {failed.detail}", hint=failed.hint)
    evaluation = evaluate(out, source, EVALUATION, progress=progress)
    return Demo(plan, exported.nbytes, verification, evaluation, _continue(source, out, progress))


def _continue(source: Path, packed: Path, progress: Progress) -> tuple[Continuation, ...]:
    from kvpack.loading.generate import continue_prompt
    from kvpack.loading.load import load, load_source, load_tokenizer

    tokenizer = load_tokenizer(packed)
    texts: list[list[str]] = []
    for done, model in enumerate((load_source(source), load(packed))):
        progress("generate", done, 2, "source" if done == 0 else "packed")
        made = [continue_prompt(model, tokenizer, p, max_new_tokens=NEW_TOKENS) for p in PROMPTS]
        texts.append([m.text for m in made])
    progress("generate", 2, 2)
    return tuple(Continuation(p, a, b) for p, a, b in zip(PROMPTS, *texts, strict=True))
