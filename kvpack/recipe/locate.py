"""Finding recipe files: a path first, then a bundled name, with or without ``.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvpack.core.data_files import data_dir
from kvpack.core.errors import RecipeError
from kvpack.recipe.build import suggest
from kvpack.recipe.yaml_lines import MAX_BYTES


@dataclass(frozen=True)
class RecipeFile:
    """A recipe's text, and the name under which messages speak of it."""

    path: Path
    label: str
    text: str


def bundled() -> dict[str, Path]:
    """Recipes that ship with kvpack, by name; fragments as ``fragments/<name>``."""
    folder = data_dir("recipes")
    found = {p.relative_to(folder).with_suffix("").as_posix(): p for p in folder.rglob("*.yaml")}
    return dict(sorted(found.items()))


def split_variant(reference: str) -> tuple[str, str | None]:
    """``kivi@4bit`` -> ("kivi", "4bit"); an existing path with an @ in its name stays whole."""
    name, at, variant = reference.rpartition("@")
    return (name, variant) if at and name and not Path(reference).exists() else (reference, None)


def read(name: str, beside: RecipeFile | None = None, where: str = "") -> RecipeFile:
    """Find and read a recipe.

    Args:
        name: path or bundled name, without variant.
        beside: the recipe whose `extends` names this one; paths are relative to its folder, and
            a recipe that extends its own name means the bundled one.
        where: place of the reference, for messages.

    Raises:
        RecipeError: not found, unreadable, too large, or not UTF-8.
    """
    path = _path(name, beside)
    if path is None:
        known = list(bundled())
        raise RecipeError(
            f"no recipe {name!r}: neither a file nor a bundled recipe{suggest(name, known)}",
            where=where,
            hint=f"bundled: {', '.join(n for n in known if not n.startswith('fragments/'))}",
        )
    own = path in bundled().values()
    label = path.relative_to(data_dir("recipes")).as_posix() if own else str(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"larger than {MAX_BYTES // 1024} KiB", where=label)
        return RecipeFile(path, label, path.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise RecipeError(f"byte {error.start} is not UTF-8 text", where=label) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=label) from None


def _path(name: str, beside: RecipeFile | None) -> Path | None:
    folder = beside.path.parent if beside else Path()
    for candidate in (folder / name, folder / f"{name}.yaml"):
        if candidate.is_file() and not (beside and candidate.resolve() == beside.path.resolve()):
            return candidate
    found = bundled().get(name.removesuffix(".yaml"))
    return found.resolve() if found else None
