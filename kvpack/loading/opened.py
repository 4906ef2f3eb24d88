"""An artifact that `load` has opened and is hashing, on its way through transformers to the quantizer."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvpack.artifact.damage import check_hashes
from kvpack.artifact.reader import Artifact
from kvpack.core.ahead import in_background


@dataclass(frozen=True)
class Opened:
    """An artifact of the right structure; `sound.result()` raises ArtifactError where its bytes are wrong."""

    artifact: Artifact
    sound: Future[None]

    @classmethod
    def of(cls, folder: Path) -> Opened:
        """Open the artifact in a folder and begin to hash it, which takes as long as all else of loading.

        Everything but the weights is hashed at once: transformers reads it next, and an error ends the
        work before the rest has begun.

        Raises:
            ArtifactError: it is incomplete, too new, or not as its manifest says.
        """
        artifact = Artifact.open(folder, check="structure")
        weights = [name for name in artifact.manifest.files if name.endswith(".safetensors")]
        others = artifact.manifest.files.keys() - set(weights)
        check_hashes(folder, artifact.manifest, files=sorted(others))
        of_weights = partial(check_hashes, folder, artifact.manifest, files=weights, mapped=True)
        return cls(artifact, in_background(of_weights))


_HANDED = ContextVar[Opened | None]("_HANDED", default=None)


@contextmanager
def handed_over(opened: Opened) -> Iterator[None]:
    """Let the quantizer take `opened` instead of opening the folder again."""
    token = _HANDED.set(opened)
    try:
        yield
    finally:
        _HANDED.reset(token)


def opened(folder: Path) -> Opened:
    """What was handed over for a folder, else what is opened now; errors as of `Opened.of`."""
    found = _HANDED.get()
    return found if found is not None and found.artifact.path == folder else Opened.of(folder)
