"""A synthetic model and its artifact, through the real pipeline."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from kvpack.bench.shapes import Shape
from kvpack.bench.synthetic import synthesise
from kvpack.core.progress import SILENT, Progress
from kvpack.pipeline import export, make_plan


@contextmanager
def synthetic_pair(
    shape: Shape,
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    keep: Path | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Iterator[tuple[Path, Path]]:
    """Folders of a model with random weights and of its artifact, gone afterwards unless kept.

    Args:
        shape: of the model.
        recipe: name or path; one that needs calibration is calibrated.
        overrides: as of `--set`.
        keep: folder for both; a model of this shape and seed that is there is used again, the artifact
            is made anew. Without it, a temporary folder (`TMPDIR` moves it).
        seed: of the weights.
        progress: told about every stage.

    Raises:
        UsageError: `keep` holds another model.
        ResourceError: the disk is too small.
        RecipeError: the recipe is wrong, or does not suit the shape.
    """
    from kvpack.recipe.load import load

    load(recipe, overrides)  # a typo is answered before gigabytes are written
    with _folder(keep) as folder:
        source = synthesise(shape, folder / "source", seed=seed, progress=progress)
        artifact = folder / f"artifact-{_slug(recipe)}"
        export(make_plan(source, recipe, overrides), artifact, force=True, progress=progress)
        yield source, artifact


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        yield keep
        return
    with TemporaryDirectory(prefix="kvpack-bench-") as scratch:
        yield Path(scratch)


def _slug(recipe: str) -> str:
    """A recipe's name as part of a folder's."""
    name = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe
    return re.sub(r"[^A-Za-z0-9.@-]+", "-", name)
