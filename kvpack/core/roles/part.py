"""What every part shares: it may ask for statistics and turn them into state."""

from __future__ import annotations

from kvpack.core.types import Shape, Stat, State, Stats, TensorSpec


class Part:
    """What all parts share: they may ask for statistics and turn them into state."""

    def requires(self) -> frozenset[Stat]:
        """Statistics that `fit` needs; none by default."""
        return frozenset()

    def fit(self, stats: Stats) -> State:
        """Turn the statistics of one layer into this part's state for it."""
        return {}

    def state_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """Shapes of the state that `fit` returns for an input [..., K, T, D]; empty by default."""
        return {}

    def for_rows(self, rows: int) -> Part:
        """This part, knowing that it will be fitted on `rows` tokens; itself by default.

        Raises:
            RecipeError: it needs more than that.
        """
        return self
