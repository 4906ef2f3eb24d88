"""Measuring attention sinks, one decoder block at a time. Source: arXiv 2410.10781, section 3.

For head h of layer l, alpha_k is the mean attention that position k receives from the queries
that can see it; k is a sink of that head when alpha_k > epsilon. No attention matrix is kept: what
is accumulated takes O(L H T) numbers. Positions in the second half of a sample are left out, as
their alpha is a mean over few queries.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvpack.calibrate.hooks import Recording, record, run_block
from kvpack.core.errors import UnsupportedModel
from kvpack.core.model_spec import ModelSpec
from kvpack.core.progress import SILENT, Progress
from kvpack.models.attention_interface import observe, visible, watch
from kvpack.models.view import ModelView
from kvpack.models.weights import SourceReader
from kvpack.ops.attention_scores import column_sums

if TYPE_CHECKING:
    from torch import Tensor

FILE = "sinks.json"
_COMMON_TOKENS = 8


@dataclass(frozen=True)
class SinkSettings:
    """How sinks are measured.

    `tokens` and `samples` are the paper's protocol. A second pass over `long_samples` samples of
    `long_tokens` tokens, or as many as the model reads, looks for sinks further back. A position is
    listed when `listed` of all heads, on average over the samples, take it for a sink.
    """

    tokens: int = 64
    samples: int = 64
    long_tokens: int = 1024
    long_samples: int = 8
    epsilon: float = 0.3
    listed: float = 0.05
    batch: int = 8
    block: int = 128


class LayerSinks:
    """What one layer does to the positions of its samples; sums over samples.

    Args:
        heads: query heads H.
        tokens: length T of the samples; the first (T + 1) // 2 positions are judged.
        epsilon: attention share that makes a sink.
    """

    def __init__(self, heads: int, tokens: int, epsilon: float) -> None:
        self.epsilon, self.positions, self.samples = epsilon, (tokens + 1) // 2, 0
        self.found = torch.zeros(heads, self.positions, dtype=torch.float64)
        self.attention = torch.zeros(heads, self.positions, dtype=torch.float64)
        self.norms = {name: torch.zeros(tokens, dtype=torch.float64) for name in ("hidden", "key", "value")}
        self.key_channel_max: Tensor | None = None
        self.later: Counter[int] = Counter()

    def add_attention(self, sums: Tensor, counts: Tensor, tokens: Tensor) -> None:
        """Judge samples by attention sums [B, H, T] over the queries that see each key, [B, T]."""
        alpha = (sums / counts.clamp(min=1)[:, None])[..., : self.positions].cpu()
        sinks = alpha > self.epsilon
        self.samples += len(alpha)
        self.found += sinks.sum(0)
        self.attention += alpha.sum(0)
        heads = sinks[..., 1:].sum(1)
        for row, at in heads.nonzero().tolist():
            self.later[int(tokens[row, at + 1])] += int(heads[row, at])

    def add_tensors(self, hidden: Tensor, key: Tensor, value: Tensor) -> None:
        """Measure the layer's input [B, T, C], keys and values [B, K, T, D]."""
        self.norms["hidden"] += hidden.double().norm(dim=-1).sum(0).cpu()
        for name, plane in (("key", key), ("value", value)):
            self.norms[name] += plane.double().norm(dim=-1).mean(1).sum(0).cpu()
        largest = key.float().abs().amax((0, 2)).cpu()
        before = self.key_channel_max
        self.key_channel_max = largest if before is None else torch.maximum(before, largest)

    def report(self, layer: int) -> dict[str, Any]:
        """The layer's entry of the report: means over samples."""
        entry: dict[str, Any] = {
            "layer": layer,
            "sink_rate": _plain(self.found / self.samples),
            "attention": _plain(self.attention / self.samples),
            "key_channel_max": _plain(self.key_channel_max),
        }
        for name, total in self.norms.items():
            mean = total[: self.positions] / self.samples
            entry[f"{name}_norm"] = _plain(mean)
            median = float(mean.median())
            entry[f"{name}_norm_ratio"] = _round(float(mean[0]) / median) if median > 0 else None
        return entry


def sink_report(
    spec: ModelSpec,
    draw: Callable[[int, int], Tensor],
    settings: SinkSettings = SinkSettings(),  # frozen
    *,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """`measure_sinks` on short samples, and under "long" what the long ones add.

    Args:
        spec: the model.
        draw: (samples, tokens of each) -> token ids [N, T].
        settings: amounts.
        trust_remote_code: let transformers run code from the model folder.
        progress: told about every block.

    Raises:
        UsageError: the text is too short.
        UnsupportedModel: as `measure_sinks`.
    """
    found = []
    for samples, tokens in (
        (settings.samples, settings.tokens),
        (settings.long_samples, settings.long_tokens),
    ):
        ids = draw(samples, min(tokens, spec.max_positions or tokens))
        found.append(
            measure_sinks(spec, ids, settings, trust_remote_code=trust_remote_code, progress=progress)
        )
    kept = ("tokens", "samples", "positions", "n_sink", "later_tokens")
    return {**found[0], "long": {name: found[1][name] for name in kept}}


def measure_sinks(
    spec: ModelSpec,
    tokens: Tensor,
    settings: SinkSettings,
    *,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure a model on samples of equal length without padding, one block in memory.

    Args:
        spec: the model.
        tokens: token ids [N, T].
        settings: threshold, and how much is looked at together.
        trust_remote_code: let transformers run code from the model folder.
        progress: told about every block.

    Returns:
        "layers": per attention layer "sink_rate" and "attention" [H][T/2], "key_channel_max"
        [K][D], norms by position of hidden states, keys and values, and their "_norm_ratio" (first
        position over the median); "sink_rate" [T/2] over all heads; "positions" (from 0) that are
        listed; "n_sink", 1 + the last of them; "later_tokens", ids that are sinks elsewhere than in
        front; "tokens", "samples", "epsilon".

    Raises:
        UnsupportedModel: the model does not use transformers' attention registry.
    """
    with torch.no_grad():
        view = ModelView.build(spec, trust_remote_code=trust_remote_code)
        observe(view.model)
        layers = list(_Sweep(view, tokens, settings, progress).layers())
    total = torch.cat([x.found for x in layers]).mean(0) / len(tokens)
    listed = [i for i, share in enumerate(total.tolist()) if share >= settings.listed]
    later: Counter[int] = sum((x.later for x in layers), Counter())
    return {
        "tokens": tokens.shape[1],
        "samples": len(tokens),
        "epsilon": settings.epsilon,
        "sink_rate": _plain(total),
        "positions": listed,
        "n_sink": 1 + max(listed, default=-1),
        "later_tokens": [{"token": t, "count": n} for t, n in later.most_common(_COMMON_TOKENS)],
        "layers": [x.report(spec.attention[i].layer) for i, x in enumerate(layers)],
    }


class _Sweep:
    """Hidden states of all samples, moved through the blocks of the uncompressed model."""

    def __init__(self, view: ModelView, tokens: Tensor, settings: SinkSettings, progress: Progress) -> None:
        self.view, self.tokens, self.settings, self.progress = view, tokens, settings, progress
        self.reader = SourceReader.of(view.spec)
        self.recordings: dict[int, Recording] = {}

    def layers(self) -> Iterator[LayerSinks]:
        """Measure layer after layer."""
        hidden, stage = self._embed(), f"sinks in {self.tokens.shape[1]} tokens"
        for layer in range(len(self.view.blocks)):
            self.progress(stage, layer, len(self.view.blocks), f"block {layer}")
            self.view.load_block(layer, self.reader, torch.float32)
            heads = self.view.spec.attention[layer].heads
            found = LayerSinks(heads, self.tokens.shape[1], self.settings.epsilon)
            for part in self._batches():
                hidden[part] = self._run(layer, hidden[part], part, found)
            self.view.free_block(layer)
            yield found
        self.progress(stage, len(self.view.blocks), len(self.view.blocks))

    def _embed(self) -> Tensor:
        self.view.load_outer(self.reader, self.view.base_tensors())
        parts = []
        for part in self._batches():
            recording = record(self.view, self.tokens[part])
            parts.append(recording.hidden.float())
            self.recordings.setdefault(len(recording.hidden), recording)
        self.view.free_outer()
        return torch.cat(parts)

    def _batches(self) -> Iterator[slice]:
        for start in range(0, len(self.tokens), self.settings.batch):
            yield slice(start, min(start + self.settings.batch, len(self.tokens)))

    def _run(self, layer: int, hidden: Tensor, part: slice, found: LayerSinks) -> Tensor:
        """One batch through one block; its attention is measured on the way."""
        attention, before = self.view.attention(layer), found.samples

        def see(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> None:
            seen = None if mask is None else visible(mask, query, key)
            sums, counts = column_sums(
                query,
                key,
                seen,
                scaling,
                block=self.settings.block,
                per_head=True,
                softcap=getattr(attention, "attn_logit_softcapping", None),
                sink_logits=getattr(attention, "sinks", None),
            )
            found.add_attention(sums, counts, self.tokens[part])
            found.add_tensors(hidden, key, value)

        with watch(attention, see):
            result = run_block(self.view, layer, hidden, self.recordings[len(hidden)])
        if found.samples == before:
            raise UnsupportedModel(
                "its attention does not call transformers' attention functions",
                where=self.view.spec.attention[layer].module,
                why="attention sinks cannot be measured",
            )
        return result.float()


def to_json(report: dict[str, Any]) -> bytes:
    """The bytes of `FILE`."""
    return (json.dumps(report, sort_keys=True, separators=(",", ":")) + "\n").encode()


def _round(number: float) -> float:
    return float(f"{number:.5g}")


def _plain(tensor: Tensor | None) -> Any:
    """Nested lists of numbers with five digits."""
    if tensor is None:
        return []
    if tensor.dim() > 1:
        return [_plain(row) for row in tensor]
    return [_round(x) for x in tensor.tolist()]
