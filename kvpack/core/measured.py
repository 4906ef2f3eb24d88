"""What calibration measured for a part, checked before the part computes with it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvpack.core.errors import KvpackError
from kvpack.core.types import Stats

if TYPE_CHECKING:
    from torch import Tensor

_NOUNS = {"gram": "the Gram matrix"}


def gram_matrix(stats: Stats, channels: int, part: str) -> Tensor:
    """The Gram matrix of a layer's inputs [C, C]; errors as of `measured`."""
    return measured(stats, "gram", "gram", (channels, channels), part)


def warn_not_definite(part: str, instead: str) -> None:
    """Say that no damping made the Gram matrix positive definite, and what `part` does instead."""
    warnings.warn(
        f"{part}: the Gram matrix is not positive definite even with full damping; {instead}. "
        "More calibration text may help.",
        RuntimeWarning,
        stacklevel=3,
    )


def measured(stats: Stats, name: str, tensor: str, shape: Sequence[int], part: str) -> Tensor:
    """A tensor of one statistic.

    Args:
        stats: what the part was given.
        name: of the statistic.
        tensor: its name within the statistic.
        shape: what it must have, -1 for any length; the last axis are the layer's input channels.
        part: who asks, for messages.

    Raises:
        KvpackError: it is missing, has another shape, or is not finite.
    """
    what = f"{part} needs {_NOUNS.get(name, name)} of {shape[-1]} input channels"
    if name not in stats:
        raise KvpackError(f"{what}; it is missing", hint="calibrate with this model and recipe")
    found = stats[name][tensor]
    fits = len(found.shape) == len(shape) and all(
        want in (-1, length) for want, length in zip(shape, found.shape, strict=True)
    )
    if not fits:
        raise KvpackError(
            f"{what}; it is of shape {tuple(found.shape)}", hint="calibrate with this model and recipe"
        )
    if not bool(found.isfinite().all()):
        raise KvpackError(
            f"{what}; it holds infinities or NaN",
            hint="check the model's activations on the calibration text, e.g. run it in bfloat16",
        )
    return found
