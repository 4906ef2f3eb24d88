"""The calibration folder: written once, read strictly.

``calibration.json`` names every other file with its hash. ``block-00000.safetensors`` and so on
hold, per decoder block, solved payloads (``<linear>.<payload tensor>``) and the states of KV
transforms (``layers.<l>.<plane>.<i>.<name>``); ``outer.safetensors`` what stands behind the blocks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from kvpack import __version__
from kvpack.calibrate.data import Samples
from kvpack.calibrate.experts import summary
from kvpack.calibrate.identity import Identity, identity
from kvpack.calibrate.solve import Solved
from kvpack.core.atomic import new_folder
from kvpack.core.errors import ArtifactError, CalibrationMismatch
from kvpack.core.types import State
from kvpack.recipe.basis import BasisPlan, basis_state
from kvpack.recipe.plan import Plan, state_name
from kvpack.recipe.sparsity import THRESHOLD

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "calibration.json"
_ENTRY = {"file", "shape", "tensors", "relative_output_error"}
FORMAT, VERSION = "kvpack-calibration", 1


class CalibrationWriter:
    """Collects results and writes them block by block; used as a context manager."""

    def __init__(self, out: Path, *, force: bool = False) -> None:
        self._out, self._force = out, force
        self._stack = ExitStack()
        self._pending: dict[str, Tensor] = {}
        self._files: dict[str, str] = {}
        self._linears: dict[str, dict[str, Any]] = {}
        self._kv: dict[str, dict[str, int]] = {}
        self._experts: dict[str, int] = {}
        self._thresholds: dict[str, dict[str, Any]] = {}
        self._waiting: list[dict[str, Any]] = []

    def __enter__(self) -> CalibrationWriter:
        self._folder = self._stack.enter_context(new_folder(self._out, force=self._force))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @property
    def folder(self) -> Path:
        """Where the files are until all are written; whatever else is put there must be gone by then."""
        return self._folder

    def add_states(self, layer: int, plane: str, states: Sequence[State]) -> None:
        """Keep the states of a plane's transforms for the next file."""
        self._kv.setdefault(str(layer), {})[plane] = len(states)
        for index, state in enumerate(states):
            self._pending.update({state_name(layer, plane, index, n): t for n, t in state.items()})

    def add_basis(self, change: BasisPlan, states: Sequence[State]) -> None:
        """Keep what a change of basis learned for the next file; its transforms' states, in order."""
        for index, state in enumerate(states):
            self._pending.update({basis_state(change.number, index, n): t for n, t in state.items()})

    def add_experts(self, tokens: Mapping[str, int]) -> None:
        """Note how many tokens were routed to each expert, by its path."""
        self._experts.update(tokens)

    def add_thresholds(self, thresholds: Mapping[str, Tensor], active: Callable[[str], float]) -> None:
        """Keep thresholds by path of their module, and what share of the numbers they let pass."""
        for module, threshold in thresholds.items():
            self._pending[f"{module}.{THRESHOLD}"] = threshold
            self._thresholds[module] = {"active": float(f"{active(module):.6g}")}
            self._waiting.append(self._thresholds[module])

    def add_payload(self, linear: str, solved: Solved) -> None:
        """Keep the codes of a linear layer for the next file."""
        error = solved.output_error
        tensors = solved.solution.tensors
        self._pending.update({f"{linear}.{n}": t for n, t in tensors.items()})
        entry = {
            "shape": list(solved.solution.payload.shape),
            "tensors": sorted(tensors),
            "relative_output_error": None if error is None else float(f"{error:.6g}"),
        }
        self._linears[linear] = entry
        self._waiting.append(entry)

    def flush(self, file: str) -> None:
        """Write what was added since the last file; nothing when that is nothing."""
        if not self._pending:
            return
        for entry in self._waiting:
            entry["file"] = file
        # Bytes, not `save_file`: its errors do not tell a full disk from anything else.
        data = save({n: t.contiguous() for n, t in sorted(self._pending.items())})
        (self._folder / file).write_bytes(data)
        self._files[file] = hashlib.sha256(data).hexdigest()
        self._pending, self._waiting = {}, []

    def add_file(self, file: str, content: bytes) -> None:
        """Write a file of another kind, which readers of the calibration may look at."""
        (self._folder / file).write_bytes(content)
        self._files[file] = hashlib.sha256(content).hexdigest()

    def finish(self, who: Identity, samples: Samples) -> None:
        """Write the manifest, last."""
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "identity": who,
            "data": {"sha256": samples.data_sha256, "tokens_sha256": samples.tokens_sha256},
            "tokens": samples.tokens.numel(),
            "versions": {
                "kvpack": __version__,
                "torch": torch.__version__,
                "transformers": metadata.version("transformers"),
            },
            "linears": self._linears,
            "kv": self._kv,
            "thresholds": self._thresholds,
            "files": self._files,
        }
        if self._experts:
            manifest["experts"] = summary(self._experts)
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        (self._folder / MANIFEST).write_text(text, encoding="utf-8")


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
        names = ("data", "samples", "sample_tokens", "seed")
        found = {**{name: who[name] for name in names}, "data_sha256": self.manifest["data"]["sha256"]}
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
