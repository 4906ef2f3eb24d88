"""Stored tensors against the parts that will read them, so that decoding stays within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kvpack.artifact.manifest import Manifest, PackedLinear
from kvpack.core.errors import ArtifactError, KvpackError
from kvpack.core.model_spec import AttentionSpec
from kvpack.core.roles import Plane
from kvpack.core.types import Shape, TensorSpec
from kvpack.recipe.plan import KVLayerPlan, PlanePlan, state_name

PLANES: tuple[Plane, ...] = ("key", "value")


def check_parts(manifest: Manifest, path: Path) -> None:
    """Check that payloads and states are those that the parts announce for these shapes.

    Raises:
        ArtifactError: a tensor is missing, too many, or of another shape; says where in `path`.
    """
    for name, linear in manifest.weights.items():
        with _Place(f"weights.{name}", path):
            _check_linear(linear)
    expected: dict[str, TensorSpec] = {}
    for number, layer in enumerate(manifest.kv):
        with _Place(f"kv.{number}", path):
            expected.update(_states(layer))
    with _Place("kv_state", path):
        stated = manifest.kv_state
        if expected.keys() != stated.keys() or any(not stated[n].matches(s) for n, s in expected.items()):
            raise ValueError("not the states of the KV parts")


class _Place:
    """Errors of parts, which were given settings from a file, become errors of that file."""

    def __init__(self, place: str, path: Path) -> None:
        self.place, self.path = place, path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (KvpackError, ValueError, ArithmeticError, LookupError)):
            what = error.what if isinstance(error, KvpackError) else str(error)
            raise ArtifactError(
                f"{self.place}: {what}", where=str(self.path), hint="export the artifact again"
            ) from error


def _check_linear(linear: PackedLinear) -> None:
    specs = linear.codec.spec(linear.shape, linear.dtype)
    if specs.keys() != linear.tensors.keys() or any(
        not linear.tensors[n].matches(s) for n, s in specs.items()
    ):
        raise ValueError("its tensors are not those of its codec")


def _states(layer: KVLayerPlan) -> dict[str, TensorSpec]:
    """States that the layer's parts read at inference time, by stored name."""
    attention = layer.attention
    if not all(0 < n < 2**20 for n in (attention.heads, attention.kv_heads, attention.head_dim)):
        raise ValueError("impossible numbers of heads or channels")
    found: dict[str, TensorSpec] = {}
    for name in PLANES:
        plane = layer.plane(name)
        if plane.states != _announced(plane, attention):
            raise ValueError(f"{name}.states: not those of its transforms and codec")
        for index, state in plane.online_states().items():
            found.update({state_name(attention.layer, name, index, n): s for n, s in state.items()})
    return found


def _announced(plane: PlanePlan, attention: AttentionSpec) -> tuple[Mapping[str, TensorSpec], ...]:
    shape: Shape = (1, attention.kv_heads, plane.codec.token_block, attention.head_dim)
    states = []
    for transform in plane.transforms:
        states.append(transform.state_spec(shape))
        shape = transform.shape(shape)
    return (*states, plane.codec.state_spec(shape))
