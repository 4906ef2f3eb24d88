"""Gradients of the language-model loss with respect to keys and values, in bounded memory.

One pass forward keeps the hidden states between blocks in files. The loss is taken at the head, a
piece of the text at a time, and carried back through the blocks from the last to the first, each of
which is run again to be differentiated. So no more than one block, one sample's activations of it
and the gradients of the hidden states are in memory, as with gradient checkpointing at every block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from kvpack.calibrate.hooks import Recording, logits, record, run_block
from kvpack.core.atomic import require_space
from kvpack.core.errors import SourceError
from kvpack.core.progress import SILENT, Progress
from kvpack.models.view import ModelView, Reader
from kvpack.models.weights import SourceReader
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

LOGIT_ELEMENTS = 1 << 24
"""Logits that are held at a time."""


@dataclass(frozen=True)
class Gradients:
    """Files of one pass, mapped into memory: keys (after RoPE) and values [N, K, T, D] by layer."""

    keys: dict[int, Tensor]
    values: dict[int, Tensor]

    def of(self, layer: int, part: slice) -> tuple[Tensor, Tensor]:
        """Gradients of the samples `part` with respect to keys and values, float32 [B, K, T, D]."""
        return self.keys[layer][part].float(), self.values[layer][part].float()


def sweep(
    view: ModelView,
    reader: Reader,
    tokens: Tensor,
    folder: Path,
    layers: Collection[int],
    progress: Progress = SILENT,
) -> Gradients:
    """Differentiate the mean loss per predicted token, summed over the samples.

    Args:
        view: the empty model; it is empty again afterwards.
        reader: gives the original weights, which compute in float32.
        tokens: samples [N, T]; every token but the first of a sample is predicted.
        folder: existing folder for the hidden states of all blocks and the gradients: per token
            (L + 1) C + 2 l K D numbers for l wanted layers, bfloat16 for bfloat16 models, else float32.
        layers: those whose gradients are wanted.
        progress: told about every block, twice.

    Raises:
        ResourceError: the disk cannot take the files.
        SourceError: the model computes NaN or Inf.
    """
    run = GradientSweep(view, reader, tokens, folder, progress)
    require_space(folder / "hidden", run.nbytes(layers))
    run.forward()
    run.head()
    return run.backward(layers)


@contextmanager
def gradients_for(
    plan: Plan, view: ModelView, tokens: Tensor, folder: Path, progress: Progress = SILENT
) -> Iterator[Gradients | None]:
    """The gradients that the parts of a plan ask for, None where they ask for none.

    Their files are in `folder` until the context is left.
    """
    wanted = [kv.attention.layer for kv in plan.kv if _asked(kv)]
    if not wanted:
        yield None
        return
    with TemporaryDirectory(prefix="gradients-", dir=folder) as scratch:
        yield sweep(view, SourceReader.of(plan.model), tokens, Path(scratch), wanted, progress)


def _asked(kv: KVLayerPlan) -> bool:
    parts = (part for chain in kv.chains.values() for part in chain.parts)
    return any(stat.of == "gradient" for part in parts for stat in part.requires())


class GradientSweep:
    """One pass: sample by sample within a block, block by block."""

    def __init__(
        self, view: ModelView, reader: Reader, tokens: Tensor, folder: Path, progress: Progress
    ) -> None:
        self.view, self.reader, self.tokens = view, reader, tokens
        self.folder, self.progress = folder, progress
        self.dtype = torch.bfloat16 if view.dtype == torch.bfloat16 else torch.float32
        self.blocks = len(view.blocks)
        self.recording: Recording
        self.hidden: list[Tensor] = []

    def nbytes(self, layers: Collection[int]) -> int:
        """Bytes of all files."""
        spec = self.view.spec
        planes = sum(2 * spec.attention[x].kv_heads * spec.attention[x].head_dim for x in layers)
        per_token = (self.blocks + 1) * spec.hidden_size + planes
        return self.tokens.numel() * per_token * self.dtype.itemsize

    def forward(self) -> None:
        """Keep what enters every block, and what leaves the last."""
        shape = (*self.tokens.shape, self.view.spec.hidden_size)
        self.hidden = [self._file(f"hidden-{i}", shape) for i in range(self.blocks + 1)]
        self.view.load_outer(self.reader, self.view.base_tensors())
        for sample, row in enumerate(self.tokens):
            self.recording = record(self.view, row[None])
            self.hidden[0][sample] = self.recording.hidden[0]
        self.view.free_outer()
        for layer in range(self.blocks):
            self._tell(layer, f"forward, block {layer}")
            with self._block(layer):
                for sample in range(len(self.tokens)):
                    result = run_block(self.view, layer, self._entering(layer, sample), self.recording)
                    self.hidden[layer + 1][sample] = result[0]
            self._check(self.hidden[layer + 1], layer)

    def head(self) -> None:
        """Gradients of the loss with respect to what leaves the last block."""
        self.gradient = torch.zeros(self.hidden[0].shape, dtype=torch.float32)
        self.view.load_outer(self.reader, self.view.head_tensors(), torch.float32)
        predicted = self.tokens.shape[1] - 1
        step = max(1, LOGIT_ELEMENTS // self.view.spec.vocab_size)
        for sample in range(len(self.tokens)):
            for start in range(0, predicted, step):
                part = slice(start, min(predicted, start + step))
                self.gradient[sample, part] = self._through_head(sample, part)
        self.view.free_outer()

    def _through_head(self, sample: int, part: slice) -> Tensor:
        """Gradient of a piece's share of the loss with respect to its hidden states [T, C]."""
        hidden = self._entering(self.blocks, sample)[:, part].requires_grad_()
        with torch.enable_grad():
            loss = self._loss(hidden, sample, part)
        return torch.autograd.grad(loss, hidden)[0][0]

    def _loss(self, hidden: Tensor, sample: int, part: slice) -> Tensor:
        found = logits(self.view, hidden)[0].float()
        wanted = self.tokens[sample, part.start + 1 : part.stop + 1]
        loss = torch.nn.functional.cross_entropy(found, wanted, reduction="sum")
        return loss / (self.tokens.shape[1] - 1)

    def backward(self, layers: Collection[int]) -> Gradients:
        """Carry the gradients to the first of `layers`."""
        done = Gradients({}, {})
        for layer in range(self.blocks - 1, min(layers, default=self.blocks) - 1, -1):
            self._tell(2 * self.blocks - 1 - layer, f"backward, block {layer}")
            with self._block(layer):
                for sample in range(len(self.tokens)):
                    key, value = self._through(layer, sample)
                    if layer in layers:
                        self._write(done.keys, "key", layer, sample, key)
                        self._write(done.values, "value", layer, sample, value)
        self._tell(2 * self.blocks, "")
        return done

    def _through(self, layer: int, sample: int) -> tuple[Tensor, Tensor]:
        """Replace a sample's gradient behind a block by the one before it; those inside."""
        seen: list[Tensor] = []
        hidden = self._entering(layer, sample).requires_grad_()
        with torch.enable_grad():
            result = run_block(
                self.view, layer, hidden, self.recording, lambda key, value: seen.extend((key, value))
            )
        before, key, value = torch.autograd.grad(result, (hidden, *seen), self.gradient[sample][None])
        self.gradient[sample] = before[0]
        return key[0], value[0]

    def _entering(self, layer: int, sample: int) -> Tensor:
        return self.hidden[layer][sample][None].float()

    def _write(self, kept: dict[int, Tensor], name: str, layer: int, sample: int, gradient: Tensor) -> None:
        if layer not in kept:
            kept[layer] = self._file(f"{name}-{layer}", (len(self.tokens), *gradient.shape))
        kept[layer][sample] = gradient

    def _file(self, name: str, shape: tuple[int, ...]) -> Tensor:
        size = torch.Size(shape).numel()
        flat = torch.from_file(str(self.folder / name), shared=True, size=size, dtype=self.dtype)
        return flat.view(shape)

    @contextmanager
    def _block(self, layer: int) -> Iterator[None]:
        self.view.load_block(layer, self.reader, torch.float32)
        yield
        self.view.free_block(layer)

    def _check(self, hidden: Tensor, layer: int) -> None:
        if not bool(torch.isfinite(hidden).all()):
            raise SourceError(
                f"decoder block {layer} computes NaN or Inf on the calibration text",
                where=str(self.view.spec.path),
                hint="check that the model works in transformers, with this text",
            )

    def _tell(self, done: int, what: str) -> None:
        self.progress("gradients", done, 2 * self.blocks, what)
