"""The roles: the questions that a published method answers, one small interface each.

A part is a frozen dataclass of hyper-parameters (its configuration goes to the manifest). What it
learns is a `State` (it goes to safetensors). The two never mix, and no part owns a hook, a random
number generator or another part's file.
"""

from __future__ import annotations

from kvpack.core.roles.allocators import Allocator
from kvpack.core.roles.codecs import ClassedCodec, Codec, GridCodec, MaskedCodec, VectorCodec
from kvpack.core.roles.packers import Packer
from kvpack.core.roles.part import Part
from kvpack.core.roles.sparsity import Thresholds
from kvpack.core.roles.tokens import Plane, Retriever, Scorer, TierPolicy
from kvpack.core.roles.transforms import DiagonalTransform, RowTransform, Transform, UnropedTransform
from kvpack.core.roles.weights import Solver, row_grids

__all__ = [
    "ROLES",
    "Allocator",
    "ClassedCodec",
    "Codec",
    "DiagonalTransform",
    "GridCodec",
    "MaskedCodec",
    "Packer",
    "Part",
    "Plane",
    "Retriever",
    "RowTransform",
    "Scorer",
    "Solver",
    "Thresholds",
    "TierPolicy",
    "Transform",
    "UnropedTransform",
    "VectorCodec",
    "row_grids",
]

ROLES: dict[str, type[Part]] = {
    "transforms": Transform,
    "codecs": Codec,
    "packers": Packer,
    "policies": TierPolicy,
    "retrievers": Retriever,
    "scorers": Scorer,
    "solvers": Solver,
    "thresholds": Thresholds,
    "allocators": Allocator,
}
"""Folder under `kvpack/parts/` -> the class its parts extend."""
