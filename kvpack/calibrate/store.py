"""The calibration folder: written once (`kvpack.calibrate.writer`), read strictly.

``calibration.json`` names every other file with its hash. ``block-00000.safetensors`` and so on
hold, per decoder block, solved payloads (``<linear>.<payload tensor>``) and the states of KV
transforms (``layers.<l>.<plane>.<i>.<name>``); ``outer.safetensors`` what stands behind the blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from kvpack.calibrate.identity import identity
from kvpack.core.errors import ArtifactError, CalibrationMismatch
from kvpack.core.types import State
from kvpack.recipe.basis import BasisPlan, basis_state
from kvpack.recipe.kv_plan import state_name
from kvpack.recipe.plan import Plan
from kvpack.recipe.sparsity import THRESHOLD

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "calibration.json"
_ENTRY = {"file", "shape", "tensors", "relative_output_error"}
FORMAT, VERSION = "kvpack-calibration", 1


class Calibration:
    """A calibration folder, opened. Files are read and checked when they are first needed."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self._loaded: tuple[str, dict[str, Tensor]] = ("", {})
        self._lock = Lock()  # an export reads in several threads

    @classmethod
    def open(cls, path: Path) -> Calibration:
        """Read the manifest and check that every file is there.

        Raises:
            ArtifactError: not a calibration, too new, or incomplete.
        """
        manifest = _read_manifest(path)
        for file in manifest["files"]:
            if Path(file).name != file or not (path / file).is_file():
                raise ArtifactError(f"{file} is missing", where=str(path), hint="run kvpack calibrate again")
        return cls(path, manifest)

    @property
    def sha256(self) -> str:
        """Hash of the manifest, which holds the hashes of all files."""
        return _sha256(self.path / MANIFEST)

    @property
    def model_files(self) -> dict[str, str]:
        """Name and sha256 of the weight files that were measured."""
        files = self.manifest["identity"].get("model files")
        return files if isinstance(files, dict) else {}

    @property
    def origin(self) -> dict[str, Any]:
        """What was measured on what: fields that belong into an artifact's manifest."""
        who = self.manifest["identity"]
        names = ("data", "samples", "sample_tokens", "seed", "sequential")
        found = {name: who[name] for name in names if name in who}
        found["data_sha256"] = self.manifest["data"]["sha256"]
        return {**found, "experts": self.experts} if self.experts else found

    @property
    def experts(self) -> dict[str, Any]:
        """How many experts were measured and which were cold; empty for a model without experts."""
        found = self.manifest.get("experts", {})
        return {name: found[name] for name in found if name != "tokens"}

    @property
    def output_errors(self) -> dict[str, float]:
        """Relative output error of every linear layer that was solved with data."""
        linears = self.manifest["linears"].items()
        return {n: e["relative_output_error"] for n, e in linears if e["relative_output_error"] is not None}

    def matches(self, plan: Plan, hashes: Mapping[str, str], tokens_sha256: str | None = None) -> None:
        """Refuse a plan that this calibration was not made for.

        Args:
            plan: the recipe applied to the model.
            hashes: sha256 of the model's weight files.
            tokens_sha256: fingerprint of the samples, where they have been drawn again.

        Raises:
            CalibrationMismatch: names the fields that differ.
        """
        own, wanted = self.manifest["identity"], identity(plan, hashes)
        different = [name for name in wanted if own.get(name) != wanted[name]]
        if tokens_sha256 is not None and tokens_sha256 != self.manifest["data"]["tokens_sha256"]:
            different.append("calibration text")
        if different:
            raise CalibrationMismatch(
                f"was made for other values of: {', '.join(different)}",
                where=str(self.path),
                why="its results would not fit",
                hint="run kvpack calibrate again, or leave --calibration out",
            )

    def solved(self, linear: str) -> dict[str, Tensor] | None:
        """Stored tensors of a linear layer; None when its solver needed no data.

        Raises:
            ArtifactError: the file is damaged.
        """
        entry = self.manifest["linears"].get(linear)
        if entry is None:
            return None
        tensors = self._read(entry["file"])
        missing = [n for n in entry["tensors"] if f"{linear}.{n}" not in tensors]
        if missing:
            raise ArtifactError(f"{linear}.{missing[0]} is missing", where=str(self.path / entry["file"]))
        return {n: tensors[f"{linear}.{n}"] for n in entry["tensors"]}

    def threshold(self, module: str) -> tuple[Tensor, float]:
        """The threshold of an FFN or a linear layer, and the share of numbers that it let pass.

        Raises:
            ArtifactError: the calibration has none, or its file is damaged.
        """
        entry = self.manifest.get("thresholds", {}).get(module)
        tensors = {} if entry is None else self._read(entry["file"])
        if f"{module}.{THRESHOLD}" not in tensors:
            raise ArtifactError(f"has no threshold of {module}", where=str(self.path))
        return tensors[f"{module}.{THRESHOLD}"], entry["active"]

    def states(self, layer: int, plane: str) -> tuple[State, ...]:
        """States of the transforms of one plane, in order; stateless ones are empty.

        Raises:
            ArtifactError: the calibration has nothing for this layer, or its file is damaged.
        """
        counts = self.manifest["kv"].get(str(layer))
        if counts is None or plane not in counts:
            raise ArtifactError(f"layer {layer} has no {plane} transforms", where=str(self.path))
        file = f"block-{layer:05d}.safetensors"
        tensors = self._read(file) if file in self.manifest["files"] else {}
        return tuple(dict(_below(tensors, state_name(layer, plane, i, ""))) for i in range(counts[plane]))

    def basis_states(self, change: BasisPlan) -> tuple[State, ...]:
        """What the transforms of a change of basis learned, in order; stateless ones are empty.

        Raises:
            ArtifactError: the file is damaged.
        """
        if change.layer is None or not any(change.states):
            return tuple(transform.fit({}) for transform in change.transforms)
        tensors = self._read(f"block-{change.layer:05d}.safetensors")
        return tuple(
            dict(_below(tensors, basis_state(change.number, i, ""))) for i in range(len(change.transforms))
        )

    def _read(self, file: str) -> dict[str, Tensor]:
        """Tensors of a file; the last one stays, as neighbours are asked for together."""
        with self._lock:
            return self._read_once(file)

    def _read_once(self, file: str) -> dict[str, Tensor]:
        if self._loaded[0] != file:
            path = self.path / file
            if _sha256(path) != self.manifest["files"].get(file):
                raise ArtifactError(
                    "its content changed since it was written",
                    where=str(path),
                    hint="run kvpack calibrate again",
                )
            try:
                self._loaded = (file, load_file(path))
            except SafetensorError as error:
                raise ArtifactError("is not a safetensors file", where=str(path), why=str(error)) from error
        return self._loaded[1]


def _below(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    return ((n.removeprefix(prefix), t) for n, t in tensors.items() if n.startswith(prefix))


def _read_manifest(path: Path) -> dict[str, Any]:
    where, hint = str(path / MANIFEST), "give a folder that kvpack calibrate wrote"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError("cannot be read", where=where, why=str(error), hint=hint) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError("is not a calibration", where=where, hint=hint)
    if manifest.get("version") != VERSION:
        raise ArtifactError(
            f"has version {manifest.get('version')}, this kvpack reads {VERSION}",
            where=where,
            hint="calibrate again with this kvpack",
        )
    for key in ("identity", "data", "linears", "kv", "files"):
        if not isinstance(manifest.get(key), dict):
            raise ArtifactError(f"lacks {key!r}", where=where, hint=hint)
    for linear, entry in manifest["linears"].items():
        if (
            not isinstance(entry, dict)
            or not entry.keys() >= _ENTRY
            or entry["file"] not in manifest["files"]
        ):
            raise ArtifactError(f"describes {linear!r} wrongly", where=where, hint=hint)
    return manifest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
