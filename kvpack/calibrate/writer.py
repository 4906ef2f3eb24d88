"""Writing a calibration folder, block by block; its layout: `kvpack.calibrate.store`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from kvpack import __version__
from kvpack.calibrate.data import Samples
from kvpack.calibrate.experts import summary
from kvpack.calibrate.identity import Identity
from kvpack.calibrate.solve import Solved
from kvpack.calibrate.store import FORMAT, MANIFEST, VERSION
from kvpack.core.atomic import new_folder
from kvpack.core.types import State
from kvpack.recipe.basis import BasisPlan, basis_state
from kvpack.recipe.kv_plan import state_name
from kvpack.recipe.sparsity import THRESHOLD

if TYPE_CHECKING:
    from torch import Tensor


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
