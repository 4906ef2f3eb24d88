"""The roles: the questions that a published method answers, one small interface each.

A part is a frozen dataclass of hyper-parameters (its configuration goes to the manifest). What it
learns is a `State` (it goes to safetensors). The two never mix, and no part owns a hook, a random
number generator or another part's file.
"""

from __future__ import annotations

from kvpack.core.roles.compression import Codec, GridCodec, Transform
from kvpack.core.roles.part import Part
from kvpack.core.roles.tokens import Plane, Retriever, Scorer, TierPolicy
from kvpack.core.roles.weights import Solver

__all__ = [
    "ROLES",
    "Codec",
    "GridCodec",
    "Part",
    "Plane",
    "Retriever",
    "Scorer",
    "Solver",
    "TierPolicy",
    "Transform",
]

ROLES: dict[str, type[Part]] = {
    "transforms": Transform,
    "codecs": Codec,
    "policies": TierPolicy,
    "retrievers": Retriever,
    "scorers": Scorer,
    "solvers": Solver,
}
"""Folder under `kvpack/parts/` -> the class its parts extend."""
