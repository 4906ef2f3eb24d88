"""How much attention a token has received so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvpack import ops
from kvpack.core.errors import KvpackError
from kvpack.core.roles import Scorer
from kvpack.core.types import ScoreView, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AccumulatedAttention(Scorer):
    """``S_j = sum over all queries i of A_ij``, summed over the query heads of a kv head.

    Source: H2O, arXiv 2306.14048, section 4, as used by MiKV, arXiv 2402.18096. The sums favour old
    tokens, which more queries see; `normalise` divides by how many queries may attend to a token
    (ZipCache, arXiv 2405.14256, equation 8).

    Sums: "sums" float32 [B, K, T] and, with `normalise`, "counts" int32 [B, 1, T].
    """

    normalise: bool = False

    def observe(self, view: ScoreView) -> State:
        """Column sums of this pass's attention, in blocks of query rows.

        Raises:
            KvpackError: the view lacks queries or keys.
        """
        if view.query is None or view.key is None:
            raise KvpackError(f"layer {view.layer}: accumulated_attention was not shown the queries")
        rows = ops.saliency.real_rows(view.valid, view.query.shape[2], view.query.device)
        sums, counts = ops.saliency.sums_of_rows(view.query, view.key, view.visible, view.scaling, rows)
        return {"sums": sums, "counts": counts} if self.normalise else {"sums": sums}

    def score(self, observed: State) -> Tensor:
        """The sums, or their means over the queries that may attend."""
        if not self.normalise:
            return observed["sums"]
        return observed["sums"] / observed["counts"].clamp(min=1)

    def observed_spec(self, kv_heads: int, tokens: int) -> dict[str, TensorSpec]:
        """Four bytes per token and head, and four per token with `normalise`."""
        specs = {"sums": TensorSpec((1, kv_heads, tokens), "float32")}
        if self.normalise:
            specs["counts"] = TensorSpec((1, 1, tokens), "int32")
        return specs
