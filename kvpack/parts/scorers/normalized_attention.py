"""The mean attention that a token receives from the queries that may see it, from a few of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kvpack import ops
from kvpack.core.errors import KvpackError
from kvpack.core.lazy import torch
from kvpack.core.roles import Scorer
from kvpack.core.types import ScoreView, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NormalizedAttention(Scorer):
    """``p_j = sum over probes i of A_ij / number of probes that may attend to j``.

    Probes are query rows: of the n tokens of a forward pass, padding not counted, the newest
    ceil(`recent_share` * n) and ceil(`random_share` * n) of the others, but at least
    `least_rows` / 2 of each, so that every row of a short pass is one. The random ones are drawn
    without repetition by a generator seeded by `seed`, the layer and n. Sums over the query heads
    of a kv head. Source: ZipCache, arXiv 2405.14256, equations 8 and 9.

    `denominator` "all" divides by the rows that may attend to j, probes or not, as the official
    code does. Sums: "sums" float32 [B, K, T], "counts" int32 [B, 1, T].
    """

    recent_share: float = field(default=0.05, metadata={"minimum": 0.0, "maximum": 1.0})
    random_share: float = field(default=0.05, metadata={"minimum": 0.0, "maximum": 1.0})
    least_rows: int = field(default=32, metadata={"minimum": 2})
    denominator: Literal["probes", "all"] = "probes"
    seed: int = 0

    @property
    def cut_free(self) -> bool:
        """Where all rows of so short a piece are probes."""
        return self.least_rows >= 32

    def probes(self, layer: int, tokens: int) -> Tensor:
        """Indices of the probe rows among `tokens` rows, ascending, int64."""
        least = -(-self.least_rows // 2)
        recent = min(tokens, max(least, math.ceil(self.recent_share * tokens)))
        older = tokens - recent
        drawn = min(older, max(least, math.ceil(self.random_share * tokens)))
        seed = (self.seed * 1_000_003 + layer) * 1_000_003 + tokens
        order = torch.randperm(older, generator=torch.Generator().manual_seed(seed))
        return torch.cat((order[:drawn].sort().values, torch.arange(older, tokens)))

    def observe(self, view: ScoreView) -> State:
        """Column sums over the probe rows, and how many rows may attend to each column.

        Raises:
            KvpackError: the view lacks queries or keys.
        """
        if view.query is None or view.key is None:
            raise KvpackError(f"layer {view.layer}: normalized_attention was not shown the queries")
        query, key, visible = view.query, view.key, view.visible
        real = ops.saliency.real_rows(view.valid, query.shape[2], query.device)
        rows = [r[self.probes(view.layer, len(r)).to(query.device)] for r in real]
        sums, counts = ops.saliency.sums_of_rows(query, key, visible, view.scaling, rows)
        if self.denominator == "all":
            counts = ops.saliency.counts_of_rows(query, key, visible, real)
        return {"sums": sums, "counts": counts}

    def score(self, observed: State) -> Tensor:
        """Means; 0 for a token that no probe may see."""
        return observed["sums"] / observed["counts"].clamp(min=1)

    def observed_spec(self, kv_heads: int, tokens: int) -> dict[str, TensorSpec]:
        """Four bytes per token and head, and four per token."""
        return {
            "sums": TensorSpec((1, kv_heads, tokens), "float32"),
            "counts": TensorSpec((1, 1, tokens), "int32"),
        }
