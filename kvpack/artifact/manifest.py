"""The manifest: everything that an artifact is, as data; FORMAT.md describes it for other readers."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvpack.artifact.canonical import table_json
from kvpack.artifact.layout import MANIFEST_FILE as MANIFEST_FILE
from kvpack.core.errors import ArtifactError, RecipeError, RecipeErrors
from kvpack.core.packed_bytes import PackedBytes
from kvpack.core.roles import Codec, Solver, Transform
from kvpack.core.strict_json import parse_json
from kvpack.core.types import ITEM_BYTES, TensorSpec
from kvpack.recipe.basis import BasisPlan
from kvpack.recipe.build import build, hints, to_mapping
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.plan import DroppedTensor
from kvpack.recipe.sparsity import SparsityPlan
from kvpack.recipe.yaml_lines import Node, Position

FORMAT_VERSION = 1
_DIGEST = "manifest_sha256"
_NO_DIGEST = "0" * 64
_PLAIN_SECTIONS = ("resolved_recipe", "calibration")


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of a file."""

    bytes: int = field(metadata={"minimum": 0})
    sha256: str


@dataclass(frozen=True)
class TensorRecord(TensorSpec):
    """A tensor as it is stored, and the hash of its bytes; `packed` tells what a blob stands for."""

    sha256: str
    packed: PackedBytes | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"unknown dtype {self.dtype[:40]!r}")
        if any(not 0 <= n < 2**63 for n in self.shape):
            raise ValueError("impossible shape")
        if self.packed is not None and not self.matches(self.packed.stored):
            raise ValueError("is not as long as its packed blocks")

    @property
    def logical(self) -> TensorSpec:
        """The tensor that a reader is given."""
        return self if self.packed is None else self.packed

    def stands_for(self, spec: TensorSpec) -> bool:
        """Whether shape and dtype of what a reader is given are those of `spec`."""
        return (self.logical.shape, self.logical.dtype) == (spec.shape, spec.dtype)

    def matches(self, spec: TensorSpec) -> bool:
        """Whether shape and dtype are those of `spec`."""
        return (self.shape, self.dtype) == (spec.shape, spec.dtype)


@dataclass(frozen=True)
class BaseModel:
    """The model that was compressed.

    `repository` is its hub id and `revision` the commit, None for a local folder. `files` are its
    weight files. `tied` maps names to the tensor that holds their data.
    """

    architecture: str
    family: str
    dtype: str
    parameters: int
    files: Mapping[str, FileRecord]
    tied: Mapping[str, str]
    repository: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class RecipeRecord:
    """The recipe as it was given: `source` is the file's text, `sha256` the resolved recipe's hash."""

    name: str
    path: str
    source: str
    sha256: str
    overrides: tuple[str, ...] = ()
    variant: str | None = None


@dataclass(frozen=True)
class PackedLinear:
    """A packed weight of logical `shape` (R, C) and source `dtype`.

    Its tensors are stored as ``<linear>.<name>``. `inputs` is a codec for what the layer is given,
    `online` are transforms that run on it before. `bits` is the width of a code where the codec has
    one; `relative_error` is ``|W - W_hat| / |W|`` (Frobenius), None when it was not measured.
    """

    role: str
    shape: tuple[int, int]
    dtype: str
    codec: Codec
    solver: Solver
    tensors: Mapping[str, TensorRecord]
    bits_per_element: float
    bits: int | None = None
    layer: int | None = None
    relative_error: float | None = None
    inputs: Codec | None = None
    online: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        if any(not 0 < n < 2**31 for n in self.shape):
            raise ValueError("impossible shape")

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def logical(self) -> dict[str, TensorSpec]:
        """Its tensors as a reader is given them; `PackedBytes` where they are packed."""
        return {name: record.logical for name, record in self.tensors.items()}

    @property
    def unpacked_nbytes(self) -> int:
        """Bytes of its tensors before lossless coding; the same as `nbytes` without."""
        return sum(t.logical.nbytes for t in self.tensors.values())


@dataclass(frozen=True)
class Totals:
    """Sums over all weight tensors."""

    weight_bytes: int
    kv_state_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class Manifest:
    """One artifact. Tensor names are unique over `weights`, `copied` and, in its own file, `kv_state`.

    `resolved_recipe` and `calibration` (what was calibrated on; None when nothing was) are plain
    JSON. `files` lists every file but the manifest.
    """

    base_model: BaseModel
    recipe: RecipeRecord
    resolved_recipe: Mapping[str, Any]
    weights: Mapping[str, PackedLinear]
    copied: Mapping[str, TensorRecord]
    dropped: tuple[DroppedTensor, ...]
    kv: tuple[KVLayerPlan, ...]
    kv_state: Mapping[str, TensorRecord]
    totals: Totals
    files: Mapping[str, FileRecord]
    calibration: Mapping[str, Any] | None
    seed: int
    versions: Mapping[str, str]
    kvpack_version: str
    format_version: int = FORMAT_VERSION
    basis: tuple[BasisPlan, ...] = ()
    sparsity: SparsityPlan | None = None
    thresholds: Mapping[str, TensorRecord] = field(default_factory=dict)

    def weight_tensors(self) -> dict[str, TensorRecord]:
        """Every tensor of the weight shards, by name."""
        tensors = {**self.copied, **self.thresholds}
        for name, linear in self.weights.items():
            tensors.update({f"{name}.{part}": record for part, record in linear.tensors.items()})
        return tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all listed files."""
        return sum(record.bytes for record in self.files.values())

    def to_json(self) -> bytes:
        """The file's bytes: equal manifests give equal bytes."""
        sections = {f.name: to_mapping(getattr(self, f.name)) for f in dataclasses.fields(self)}
        blank = table_json({**sections, _DIGEST: _NO_DIGEST})
        digest = hashlib.sha256(blank).hexdigest()
        return table_json({**sections, _DIGEST: digest})

    @classmethod
    def from_json(cls, data: bytes, where: str = MANIFEST_FILE) -> Manifest:
        """Parse a manifest.

        Raises:
            ArtifactError: not a manifest, damaged, from a newer kvpack, or inconsistent; all
                problems found are named with their place.
        """
        content = parse_json(data, where=where, error=ArtifactError)
        if not isinstance(content, dict):
            raise ArtifactError("is not a JSON object", where=where)
        _check_version(content, where)
        _check_digest(content.pop(_DIGEST, None), data, where)
        manifest = cls(**_sections(content, where))
        _check_sums(manifest, where)
        return manifest


def bits_per_element(nbytes: int, elements: int) -> float:
    """Stored bits over logical elements; 0 for nothing."""
    return 8 * nbytes / elements if elements else 0.0


def _check_version(content: dict[str, Any], where: str) -> None:
    version = content.get("format_version")
    if type(version) is not int or version < 1:
        raise ArtifactError("format_version is not a version number", where=where)
    if version > FORMAT_VERSION:
        made_by = content.get("kvpack_version")
        by = f", written by kvpack {made_by[:40]}" if isinstance(made_by, str) else ""
        raise ArtifactError(
            f"has format version {version}{by}; this kvpack reads versions up to {FORMAT_VERSION}",
            where=where,
            hint="upgrade: pip install -U kvpack",
        )


def _check_digest(digest: Any, data: bytes, where: str) -> None:
    """The digest is of the file with its own 64 digits replaced by zeros."""
    sound = isinstance(digest, str) and len(digest) == 64 and digest != _NO_DIGEST
    if sound:
        blank = data.replace(digest.encode("utf-8"), _NO_DIGEST.encode(), 1)
        sound = hashlib.sha256(blank).hexdigest() == digest
    if not sound:
        raise ArtifactError(
            f"its content does not match its {_DIGEST}",
            where=where,
            why="the file was damaged or edited",
            hint="copy, download or export the artifact again",
        )


def _sections(content: dict[str, Any], where: str) -> dict[str, Any]:
    """Every field of `Manifest` from its section."""
    fields = dataclasses.fields(Manifest)
    known = [f.name for f in fields]
    added = {f.name for f in fields if _has_default(f)}  # younger than version 1: may be missing
    unknown = sorted(content.keys() - set(known))
    errors = [RecipeError(f"{name[:200]}: unknown key", where=where) for name in unknown]
    values: dict[str, Any] = {}
    for name in known:
        if name not in content and name in added:
            continue
        if name not in content:
            errors.append(RecipeError(f"{name}: missing", where=where))
        elif name not in _PLAIN_SECTIONS:
            node = Node.of(content[name], Position(where))
            values[name] = build(hints(Manifest)[name], node, name, errors)
        elif isinstance(content[name], dict) or (name == "calibration" and content[name] is None):
            values[name] = content[name]
        else:
            errors.append(RecipeError(f"{name}: expected a mapping", where=where))
    if errors:
        found = RecipeErrors(errors[:20])
        raise ArtifactError(found.what, hint=found.hint or "export the artifact again, or upgrade kvpack")
    return values


def _has_default(setting: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return setting.default is not missing or setting.default_factory is not missing


def _check_sums(manifest: Manifest, where: str) -> None:
    for path, stated, computed in _derived(manifest):
        if stated != computed:
            raise ArtifactError(f"{path}: {stated}, but its tensors come to {computed}", where=where)
    parts = sum(len(linear.tensors) for linear in manifest.weights.values())
    if len(manifest.weight_tensors()) != parts + len(manifest.copied) + len(manifest.thresholds):
        raise ArtifactError("two of its tensors have one name", where=where)


def _derived(manifest: Manifest) -> Iterator[tuple[str, object, object]]:
    """Values that follow from others: path, as stated, as computed."""
    for name, linear in manifest.weights.items():
        bits = bits_per_element(linear.nbytes, math.prod(linear.shape))
        yield f"weights.{name}.bits_per_element", linear.bits_per_element, bits
        yield f"weights.{name}.bits", linear.bits, getattr(linear.codec, "bits", None)
    weight_bytes = sum(t.nbytes for t in manifest.weight_tensors().values())
    state_bytes = sum(t.nbytes for t in manifest.kv_state.values())
    bits = bits_per_element(weight_bytes, manifest.base_model.parameters)
    yield "totals", manifest.totals, Totals(weight_bytes, state_bytes, bits)
