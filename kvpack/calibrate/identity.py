"""What makes a calibration reusable: everything that its results depend on, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpack.core.roles import Codec
from kvpack.recipe.build import to_mapping
from kvpack.recipe.plan import Plan
from kvpack.recipe.plane_plan import PlanePlan

Identity = dict[str, Any]


def needs_calibration(plan: Plan) -> bool:
    """Whether any part of the plan asks for statistics."""
    solvers = any(w.solver.requires() for w in plan.weights.values())
    basis = any(transform.requires() for change in plan.basis for transform in change.transforms)
    sparse = plan.sparsity is not None
    return solvers or basis or sparse or any(part.requires() for part in plan.kv_parts())


def identity(plan: Plan, hashes: Mapping[str, str]) -> Identity:
    """Fields that must agree before a calibration serves a plan.

    Policies and codecs of the cache that learn nothing are absent: they change no result.

    Args:
        plan: the recipe applied to the model.
        hashes: sha256 of the model's weight files.
    """
    recipe = plan.recipe.recipe.calibration
    weights = {
        name: [to_mapping(w.codec), to_mapping(w.solver), to_mapping(w.inputs), to_mapping(w.online)]
        for name, w in sorted(plan.weights.items())
    }
    kv = [
        [
            x.attention.layer,
            *([to_mapping(t) for t in (*p.transforms, *_learning(p))] for p in x.chains.values()),
            [x.key.folded, x.value.folded],
        ]
        for x in plan.kv
    ]
    return {
        "model files": dict(sorted(hashes.items())),
        "data": data_name(recipe.data),
        "samples": recipe.samples,
        "sample_tokens": recipe.sample_tokens,
        "seed": recipe.seed,
        "basis": _digest(
            [[change.role, to_mapping(change.transforms), change.online] for change in plan.basis]
        ),
        "sparsity": _digest(None if plan.sparsity is None else to_mapping(plan.sparsity.sites)),
        "weight parts": _digest(weights),
        "kv_cache transforms": _digest(kv),
        # Where no weight is packed, there is no order in which weights could be.
        **({"sequential": recipe.sequential} if weights else {}),
    }


def _learning(plane: PlanePlan) -> tuple[Codec, ...]:
    return tuple(codec for codec in plane.codecs if codec.requires())


def data_name(spec: str) -> str:
    """Name of a calibration text: a path's folder differs from machine to machine, so it is dropped."""
    return spec if spec.startswith(("hf:", "builtin:", "recall:")) else Path(spec).name


def _digest(value: Any) -> str:
    raw = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(raw.encode()).hexdigest()
