"""How much each layer's width matters: one sweep over the uncompressed model.

One pass forward keeps the hidden states between blocks in files; on the way back, block by block,
the inputs of linear layers are measured and, where the allocator asks for it, the gradient of the
loss with respect to their outputs. A block's losses are worked out before the next is loaded, so
that one block and its statistics are in memory, as in calibration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvpack.calibrate.collect import InputStats
from kvpack.calibrate.gradients import GradientSweep
from kvpack.calibrate.hooks import run_block
from kvpack.calibrate.stats import Accumulator, accumulator
from kvpack.core.atomic import require_space
from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.progress import SILENT, Progress
from kvpack.core.registry import find, kind_of
from kvpack.core.roles import Codec
from kvpack.core.types import Group, Solution, Stat, State, Stats
from kvpack.models.view import ModelView
from kvpack.models.weights import SourceReader
from kvpack.recipe.budget import Options, with_bits
from kvpack.recipe.recipe import BudgetRecipe

if TYPE_CHECKING:
    from torch import Tensor, nn

Found = dict[str, dict[int, float]]


def sensitivities(
    options: Options,
    budget: BudgetRecipe,
    tokens: Tensor,
    folder: Path,
    *,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> Found:
    """The loss of every layer at every width it may have.

    Args:
        options: the layers that take part.
        budget: allocator and rounding.
        tokens: samples [N, T].
        folder: existing folder for the hidden states between blocks.
        trust_remote_code: let transformers run code from the model folder.
        progress: told about every block, twice.

    Raises:
        ResourceError: the disk cannot take the files.
        SourceError: the model computes NaN or Inf.
        RecipeError: a layer's codec has to learn, and cannot be rounded to.
    """
    with torch.no_grad():
        view = ModelView.build(options.plan.model, trust_remote_code=trust_remote_code)
        return _Sensitivity(options, budget, view, tokens, folder, progress).measure()


@dataclass
class _Watched:
    """Some linear layers while samples run through them: their inputs, and gradients of outputs."""

    inputs: InputStats
    kinds: frozenset[str]
    gradients: dict[tuple[str, str], Accumulator] = field(default_factory=dict)
    outputs: list[tuple[str, Tensor]] = field(default_factory=list)

    @contextmanager
    def attached(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Watch one forward pass; its outputs are kept for `differentiate`."""
        self.outputs = []

        def keep(name: str, output: Tensor) -> None:
            self.outputs.append((name, output))

        handles = [
            module.register_forward_hook(lambda m, args, output, name=name: keep(name, output))
            for name, module in modules.items()
            if self.kinds
        ]
        try:
            with self.inputs.attached(modules):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def differentiate(self, result: Tensor, hidden: Tensor, gradient: Tensor | None, scale: float) -> Tensor:
        """Gradient with respect to `hidden`; those of the outputs, times `scale`, are measured."""
        wanted = (hidden, *(output for _, output in self.outputs))
        before, *found = torch.autograd.grad(result, wanted, gradient)
        for (name, _), one in zip(self.outputs, found, strict=True):
            rows = (scale * one).reshape(1, 1, -1, one.shape[-1])
            for kind in self.kinds:
                self.gradients.setdefault((name, kind), accumulator(kind)).update(rows)
        self.outputs = []
        return before

    def of(self, name: str) -> dict[str, State]:
        """Finished statistics of a layer; empty when it never ran."""
        found = {f"output_gradient.{k}": a.state() for (n, k), a in self.gradients.items() if n == name}
        return {**self.inputs.of(name), **found}


class _Sensitivity(GradientSweep):
    """The sweep; without gradients, the way back only runs the blocks once more."""

    def __init__(
        self,
        options: Options,
        budget: BudgetRecipe,
        view: ModelView,
        tokens: Tensor,
        folder: Path,
        progress: Progress,
    ) -> None:
        super().__init__(view, SourceReader.of(options.plan.model), tokens, folder, progress)
        self.options, self.budget, self.allocator = options, budget, budget.allocator
        self.plan, self.losses = options.plan, Found()
        self.kinds = frozenset(s.kind for s in self.allocator.requires() if s.of == "output_gradient")
        self.watched = _Watched(InputStats({}), frozenset())
        self.modules: dict[str, nn.Module] = {}
        self.positions = float(tokens.shape[1] - 1)

    def measure(self) -> Found:
        """All layers."""
        require_space(self.folder / "hidden", self.nbytes(()))
        outside = {self._applied(name): name for name in self._names(None)}
        self.forward()
        if self.kinds or any(outside):
            applied = {module: name for module, name in outside.items() if module}
            self._watch(applied)
            self.head()
            self._judge(applied)
        for layer in range(self.blocks - 1, -1, -1):
            self._tell(2 * self.blocks - 1 - layer, f"sensitivities, block {layer}")
            with self._block(layer):
                inside = {name: name for name in self._names(layer)}
                self._watch(inside)
                for sample in range(len(self.tokens)):
                    self._back(layer, sample)
                self._judge(inside)
        self._tables()
        self._tell(2 * self.blocks, "")
        return {name: self.losses[name] for name in self.options.codecs}

    def _names(self, layer: int | None) -> list[str]:
        return [n for n in self.options.codecs if self.plan.weights[n].linear.layer == layer]

    def _applied(self, name: str) -> str:
        """The linear layer that multiplies by a packed weight; empty for a table that is only read."""
        applied = self.plan.model.applied(self.plan.weights[name].linear)
        return "" if applied is None else applied.name

    def _tell(self, done: int, what: str) -> None:
        self.progress("sensitivities", done, 2 * self.blocks, what)

    def _watch(self, layers: Mapping[str, str]) -> None:
        """Measure the modules that apply these packed weights from now on."""
        wanted = {}
        for module, name in layers.items():
            solver = self.plan.weights[name].solver
            own = frozenset[Stat]() if self.budget.rounding == "nearest" else solver.requires()
            wanted[module] = frozenset(s for s in self.allocator.requires() if s.of == "input") | own
        self.watched = _Watched(InputStats(wanted), self.kinds)
        self.modules = {module: self.view.module(module) for module in layers}

    def _through_head(self, sample: int, part: slice) -> Tensor:
        hidden = self._entering(self.blocks, sample)[:, part].requires_grad_()
        with torch.set_grad_enabled(bool(self.kinds)), self.watched.attached(self.modules):
            loss = self._loss(hidden, sample, part)
        if not self.kinds:
            return torch.zeros_like(hidden[0])
        return self.watched.differentiate(loss, hidden, None, self.positions)[0]

    def _back(self, layer: int, sample: int) -> None:
        """Run a sample through a loaded block; with gradients, carry its own to the block's input."""
        hidden = self._entering(layer, sample).requires_grad_()
        with torch.set_grad_enabled(bool(self.kinds)), self.watched.attached(self.modules):
            result = run_block(self.view, layer, hidden, self.recording)
        if self.kinds:
            after = self.gradient[sample][None]
            self.gradient[sample] = self.watched.differentiate(result, hidden, after, self.positions)[0]

    def _judge(self, layers: Mapping[str, str]) -> None:
        """Losses of packed weights, by the module that applies them; what never ran loses nothing."""
        for module, name in layers.items():
            stats = self.watched.of(module)
            if not stats:
                self.losses[name] = dict.fromkeys(self.options.codecs[name], 0.0)
                continue
            if self.budget.rounding == "nearest":
                self._add(name, stats)
            else:
                self._add(name, stats | self._consumers(module, layers), self.budget.rounding)

    def _add(self, name: str, stats: Stats, rounding: str = "nearest") -> None:
        """Add one use of a weight to its losses at every width."""
        known, codecs = self.losses.setdefault(name, {}), self.options.codecs[name]
        matrix = self.reader.read(self.plan.weights[name].linear.weight).float()
        losses = {bits: self._loss_of(name, matrix, codec, stats, rounding) for bits, codec in codecs.items()}
        least = min(codecs)
        if rounding == "solver_once" and losses[least] > 0:
            gained = self._loss_of(name, matrix, codecs[least], stats, "solver") / losses[least]
            losses = {bits: gained * loss for bits, loss in losses.items()}
        for bits, loss in losses.items():
            known[bits] = known.get(bits, 0.0) + loss

    def _loss_of(self, name: str, matrix: Tensor, codec: Codec, stats: Stats, rounding: str) -> float:
        """The loss at one width."""
        if rounding == "solver":
            found = self.plan.weights[name].solver.solve(matrix, codec, stats)
        else:
            codec = stand_in(codec)
            found = Solution(codec.encode(matrix, {}))
        rounded = codec.decode(found.payload, found.state, torch.float32)
        loss = self.allocator.loss(matrix, rounded, stats)
        if not 0 <= loss < float("inf"):
            raise KvpackError(f"an allocator's loss is {loss}", where=name, hint="check the weights")
        return loss

    def _consumers(self, module: str, layers: Mapping[str, str]) -> dict[str, State]:
        """The weights of all layers that are given the same input."""
        inputs = self.watched.inputs
        together = [n for m, n in layers.items() if inputs.leader(m) == inputs.leader(module)]
        rows = [self.reader.read(self.plan.weights[n].linear.weight).float() for n in together]
        return {"consumers.weight": {"weight": torch.cat(rows)}}

    def _tables(self) -> None:
        """Losses of the embedding where rows are looked up.

        What a table gives for a token is its row; errors of row v weigh by how often v is read. The
        output error is thus that of the transposed product, with the counts in the place of the
        outputs' gradients, and the gradients in that of the inputs.
        """
        for name in self._names(None):
            if self.plan.weights[name].linear.role == "embedding":
                matrix = self.reader.read(self.plan.weights[name].linear.weight).float()
                self._add(name, self._table_stats(matrix))

    def _table_stats(self, matrix: Tensor) -> dict[str, State]:
        rows, channels = matrix.shape
        often = torch.bincount(self.tokens.flatten(), minlength=rows).double()
        count = torch.tensor(int(often.sum()))
        felt = torch.full((channels,), float(count) / rows)
        if self.kinds:
            gradient = (self.positions * self.gradient).flatten(0, 1).double()
            # Embeddings may be scaled on their way into the first block.
            entering = self.hidden[0].flatten(0, 1).double().square().sum()
            read = (matrix.double().square().sum(-1) * often).sum()
            felt = (gradient.square().sum(0) * (entering / read.clamp(min=1e-30))).float()
        return {
            "gram": {"gram": torch.diag(felt), "count": count},
            "channel_sum": {"sum": torch.zeros(1, channels, dtype=torch.float64), "count": count},
            "output_gradient.channel_square": {"squares": often[None], "count": count},
        }


def stand_in(codec: Codec) -> Codec:
    """A codec that nothing has to learn for, with the same bits: the same, one inside, or affine.

    Raises:
        RecipeError: there is none.
    """
    if not codec.requires() and not codec.state_spec((1, codec.token_block, 64)):
        return codec
    bits = getattr(codec, "bits", 0)
    inner = getattr(codec, "codec", None)
    if isinstance(inner, Codec):
        changed = with_bits(inner, bits)
        if changed is not None:
            return stand_in(changed)
    affine: Any = find("codecs", "affine")  # of all parts' settings, only its own are given
    changed = with_bits(affine(group=Group("channel", 128), zero="integer"), bits)
    if changed is None:
        raise RecipeError(
            f"codec {kind_of(codec)!r} with {bits} bits cannot be rounded to without learning",
            hint="set budget.rounding=solver",
        )
    return changed
