"""All samples on their way through the decoder blocks: where they are, and running them through one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from kvpack.calibrate.collect import Chain, InputStats
from kvpack.calibrate.gradients import Gradients
from kvpack.calibrate.hooks import Recording, coded, record, run_block, turned, watched
from kvpack.core.errors import SourceError
from kvpack.models.view import ModelView
from kvpack.recipe.plan import WeightPlan

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, WeightPlan]
FEW = 32
"""Tokens of a trial that shows which layers a block calls."""


class Passes:
    """The hidden states of all samples in front of a block, in batches.

    Args:
        view: the model.
        tokens: ids [N, T].
        batch: samples per forward.
        gradients: of keys and values, where a part wants them.
    """

    def __init__(self, view: ModelView, tokens: Tensor, batch: int, gradients: Gradients | None) -> None:
        self.view, self.tokens, self.batch, self.gradients = view, tokens, batch, gradients
        self._recordings: dict[int, Recording] = {}

    def embed(self) -> None:
        """Make the hidden states [N, T, C] that enter block 0; float16 is too narrow to keep them in."""
        dtype = torch.bfloat16 if self.view.dtype == torch.bfloat16 else torch.float32
        self.hidden = torch.empty(*self.tokens.shape, self.view.spec.hidden_size, dtype=dtype)
        for part in self.batches():
            recording = record(self.view, self.tokens[part])
            self.hidden[part] = recording.hidden.to(dtype)
            self._recordings.setdefault(len(recording.hidden), recording)
        self._few = record(self.view, self.tokens[:1, :FEW])

    def batches(self) -> Iterator[slice]:
        """The samples of each batch."""
        for start in range(0, len(self.tokens), self.batch):
            yield slice(start, min(start + self.batch, len(self.tokens)))

    def run(
        self,
        layer: int,
        weights: Weights,
        chains: Mapping[str, Chain],
        inputs: InputStats,
        *,
        keep: bool,
        packed: Weights | None = None,
    ) -> None:
        """Run every sample through a block.

        Args:
            layer: the block; it is loaded.
            weights: its packed layers.
            chains: measure keys and values.
            inputs: measures inputs of layers.
            keep: the outputs replace the hidden states, which asks for everything as the artifact has it.
            packed: those of `weights` whose input is approximated as in the artifact; by default all
                with `keep`, else none.
        """
        modules = {name: self.view.module(name) for name in inputs.wanted}
        inputs.stop = not keep and not any(chain.passes for chain in chains.values())
        packed = (weights if keep else {}) if packed is None else packed
        with self.watching(layer, chains):
            for part in self.batches():
                with turned(self.view, weights), inputs.attached(modules), coded(self.view, packed):
                    result = self.through(layer, part, chains=chains)
                if keep:
                    self.keep(layer, part, result)
        for chain in chains.values():
            chain.close()

    def watching(self, layer: int, chains: Mapping[str, Chain]) -> AbstractContextManager[None]:
        """Show a block's queries to the chains that look at them."""

        def queries(query: Tensor) -> None:
            for chain in chains.values():
                chain.see_queries(query)

        wanted = any(chain.wants("query") for chain in chains.values())
        return watched(self.view, layer, queries if wanted else None)

    def through(self, layer: int, part: slice, *, chains: Mapping[str, Chain]) -> Tensor:
        """What a block makes of one batch, [B, T, C]; chains see its keys and values."""

        def seen(key: Tensor, value: Tensor) -> None:
            if chains:
                measured = any(chain.wants("gradient") for chain in chains.values())
                found = self.gradients.of(layer, part) if self.gradients and measured else (None, None)
                chains["key"].see(key, found[0])
                chains["value"].see(value, found[1])
                if "index" in chains:
                    chains["index"].see(key, found[0])

        hidden = self.hidden[part].float()
        return run_block(self.view, layer, hidden, self._recordings[len(hidden)], seen)

    def keep(self, layer: int, part: slice, result: Tensor) -> None:
        """Let a batch enter the next block with what this one made of it.

        Raises:
            SourceError: that is NaN or Inf.
        """
        if not bool(torch.isfinite(result).all()):
            raise SourceError(
                f"decoder block {layer} computes NaN or Inf on the calibration text",
                where=str(self.view.spec.path),
                hint="check that the model works in transformers, with this text",
            )
        self.hidden[part] = result.to(self.hidden.dtype)

    def sample(self, layer: int, weights: Weights) -> Tensor:
        """What a block, as it is now, makes of the first batch."""
        with turned(self.view, weights):
            return self.through(layer, next(self.batches()), chains={})

    def trial(self, layer: int) -> None:
        """Run a few tokens through a block, for whoever watches it."""
        run_block(self.view, layer, self.hidden[:1, :FEW].float(), self._few)
