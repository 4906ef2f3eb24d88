"""How numbers and tokens are grouped: what codecs and their holders compute before any data exists."""

from __future__ import annotations

from kvpack.core.errors import RecipeError
from kvpack.core.types import Group, Shape


def grid_shape(shape: Shape, group: Group) -> Shape:
    """Shape of one number per group, for numbers [..., T, D].

    [..., T, ceil(D/size)] for channel groups, [..., T/size, D] for token groups, [..., 1, D] where
    a token group has the size 0 (and [..., 0, D] for no tokens).

    Raises:
        RecipeError: the tokens do not fill whole groups.
    """
    *outer, tokens, channels = shape
    if group.axis == "channel":
        return (*outer, tokens, -(-channels // (group.size or channels)))
    if group.size and tokens % group.size:
        raise RecipeError(
            f"{tokens} tokens (or rows) cannot be split into groups of {group.size}",
            hint="choose a group size that divides them, or group along channels",
        )
    return (*outer, tokens // group.size if group.size else min(tokens, 1), channels)


def bounded_block(group: Group) -> int:
    """Tokens that are encoded together: `size` of a token group, else 1.

    Raises:
        RecipeError: a token group without a size.
    """
    if group == Group("token", 0):
        raise RecipeError("a group over all tokens has no end", hint="give the group a size")
    return group.size if group.axis == "token" else 1


def joint_segment(block: int, *segments: int) -> int:
    """Whole blocks that fit into the shortest of `segments`; those of 0 do not count.

    Raises:
        RecipeError: not even one block fits.
    """
    shortest = min((s for s in segments if s), default=0)
    if 0 < shortest < block:
        raise RecipeError(
            f"a segment of {shortest} tokens does not hold one whole block of {block}",
            why="the codecs that are combined here encode different numbers of tokens together",
            hint="choose sizes that divide each other",
        )
    return shortest // block * block
