"""The order in which classes of channels are stored, remembered as long as the tensor that tells it.

Sorting some thousand channels takes as long as a good part of a product with a vector, and every layer
would sort for every token.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kvpack.ops import bits

_KNOWN = WeakTensorKeyDictionary()


class _Order(NamedTuple):
    """What was found, and for which contents."""

    stored: Tensor
    places: Tensor
    contents: tuple[int, int, int]


def stored(classes: Tensor, channels: int) -> Tensor:
    """The channels in stored order, int64 [D]: by class, then by place.

    Args:
        classes: the class of every channel in 2 bits, uint8 [ceil(D/4)].
        channels: D.
    """
    return _order(classes, channels).stored


def places(classes: Tensor, channels: int) -> Tensor:
    """Where every channel is in stored order, int64 [D]; arguments as of `stored`."""
    return _order(classes, channels).places


def _order(classes: Tensor, channels: int) -> _Order:
    if classes.is_inference():  # these do not count their changes
        return _sorted(classes, channels, (0, 0, 0))
    contents = (channels, classes.data_ptr(), classes._version)
    known = _KNOWN.get(classes)  # type: ignore[no-untyped-call]
    if known is None or known.contents != contents:
        known = _KNOWN[classes] = _sorted(classes, channels, contents)
    return known  # type: ignore[no-any-return]  # torch leaves it untyped


def _sorted(classes: Tensor, channels: int, contents: tuple[int, int, int]) -> _Order:
    order = bits.unpack(classes, 2, channels).argsort(stable=True)
    return _Order(order, order.argsort(), contents)
