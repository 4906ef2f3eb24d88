"""A checkpoint of a stated shape with random weights, written tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpack.artifact.tensor_file import TensorFile
from kvpack.bench.byte_tokenizer import tokenizer_files
from kvpack.bench.shapes import Shape
from kvpack.core.errors import ResourceError, UsageError
from kvpack.core.lazy import torch
from kvpack.core.progress import SILENT, Progress
from kvpack.core.types import TensorSpec
from kvpack.models.source import SINGLE

if TYPE_CHECKING:
    from torch import Tensor

MARK = "synthetic.txt"
"""The file that tells a folder of ours from one that holds somebody's model; written last."""


def synthesise(shape: Shape, folder: Path, *, seed: int = 0, progress: Progress = SILENT) -> Path:
    """Write a model of `shape` with seeded random weights to `folder`, unless it is there already.

    Matrices [R, C] are normal with variance 1 / C, gains of norms are 1. Memory is that of one tensor.

    Args:
        shape: what to write.
        folder: where; made, or empty, or holding what was synthesised before.
        seed: of the weights.
        progress: told about every tensor.

    Returns:
        `folder`.

    Raises:
        UsageError: the folder holds something else.
        ResourceError: the disk is too small.
    """
    mark = _mark(shape, seed)
    if _holds(folder, mark):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _check_room(folder, shape.nbytes)
    _write_weights(folder / SINGLE, shape.tensors(), seed, progress)
    for name, content in {"config.json": shape.config(), **tokenizer_files()}.items():
        _write_json(folder / name, content)
    (folder / MARK).write_text(mark, encoding="utf-8")
    return folder


def _mark(shape: Shape, seed: int) -> str:
    return f"Random weights, written by kvpack bench: {shape}, seed {seed}.\n"


def _holds(folder: Path, mark: str) -> bool:
    """Whether the very model is there."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    found = folder / MARK
    if found.is_file() and found.read_text(encoding="utf-8") == mark:
        return True
    raise UsageError(
        "holds something else already",
        where=str(folder),
        why="a synthetic model would be written there",
        hint="give another folder with --keep, or remove it",
    )


def _check_room(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise ResourceError(
            f"{nbytes:,} bytes are needed, {free:,} are free",
            where=str(folder),
            hint="use --keep or TMPDIR for another disk, or fewer --layers",
        )


def _write_weights(path: Path, specs: Mapping[str, TensorSpec], seed: int, progress: Progress) -> None:
    generator = torch.Generator().manual_seed(seed)
    with TensorFile(path, specs) as file:
        for done, (name, spec) in enumerate(specs.items()):
            progress("synthesise", done, len(specs), name)
            file.write(name, _random(spec, generator))
        file.close()
    progress("synthesise", len(specs), len(specs))


def _random(spec: TensorSpec, generator: Any) -> Tensor:
    made = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
    if len(spec.shape) == 1:
        return made.fill_(1)
    return made.normal_(0.0, spec.shape[-1] ** -0.5, generator=generator)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
