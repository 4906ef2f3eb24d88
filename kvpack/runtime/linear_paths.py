"""Which way a packed linear layer computes: on its codes for few rows, through decoded weights for many.

Where the two meet depends on the processor, the codec and the shape. It is measured the first time
that a number of rows in question comes up, on the layer that asks, and kept in a file below
`kvpack.core.cache_dir` for the machine.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from kvpack import __version__
from kvpack.core.cache_dir import cache_dir
from kvpack.core.errors import KvpackError
from kvpack.core.new_file import write_text
from kvpack.kernels import choice

if TYPE_CHECKING:
    from kvpack.runtime.linear import PackedTensors

MOST_ROWS = 64
"""With more rows weights are always decoded."""
FILE = "linear-paths.json"
_FEW, _SOME = 2, 16
"""Numbers of rows that are timed."""

Products = Callable[[Tensor], Tensor]


def on_codes(weight: PackedTensors, x: Tensor) -> bool:
    """Whether the rows `x` [N, C] are multiplied with the codes of a weight."""
    rows, codec = x.shape[0], weight.packed.codec
    if rows > MOST_ROWS or x.dtype == torch.float64 or codec.exact or not codec.reads_codes:
        return False
    if not choice.found(x.device.type).used:
        return False
    return rows <= 1 or rows <= _most_rows(weight, x)


def dense_dtype(weight: PackedTensors, x: Tensor) -> torch.dtype:
    """In which dtype decoded weights are multiplied with `x`: its own, or float32 where that is faster.

    Processors without instructions for 16-bit floats multiply them many times slower. A weight that is
    stored exactly is multiplied as the source does it.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16) or weight.packed.codec.exact:
        return x.dtype
    name = str(x.dtype).removeprefix("torch.")
    faster = _remembered(f"{name} matrix products", lambda: _float32_is_faster(x.dtype))
    return torch.float32 if faster else x.dtype


def _most_rows(weight: PackedTensors, x: Tensor) -> int:
    R, C = (1 << (size - 1).bit_length() for size in weight.packed.shape)
    what = f"{weight.packed.codec!r} to {R} x {C}, {x.dtype}"
    return _remembered(what, lambda: _crossing(weight, x))


def _crossing(weight: PackedTensors, x: Tensor) -> int:
    """The most rows for which codes are faster, from two numbers of rows and straight lines between."""
    lines = []
    for products in (weight.products_of_codes, weight.products_of_decoded):
        few, some = (_seconds(products, x[:1].expand(rows, -1).contiguous()) for rows in (_FEW, _SOME))
        slope = max(0.0, (some - few) / (_SOME - _FEW))
        lines.append((few - slope * _FEW, slope))
    (codes, per_row), (decoded, dense_per_row) = lines
    if per_row <= dense_per_row:
        return MOST_ROWS if codes <= decoded else 1
    return int(min(MOST_ROWS, max(1.0, (decoded - codes) / (per_row - dense_per_row))))


def _seconds(products: Products, x: Tensor) -> float:
    """The shortest of three runs: whatever else the machine does only makes it longer."""
    found = []
    products(x)
    for _ in range(3):
        start = time.perf_counter()
        products(x)
        found.append(time.perf_counter() - start)
    return min(found)


def _float32_is_faster(dtype: torch.dtype) -> int:
    weight, x = torch.ones((1024, 1024), dtype=dtype), torch.ones((256, 1024), dtype=dtype)
    narrow = _seconds(lambda rows: functional.linear(rows, weight), x)
    wide = weight.float()
    return int(_seconds(lambda rows: functional.linear(rows.float(), wide).to(dtype), x) < narrow)


_FOUND: dict[str, int] = {}
"""What this process knows, by machine and question."""


def _remembered(what: str, measure: Callable[[], int]) -> int:
    key = f"{what}, {torch.get_num_threads()} threads"
    if key not in _FOUND:
        _FOUND.update({name: n for name, n in _read().items() if name not in _FOUND})
    if key not in _FOUND:
        _FOUND[key] = measure()
        _write()
    return _FOUND[key]


@functools.cache
def _machine() -> str:
    """What makes measurements comparable: processor, torch and kvpack."""
    model = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}, kvpack {__version__}"


def _read() -> dict[str, int]:
    """What the file says of this machine; nothing where it cannot be read."""
    try:
        held = json.loads((cache_dir() / FILE).read_text(encoding="utf8"))
        return {str(key): int(value) for key, value in held[_machine()].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write() -> None:
    """Keep what was measured; a machine that lets nothing be kept measures once per process."""
    with suppress(OSError, KvpackError):
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({_machine(): {**_read(), **_FOUND}}, indent=1, sort_keys=True)
        write_text(folder / FILE, text + "\n")
