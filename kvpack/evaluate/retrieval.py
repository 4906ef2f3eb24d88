"""How well an index finds the tokens that exact scores would choose, and how much is fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from kvpack.runtime.retrieval import RetrievalLayer

SHARES = (0.01, 0.03, 0.05)
"""Of the context, for which recall is reported."""


@dataclass(frozen=True)
class RetrievalScores:
    """Means over queries, heads and layers, of queries that have a choice.

    `recall` by share of the context: of the max(1, share n) tokens with the highest exact scores,
    those that are also among as many with the highest approximate ones. Tokens that are read
    whatever their scores (sinks, window) take no part. `read` is the share of the context that one
    query head attends to, `fetched` that of the union over the query heads of a kv head.
    """

    recall: Mapping[str, float]
    read: float
    fetched: float


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, values: Tensor) -> None:
        self.total += float(values.double().sum())
        self.count += values.numel()

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass
class RetrievalTally:
    """Watches caches, compares what their indexes choose with exact scores."""

    _recall: dict[float, _Mean] = field(default_factory=lambda: {share: _Mean() for share in SHARES})
    _read: _Mean = field(default_factory=_Mean)
    _fetched: _Mean = field(default_factory=_Mean)

    def watch(self, cache: Any) -> None:
        """Observe every layer of a fresh cache that retrieves tokens; None has none."""
        from kvpack.runtime.retrieval import RetrievalLayer

        for layer in () if cache is None else cache.layers:
            if isinstance(layer, RetrievalLayer):
                layer.attend = self._observed(layer, layer.attend)  # type: ignore[method-assign]  # on this one cache

    def scores(self) -> RetrievalScores | None:
        """The means so far; None where no query had a choice."""
        if not self._read.count:
            return None
        recall = {f"{share:.0%}": mean.value for share, mean in self._recall.items()}
        return RetrievalScores(recall, self._read.value, self._fetched.value)

    def _observed(self, layer: RetrievalLayer, attend: Callable[..., Any]) -> Callable[..., Any]:
        def observe(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Any:
            if layer.chooses(query, key):
                self._add(layer, query, key.to(query.device), mask, scaling)
            return attend(query, key, value, mask, scaling)

        return observe

    def _add(
        self, layer: RetrievalLayer, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
    ) -> None:
        import torch

        from kvpack.models.attention_interface import visible

        kv_heads = key.shape[1]
        seen = visible(mask, query, key)
        for part, found in layer.scores(query):
            grouped = torch.unflatten(query[:, :, part].float(), 1, (kv_heads, -1))
            exact = (grouped @ key.float().mT.unsqueeze(2)).flatten(1, 2)
            rows = seen[:, :, part].expand(found.shape[0], 1, *found.shape[2:])
            self._add_recall(found, exact, rows & ~layer.retriever.always(rows), rows)
            read = layer.retriever.select(found * scaling, rows)
            self._add_read(torch.unflatten(read, 1, (kv_heads, -1)), rows)

    def _add_recall(self, found: Tensor, exact: Tensor, among: Tensor, seen: Tensor) -> None:
        from kvpack.ops import top_tokens

        context, choices = seen.sum(-1, keepdim=True), among.sum(-1, keepdim=True)
        for share, mean in self._recall.items():
            counts = top_tokens.share(context, share, 1)
            both = top_tokens.best(found, among, counts) & top_tokens.best(exact, among, counts)
            hits = both.sum(-1) / counts.squeeze(-1)
            mean.add(hits[(choices > counts).squeeze(-1).expand_as(hits)])

    def _add_read(self, read: Tensor, seen: Tensor) -> None:
        """`read` [B, K, G, T, S], `seen` [B, 1, T, S]."""
        context = seen.sum(-1)
        choice = read.sum(-1).amax((1, 2)) < context[:, 0]
        per_head = read.sum(-1) / context.clamp(min=1).unsqueeze(1)
        union = read.any(2).sum(-1) / context.clamp(min=1)
        self._read.add(per_head[choice[:, None, None].expand_as(per_head)])
        self._fetched.add(union[choice[:, None].expand_as(union)])
