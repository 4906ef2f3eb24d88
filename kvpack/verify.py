"""Proving that an artifact is complete, untampered, and what its source makes it.

Without the source: structure, checksums, every packed layer decodes to finite numbers, the model
computes finite logits. With it: the source is the one that was exported, every copied tensor is
bit-equal to it, every packed layer's error is the recorded one, and the distance of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvpack.core.access import CLOSED, Access
from kvpack.core.ahead import in_order
from kvpack.core.errors import ArtifactError, KvpackError
from kvpack.core.progress import SILENT, Progress

if TYPE_CHECKING:
    from kvpack.artifact.reader import Artifact
    from kvpack.core.model_spec import ModelSpec
    from kvpack.packing import Packing
    from kvpack.recipe.plan import Plan

PROBE_TOKENS = 256
PROBE_CHUNKS = 2
ERROR_TOLERANCE = 1e-4
"""Largest difference between a recorded relative error and the recomputed one."""


@dataclass(frozen=True)
class Check:
    """One question and its answer; a failed one says in `hint` what to do."""

    name: str
    passed: bool
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class Verification:
    """All checks that could be made; later ones are left out once one has failed."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def verify(
    path: Path,
    source: str | Path | None = None,
    *,
    access: Access = CLOSED,
    progress: Progress = SILENT,
) -> Verification:
    """Check an artifact; a failed check is an answer, not an exception.

    Args:
        path: the artifact's folder.
        source: the model it was made from, folder or hub id.
        access: whether the source may come from the network, and models bring code.
        progress: told about every stage.

    Raises:
        SourceError: the source cannot be opened.
    """
    checks: list[Check] = []

    def run(name: str, question: Callable[[], str]) -> bool:
        try:
            checks.append(Check(name, True, question()))
        except (ArtifactError, _Failed) as error:
            checks.append(Check(name, False, error.message, error.hint))
        return checks[-1].passed

    artifact: list[Artifact] = []
    if not run("files", lambda: _files(path, artifact, progress)):
        return Verification(tuple(checks))
    steps: list[tuple[str, Callable[[], str]]] = [("decode", lambda: _decode(artifact[0], progress))]
    if source is not None:
        from kvpack.models import open_model

        model = open_model(
            source, allow_download=access.allow_download, trust_remote_code=access.trust_remote_code
        )
        steps.append(("source", lambda: _source(artifact[0], model, progress)))
    steps.append(("logits", lambda: _logits(artifact[0], source, access, progress)))
    for name, question in steps:
        if not run(name, question):
            break
    return Verification(tuple(checks))


class _Failed(KvpackError):
    """A check's answer is no."""


def _files(path: Path, opened: list[Artifact], progress: Progress) -> str:
    from kvpack.artifact.reader import Artifact

    opened.append(Artifact.open(path, "full", progress))
    count = len(opened[0].manifest.files) + 1
    return f"{count} files, {len(opened[0].tensor_names)} tensors, every checksum agrees"


def _decode(artifact: Artifact, progress: Progress) -> str:
    import torch

    weights = artifact.manifest.weights
    for done, (name, linear) in enumerate(weights.items()):
        progress("decode", done, len(weights), name)
        found = artifact.solution(name)
        decoded = linear.codec.decode(found.payload, found.state, torch.float32)
        if not bool(decoded.isfinite().all()):
            raise _Failed("decodes to NaN or Inf", where=name, hint="export it again")
    worst = max(weights, key=lambda n: weights[n].relative_error or 0.0, default=None)
    if worst is None:
        return "no packed layers"
    progress("decode", len(weights), len(weights))
    return (
        f"{len(weights)} packed layers, largest relative error {weights[worst].relative_error:.4f} in {worst}"
    )


def _plan(artifact: Artifact, model: ModelSpec) -> Plan:
    """The plan that the artifact was made by, from its own manifest."""
    from kvpack.recipe.load import from_resolved
    from kvpack.recipe.resolve import resolve

    record = artifact.manifest.recipe
    loaded = from_resolved(artifact.manifest.resolved_recipe, record.path, record.source, record.variant)
    return resolve(loaded, model)


def _source(artifact: Artifact, model: ModelSpec, progress: Progress) -> str:
    from kvpack.models.scan import scan

    recorded = {name: record.sha256 for name, record in artifact.manifest.base_model.files.items()}
    if scan(model, progress) != recorded:  # before the plan: the recipe may not even fit another model
        raise _Failed(
            "is not the checkpoint that was exported", where=str(model.path), why="its sha256 differ"
        )
    plan = _plan(artifact, model)
    for name, problem in _differences(artifact, plan, progress):
        raise _Failed(problem, where=name, hint="export it again")
    return (
        f"{len(artifact.manifest.copied)} copied tensors equal, {len(plan.weights)} packed errors as recorded"
    )


def _differences(artifact: Artifact, plan: Plan, progress: Progress) -> Iterator[tuple[str, str]]:
    from kvpack.packing import Packing

    packing = Packing(plan, None, learned=artifact.kv_state())
    names = [*plan.copied, *plan.weights]
    # In threads as the export: torch then sums in the same order, to the last bit.
    found = in_order(partial(_difference, artifact, packing, name) for name in names)
    for done, name in enumerate(names):
        progress("compare", done, len(names), name)
        if problem := next(found):
            yield name, problem
    progress("compare", len(names), len(names))


def _difference(artifact: Artifact, packing: Packing, name: str) -> str:
    """What is wrong with a copied tensor or a packed layer; empty when nothing is."""
    import torch

    from kvpack.packing import relative_error

    if name in packing.plan.copied:
        return "" if torch.equal(artifact.read(name), packing.source(name)) else "differs from the source"
    weight = packing.plan.weights[name]
    error = relative_error(packing.source(weight.linear.weight), weight.codec, artifact.solution(name))
    recorded = artifact.manifest.weights[name].relative_error
    if recorded is None or not math.isclose(error, recorded, abs_tol=ERROR_TOLERANCE):
        return f"has relative error {error:.5f}, recorded is {recorded}"
    return ""


def _logits(artifact: Artifact, source: str | Path | None, access: Access, progress: Progress) -> str:
    from kvpack.evaluate.artifact import EvaluationSettings, evaluate

    probe = EvaluationSettings(
        context_tokens=PROBE_TOKENS, max_tokens=PROBE_CHUNKS * PROBE_TOKENS, protocols=("decode",)
    )
    found = evaluate(artifact.path, source, probe, access=access, progress=progress)
    scores = next(iter(found.packed.values()))
    if not math.isfinite(scores.perplexity) or (scores.kl is not None and not math.isfinite(scores.kl)):
        raise _Failed("are NaN or Inf", where="logits", hint="try a gentler recipe")
    if scores.kl is None or scores.top1 is None:
        return f"finite; perplexity {scores.perplexity:.2f} on {found.tokens} tokens of {found.text}"
    return f"KL {scores.kl:.4f}, top-1 agreement {scores.top1:.1%} on {found.tokens} tokens of {found.text}"
