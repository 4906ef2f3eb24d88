"""Data that ships with the package: the bundled recipes and the calibration sets.

In a checkout they are folders beside `kvpack/`; in a wheel they are inside it, under `_data`.
"""

from __future__ import annotations

from pathlib import Path

from kvpack.core.errors import KvpackError

PACKAGE = Path(__file__).resolve().parent.parent


def data_dir(name: str) -> Path:
    """Folder of bundled data, e.g. ``data_dir("recipes")``.

    Raises:
        KvpackError: the installation lacks the folder.
    """
    for folder in (PACKAGE / "_data" / name, PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise KvpackError(f"this installation has no {name!r} data", hint="reinstall kvpack")
