"""Where results are kept that can be made again: the platform's folder for caches."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "KVPACK_CACHE"
"""Environment variable that names another folder."""


def cache_dir(chosen: Path | None = None) -> Path:
    """`chosen`, or $KVPACK_CACHE, or kvpack's folder below the user's caches.

    That is $XDG_CACHE_HOME or ~/.cache on Linux, ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows.
    """
    if chosen is not None:
        return chosen
    named = os.environ.get(VARIABLE, "")
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "") or str(Path.home() / "AppData" / "Local")
        return Path(base) / "kvpack" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "kvpack"
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "kvpack"
