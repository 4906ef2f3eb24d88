"""Calibration, one decoder block at a time.

Peak memory is one block, the statistics of one layer (or block), the hidden states of all samples,
and where the machine has room for it what these hold in the middle of a block. Every block sees
inputs that already carry the errors of the packed blocks before it, as in GPTQ (arXiv 2210.17323,
section 4), and every layer, unless the recipe says otherwise, those of the packed layers before it
in its own block (`kvpack.calibrate.staged`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvpack.calibrate import experts
from kvpack.calibrate.basis import fit_basis
from kvpack.calibrate.block import BlockSolver
from kvpack.calibrate.chains import make_chains
from kvpack.calibrate.collect import Chain, InputStats
from kvpack.calibrate.data import Samples
from kvpack.calibrate.gradients import Gradients, gradients_for
from kvpack.calibrate.hooks import finish
from kvpack.calibrate.identity import identity
from kvpack.calibrate.passes import Passes
from kvpack.calibrate.solve import solve_all
from kvpack.calibrate.sparsity import SparseBlock
from kvpack.calibrate.store import Calibration
from kvpack.calibrate.writer import CalibrationWriter
from kvpack.core.errors import SourceError, UsageError
from kvpack.core.progress import SILENT, Progress, paced
from kvpack.folding import Folding, fitted_without_data, learned
from kvpack.models.attention_interface import observe
from kvpack.models.fold import fold_names
from kvpack.models.view import ModelView
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.plan import Plan, WeightPlan

if TYPE_CHECKING:
    from torch import Tensor


def calibrate(
    plan: Plan,
    samples: Samples,
    out: Path,
    *,
    hashes: Mapping[str, str],
    extra: Mapping[str, bytes] | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> Calibration:
    """Measure a model on samples and write what its recipe needs to know to the folder `out`.

    Args:
        plan: the recipe applied to the model.
        samples: token ids [N, T].
        out: folder to make; it appears complete or not at all.
        hashes: sha256 of the model's weight files, from `kvpack.models.scan.scan`.
        extra: further files by name, such as a report of attention sinks.
        force: replace `out` if it exists.
        trust_remote_code: let transformers run code from the model folder.
        progress: told about every block.

    Raises:
        SourceError: the tokenizer does not belong to the model, or the model computes NaN.
        UsageError: samples are longer than the model can read, or `out` exists.
    """
    check(plan, samples)
    with CalibrationWriter(out, force=force) as writer, torch.no_grad():
        view = ModelView.build(plan.model, trust_remote_code=trust_remote_code)
        if any(stat.of == "query" for part in plan.kv_parts() for stat in part.requires()):
            observe(view.model)
        with gradients_for(plan, view, samples.tokens, writer.folder, progress) as gradients:
            Sweep(plan, view, samples.tokens, writer, progress, gradients).all_blocks()
        for file, content in (extra or {}).items():
            writer.add_file(file, content)
        writer.finish(identity(plan, hashes), samples)
    return Calibration.open(out)


def check(plan: Plan, samples: Samples) -> None:
    """Refuse samples that the model cannot read; errors as of `calibrate`."""
    longest, top = plan.model.max_positions, int(samples.tokens.max())
    if longest and samples.tokens.shape[1] > longest:
        raise UsageError(
            f"samples have {samples.tokens.shape[1]} tokens, the model reads {longest}",
            hint=f"--set calibration.sample_tokens={longest}",
        )
    if top >= plan.model.vocab_size:
        raise SourceError(
            f"the tokenizer gives token {top}, the model knows {plan.model.vocab_size}",
            where=str(plan.model.path),
            hint="the tokenizer belongs to another model",
        )


class Sweep:
    """One calibration: the hidden states of all samples, moved through the blocks."""

    def __init__(
        self,
        plan: Plan,
        view: ModelView,
        tokens: Tensor,
        writer: CalibrationWriter,
        progress: Progress,
        gradients: Gradients | None = None,
    ) -> None:
        self.plan, self.view, self.tokens = plan, view, tokens
        self.writer, self.progress = writer, progress
        self.settings = plan.recipe.recipe.calibration
        self.passes = Passes(view, tokens, self.settings.batch, gradients)
        self.folding = Folding(plan)
        for change in plan.basis:
            self.folding.basis.update(fitted_without_data(change))
        self.kv = {x.attention.layer: x for x in plan.kv}
        self._by_layer: dict[int | None, dict[str, WeightPlan]] = {}
        for name, weight in plan.weights.items():
            self._by_layer.setdefault(weight.linear.layer, {})[name] = weight

    def all_blocks(self) -> None:
        """Calibrate every block, then what stands behind them."""
        outside = self._packed(None)
        wanted = any(w.solver.requires() for w in outside.values())
        layers = [x for x in range(len(self.view.blocks)) if wanted or self._needed(x)]
        last = max(layers, default=-1)
        self._embed()
        tell = paced(self.progress, "calibrate", last + 1, "tokens/s through a block")
        for layer in range(last + 1):
            tell(layer, layer * self.tokens.numel(), f"block {layer}")
            self._block(layer, onward=layer < last or wanted)
        if wanted:
            self._head(outside)
        tell(last + 1, (last + 1) * self.tokens.numel())

    def _needed(self, layer: int) -> bool:
        if any(change.layer == layer and learned(change) for change in self.plan.basis):
            return True
        if self.plan.sparsity is not None and self.plan.sparsity.of_layer(layer):
            return True
        return layer in self.kv or any(w.solver.requires() for w in self._packed(layer).values())

    def _packed(self, layer: int | None) -> Mapping[str, WeightPlan]:
        """The packed layers of a block, or (None) of what stands outside."""
        return self._by_layer.get(layer, {})

    def _embed(self) -> None:
        self.view.load_outer(self.folding, self.view.base_tensors())
        self._pack_embedding()
        self.passes.embed()
        self.view.free_outer()

    def _pack_embedding(self) -> None:
        """Let block 0 see tokens as the artifact embeds them; codes that need data come too late for that."""
        model = self.plan.model
        holder = model.tied.get(model.embedding, model.embedding).removesuffix(".weight")
        weight = self.plan.weights.get(holder)
        if weight is not None and not weight.solver.requires():
            self._solve({model.embedding.removesuffix(".weight"): weight}, InputStats({}))

    def _block(self, layer: int, onward: bool) -> None:
        weights, kv = self._packed(layer), self.kv.get(layer)
        chains = self._chains(kv)
        self.view.load_block(layer, self.folding, torch.float32)
        self.writer.add_experts(experts.find_cold(self.plan, layer, self.view, partial(self._count, layer)))
        self._fit_basis(layer)
        if kv is not None and kv.folded_planes:
            while not all(chains[plane].transforms_fitted for plane in kv.folded_planes):
                self._count(layer, chains)
            self._fold(kv, chains)
        sparse = SparseBlock(self.plan, layer, self.view)
        solver = BlockSolver(layer, weights, chains, self.passes, self._solve)
        kept = solver.solve(in_order=self.settings.sequential, keep=onward and not sparse.sites)
        if kv is not None:
            for plane, chain in chains.items():
                self.writer.add_states(layer, plane, chain.states)
        while sparse.unfinished:
            self.passes.run(layer, weights, {}, sparse, keep=False)
            sparse.close()
        experts.release(self.view, layer)
        if sparse.sites or (onward and not kept):
            self.passes.run(layer, weights, {}, sparse, keep=onward)
        self.writer.add_thresholds(sparse.thresholds, sparse.active)
        self.view.free_block(layer)
        self.writer.flush(f"block-{layer:05d}.safetensors")

    def _chains(self, kv: KVLayerPlan | None) -> dict[str, Chain]:
        return {} if kv is None else make_chains(kv, self.view, self.folding, self.tokens.shape[1])

    def _count(self, layer: int, chains: Mapping[str, Chain] | None = None) -> None:
        """Run every sample through a block as it is, for whoever watches."""
        self.passes.run(layer, self._packed(layer), chains or {}, InputStats({}), keep=False)

    def _fit_basis(self, layer: int) -> None:
        """Fit what changes the basis of this block's tensors, and fold it into the block."""
        changes = [c for c in self.plan.basis if c.layer == layer and c.number not in self.folding.basis]
        measure = partial(self._count, layer)
        sample = partial(self.passes.sample, layer, self._packed(layer))
        fit_basis(changes, self.view, self.plan.model.attention[layer], self.folding, measure, sample)
        for change in changes:
            self.writer.add_basis(change, self.folding.basis[change.number])

    def _fold(self, kv: KVLayerPlan, chains: Mapping[str, Chain]) -> None:
        """Fold what the plan folds of the cache's transforms, as the export does."""
        names = {n for plane in kv.folded_planes for n in fold_names(kv.attention, plane)}
        for plane in kv.folded_planes:
            chain = chains[plane]
            self.folding.kv[kv.attention.layer, plane] = chain.states[: len(chain.transforms)]
            chain.folded = True
        known = sorted(names & self.plan.model.tensors.keys())
        self.view.fill({name: self.folding.read(name) for name in known}, torch.float32)

    def _solve(self, weights: Mapping[str, WeightPlan], inputs: InputStats) -> None:
        """Replace every packed weight by its approximation; keep the codes that needed data."""
        sources = {n: self.view.module(n).get_parameter("weight").float() for n in weights}
        for name, solved in solve_all(weights, sources, inputs, self.view.dtype):
            if weights[name].solver.requires():
                self.writer.add_payload(name, solved)
            self.view.fill({f"{name}.weight": solved.approximation})

    def _applied(self, weight: WeightPlan) -> str:
        """The layer whose input is multiplied by a weight: not always the one that holds it."""
        applied = self.plan.model.applied(weight.linear)
        return weight.linear.name if applied is None else applied.name

    def _head(self, outside: Mapping[str, WeightPlan]) -> None:
        """Linear layers behind the last block, usually the head; a tied one may be the embedding."""
        inputs = InputStats({n: w.solver.requires() for n, w in outside.items()})
        self.view.load_outer(self.folding)
        modules = {name: self.view.module(self._applied(outside[name])) for name in inputs.wanted}
        for part in self.passes.batches():
            last = finish(self.view, self.passes.hidden[part].to(self.view.dtype), self.tokens[part])
            with inputs.attached(modules):
                for module in modules.values():
                    module(last)
        self._solve(outside, inputs)
        self.view.free_outer()
        self.writer.flush("outer.safetensors")
