"""The multiple-choice knapsack: one option per item, least total loss within a total size.

Items are added one at a time to a list of states (size, loss) of which none is both larger and no
better than another. That is exact, as the rest of a solution depends on the size so far only
(Nemhauser and Ullmann, 1969). Should the list outgrow a limit, states of nearly equal size are
thinned out; sizes stay exact then, too, and only the loss may be slightly above the least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STATES = 1 << 14
"""States that are kept; below, the answer is exact."""
_MEMORY = 1 << 26
"""States that are remembered over all items, to find the way back."""


def choose(
    sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], capacity: int, states: int = STATES
) -> list[int] | None:
    """The option of every item.

    Args:
        sizes: per item, the size of each of its options; whole numbers, 0 or more.
        losses: per item, their losses, finite.
        capacity: the most that the sizes of the chosen options may add up to.
        states: see `STATES`.

    Returns:
        Indices of options, of equally good solutions a smallest one; None when even the smallest
        options do not fit.
    """
    states = max(2, min(states, _MEMORY // max(1, len(sizes))))
    rest = sum(min(options) for options in sizes)
    if rest > capacity:
        return None
    size, loss = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[Tensor, Tensor]] = []
    for item_sizes, item_losses in zip(sizes, losses, strict=True):
        rest -= min(item_sizes)
        grown = (size[:, None] + torch.tensor(item_sizes)).flatten()
        worse = (loss[:, None] + torch.tensor(item_losses, dtype=torch.float64)).flatten()
        kept = _undominated(grown, worse, capacity - rest, states)
        size, loss = grown[kept], worse[kept]
        options = len(item_sizes)
        steps.append(((kept // options).int(), (kept % options).short()))
    return _way_back(steps, int(loss.argmin()))


def _undominated(size: Tensor, loss: Tensor, limit: int, states: int) -> Tensor:
    """Indices of the states that fit and that no other beats, by size; at most about `states`."""
    order = (size <= limit).nonzero()[:, 0]
    order = order[loss[order].argsort(stable=True)]
    order = order[size[order].argsort(stable=True)]
    lowest = loss[order].cummin(0).values
    better = torch.ones(len(order), dtype=torch.bool)
    better[1:] = loss[order][1:] < lowest[:-1]
    order = order[better]
    if len(order) <= states:
        return order
    found = size[order]
    cell = ((found - found[0]).double() / float(found[-1] - found[0]) * (states - 1)).long()
    last = torch.ones(len(order), dtype=torch.bool)
    last[:-1] = cell[1:] != cell[:-1]
    last[0] = True  # the smallest state: whatever follows will fit behind it
    return order[last]


def _way_back(steps: Sequence[tuple[Tensor, Tensor]], state: int) -> list[int]:
    chosen = []
    for parents, options in reversed(steps):
        chosen.append(int(options[state]))
        state = int(parents[state])
    return chosen[::-1]
