"""Stored tensors against the parts that will read them, so that decoding stays within bounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kvpack.artifact.manifest import Manifest, PackedLinear
from kvpack.core.errors import ArtifactError, KvpackError
from kvpack.core.model_spec import AttentionSpec
from kvpack.core.roles import Plane
from kvpack.core.types import Shape, TensorSpec
from kvpack.core.weight_code import stored_spec
from kvpack.recipe.inputs_plan import InputsPlan
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.plane_plan import PlanePlan

PLANES: tuple[Plane, ...] = ("key", "value")


def check_parts(manifest: Manifest, path: Path) -> None:
    """Check that payloads and states are those that the parts announce for these shapes.

    Raises:
        ArtifactError: a tensor is missing, too many, or of another shape; says where in `path`.
    """
    for name, linear in manifest.weights.items():
        with _Place(f"weights.{name}", path):
            _check_linear(linear)
    for name, record in {**manifest.copied, **manifest.thresholds, **manifest.kv_state}.items():
        if record.packed is not None:
            raise ArtifactError(f"{name} is packed and no packed layer's", where=str(path))
    with _Place("sparsity", path):
        due = {} if manifest.sparsity is None else manifest.sparsity.tensors()
        found = manifest.thresholds
        if due.keys() != found.keys() or any(not found[n].matches(s) for n, s in due.items()):
            raise ValueError("thresholds are not those of its sites")
    expected: dict[str, TensorSpec] = {}
    for number, change in enumerate(manifest.basis):
        with _Place(f"basis.{number}", path):
            if change.number != number or len(change.states) != len(change.transforms):
                raise ValueError("not numbered in order, or without the states of its transforms")
            expected.update(change.state_tensors())
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
    specs = stored_spec(linear.codec, linear.shape, linear.dtype)
    if specs.keys() != linear.tensors.keys() or any(
        not linear.tensors[n].stands_for(s) for n, s in specs.items()
    ):
        raise ValueError("its tensors are not those of its codec")
    if linear.inputs is not None and (linear.inputs.token_block > 1 or linear.inputs.requires()):
        raise ValueError("inputs: cannot approximate every token on its own")
    if any(transform.requires() for transform in linear.online):
        raise ValueError("online: transforms that learn")


def _states(layer: KVLayerPlan) -> dict[str, TensorSpec]:
    """States that the layer's parts read at inference time, by stored name."""
    attention = layer.attention
    if not all(0 < n < 2**20 for n in (attention.heads, attention.kv_heads, attention.head_dim)):
        raise ValueError("impossible numbers of heads or channels")
    if layer.inputs is not None:
        _check_inputs(layer.inputs, attention)
    for name in PLANES:
        plane = layer.plane(name)
        if (name in layer.planes) != bool(plane.codecs):
            raise ValueError(f"{name}.codecs: not those of what is stored")
        if plane.states != _announced(plane, layer.plane_shape(name, plane.block)):
            raise ValueError(f"{name}.states: not those of its transforms and codecs")
    if layer.retrieval is not None:
        _check_index(layer.retrieval.index, layer)
    return layer.state_tensors()


def _check_index(index: PlanePlan, layer: KVLayerPlan) -> None:
    if layer.inputs is not None or layer.window is not None:
        raise ValueError("retrieval: in a layer that has no whole context of keys")
    if index.folded or len(index.codecs) != 1 or index.block > 1 or index.codecs[0].segment:
        raise ValueError("retrieval.index: cannot code every token as it comes")
    if index.states != _announced(index, layer.plane_shape("key", 1)):
        raise ValueError("retrieval.index.states: not those of its transforms and codec")


def _check_inputs(inputs: InputsPlan, attention: AttentionSpec) -> None:
    """Bases span keys and values each, or, where a chain passes through one plane, both."""
    if not 0 < inputs.channels < 2**31:
        raise ValueError("inputs.channels: impossible")
    width = attention.kv_heads * attention.head_dim
    joint = inputs.link is not None
    ranks = {"value": 2 * width} if joint else {"key": width, "value": width}
    expected = {name: (inputs.channels, min(inputs.channels, rank)) for name, rank in ranks.items()}
    shapes = {name: spec.shape for name, spec in inputs.bases.items()}
    kinds = {spec.dtype for spec in inputs.bases.values()}
    if inputs.bases and (shapes != expected or not kinds <= {"float16", "float32"}):
        raise ValueError("inputs.bases: not those of keys and values")


def _announced(plane: PlanePlan, shape: Shape) -> tuple[Mapping[str, TensorSpec], ...]:
    states = []
    for transform in plane.transforms:
        states.append(transform.state_spec(shape))
        shape = transform.shape(shape)
    return (*states, *(codec.state_spec(shape) for codec in plane.codecs))
