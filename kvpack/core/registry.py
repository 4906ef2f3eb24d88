"""Finding parts: the file name is the kind, the folder is the role.

`kind: hadamard` under a list of transforms is `kvpack/parts/transforms/hadamard.py`, and the part
is the class `Hadamard` in it. There is no table to edit: listing the parts is listing the folder.
Other packages add parts through the entry-point group ``kvpack.parts``, under the name
``<role>.<kind>`` and pointing at the class.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from importlib import metadata

from kvpack.core.errors import RecipeError
from kvpack.core.roles import ROLES, Part


def class_name(kind: str) -> str:
    """`sink_recent` -> `SinkRecent`."""
    return "".join(word.capitalize() for word in kind.split("_"))


@functools.cache
def _external() -> dict[str, metadata.EntryPoint]:
    return {e.name: e for e in metadata.entry_points(group="kvpack.parts")}


def singular(role: str) -> str:
    """Name of one part of a role: "codecs" -> "codec"."""
    return "policy" if role == "policies" else role[:-1]


@functools.cache
def _own(role: str) -> frozenset[str]:
    package = importlib.import_module(f"kvpack.parts.{role}")
    return frozenset(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def kinds(role: str) -> list[str]:
    """Names of all parts of a role, sorted."""
    other = {name.partition(".")[2] for name in _external() if name.startswith(f"{role}.")}
    return sorted(_own(role) | other)


def find(role: str, kind: str) -> type[Part]:
    """The class of a part.

    Raises:
        RecipeError: no part of that role has the name; the message lists and suggests.
    """
    if f"{role}.{kind}" in _external():
        part: type[Part] = _external()[f"{role}.{kind}"].load()
    elif kind in kinds(role):
        part = getattr(importlib.import_module(f"kvpack.parts.{role}.{kind}"), class_name(kind))
    else:
        close = difflib.get_close_matches(kind, kinds(role), n=1)
        guess = f"did you mean {close[0]!r}? " if close else ""
        raise RecipeError(
            f"no {singular(role)} is called {kind!r}", hint=f"{guess}{role}: {', '.join(kinds(role))}"
        )
    if not issubclass(part, ROLES[role]):
        raise RecipeError(f"{part.__module__}.{part.__qualname__} is not a {ROLES[role].__name__}")
    return part


def kind_of(part: Part) -> str:
    """The kind under which a part is found: the name of its file."""
    return type(part).__module__.rpartition(".")[2]
