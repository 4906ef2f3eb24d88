"""One codeword per token and head, learned where errors of scores count."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from kvpack import ops
from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.lazy import torch
from kvpack.core.roles import Codec
from kvpack.core.types import Payload, Shape, Stat, State, Stats, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

ROWS_PER_CENTROID = 16
MOST_BITS = 12
"""Of codes whose number follows from the calibration text."""


@dataclass(frozen=True)
class Vector(Codec):
    """Vector quantisation: 2^`bits` centroids per layer, head and sub-vector, by k-means.

    `metric` "query": k-means of ``k L``, with L L^T the second moment of the queries that read the
    plane, so that squared distances are expected squared errors of scores; "euclidean": of k, which
    suits values, too. `sub_vectors` cuts ``k L`` into equal pieces with a codebook each. `bits` 0
    stands for as many as the calibration text allows, 12 at most: 16 tokens per centroid.

    Payload for [..., T, D]: "codes" uint8 [..., T, ceil(sub_vectors*bits/8)]: one code of 12 bits
    takes 2 bytes, two take 3. State: "codebook" bfloat16 [K, sub_vectors, 2^bits, D/sub_vectors],
    in the space of ``k L``; with the query metric "chol" L, float32 [K, D, D]. Codes are assigned
    in float32. Source: A2ATS, arXiv 2502.12665, query-aware vector quantisation.
    """

    bits: int = field(metadata={"minimum": 0, "maximum": 16})
    metric: Literal["query", "euclidean"] = "query"
    sub_vectors: int = field(default=1, metadata={"minimum": 1})

    def requires(self) -> frozenset[Stat]:
        """All tokens, and the queries' second moment."""
        rows = Stat("all_rows")
        return frozenset({rows, Stat("head_gram", of="query")} if self.metric == "query" else {rows})

    def for_rows(self, rows: int) -> Vector:
        """With its number of bits, when `rows` tokens are measured.

        Raises:
            RecipeError: that are fewer than 16 per centroid.
        """
        fits = max(1, rows // ROWS_PER_CENTROID).bit_length() - 1
        if fits < max(self.bits, 1):
            centroids = 2 ** max(self.bits, 1)
            wanted = f"calibrate on {centroids * ROWS_PER_CENTROID:,} tokens"
            nearest = f"set bits to {fits} ({2**fits} centroids), or " if fits else ""
            raise RecipeError(
                f"vector: {centroids:,} centroids cannot be learned from {rows:,} calibration tokens",
                why=f"each needs {ROWS_PER_CENTROID}",
                hint=nearest + wanted,
            )
        return self if self.bits else replace(self, bits=min(fits, MOST_BITS))

    def fit(self, stats: Stats) -> State:
        """Factor of the metric, and centroids.

        Raises:
            KvpackError: rows or queries were not measured, or are not finite.
            RecipeError: too few rows.
        """
        rows, gram = (self._measured(stats, *n) for n in (("all_rows", "rows"), ("query.head_gram", "gram")))
        self.for_rows(rows.shape[1])
        state: State = {} if self.metric == "euclidean" else {"chol": ops.query_metric.factor(gram)}
        pieces = self._pieces(rows, state)
        found = [
            torch.stack([ops.kmeans_vectors.fit(piece, 2**self.bits) for piece in head]) for head in pieces
        ]
        return {"codebook": torch.stack(found).bfloat16(), **state}

    def state_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """Codebook, and the metric's factor.

        Raises:
            RecipeError: the channels cannot be cut into `sub_vectors` pieces.
        """
        heads, channels = shape[-3], shape[-1]
        if channels % self.sub_vectors:
            fits = max(n for n in range(1, self.sub_vectors) if channels % n == 0)
            raise RecipeError(
                f"vector: {channels} channels cannot be cut into {self.sub_vectors} equal pieces",
                hint=f"set sub_vectors to {fits}",
            )
        books = (heads, self.sub_vectors, 2**self.bits, channels // self.sub_vectors)
        state = {"codebook": TensorSpec(books, "bfloat16")}
        if self.metric == "query":
            state["chol"] = TensorSpec((heads, channels, channels), "float32")
        return state

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Codes alone."""
        return {"codes": TensorSpec((*shape[:-1], (self.sub_vectors * self.bits + 7) // 8), "uint8")}

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """The nearest centroid of every piece."""
        books = state["codebook"].float()
        pieces = self._pieces(x.reshape(-1, len(books), *x.shape[-2:]).float(), state)
        codes = ops.kmeans_vectors.assign(pieces, books.expand(len(pieces), *books.shape))[0]
        packed = ops.bits.pack_wide(codes.mT, self.bits)
        return Payload({"codes": packed.reshape(*x.shape[:-1], -1)}, tuple(x.shape))

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """The centroids."""
        books = state["codebook"].float()
        codes = self._codes(payload, len(books)).unsqueeze(-1)
        pieces = books.expand(len(codes), *books.shape)
        z = pieces.gather(3, codes.expand(*codes.shape[:-1], books.shape[-1])).transpose(2, 3).flatten(3)
        x = z if self.metric == "euclidean" else ops.query_metric.leave(z, state["chol"])
        return x.reshape(payload.shape).to(dtype)

    def scores(self, query: Tensor, payload: Payload, state: State) -> Tensor:
        """One table of scores per query and codebook, and one look-up per token."""
        books = state["codebook"].float()
        q = query.reshape(-1, len(books), *query.shape[-2:]).float()
        q = q if self.metric == "euclidean" else ops.query_metric.queries(q, state["chol"])
        tables = torch.unflatten(q, -1, (self.sub_vectors, -1)).transpose(2, 3) @ books.mT
        codes = self._codes(payload, len(books)).unsqueeze(3)
        found = tables.gather(4, codes.expand(*tables.shape[:-1], codes.shape[-1])).sum(2)
        scores: Tensor = found.reshape(*query.shape[:-1], payload.shape[-2])
        return scores

    @property
    def reads_codes(self) -> bool:
        """Always."""
        return True

    def mix(self, weights: Tensor, payload: Payload, state: State) -> Tensor:
        """The weights of the tokens of every centroid summed up, then one product with the codebook."""
        books = state["codebook"].float()
        w = weights.reshape(-1, len(books), 1, *weights.shape[-2:]).float()
        codes = self._codes(payload, len(books)).unsqueeze(3)
        shape = (*w.shape[:2], self.sub_vectors, w.shape[3])
        sums = w.new_zeros((*shape, books.shape[2]))
        sums.scatter_add_(4, codes.expand(*shape, -1), w.expand(*shape, -1))
        z = (sums @ books).transpose(2, 3).flatten(3)
        x = z if self.metric == "euclidean" else ops.query_metric.leave(z, state["chol"])
        return x.reshape(*weights.shape[:-1], payload.shape[-1])

    def _pieces(self, x: Tensor, state: State) -> Tensor:
        """[..., K, N, D] in the metric's space, cut: [..., K, sub_vectors, N, D / sub_vectors]."""
        z = x if self.metric == "euclidean" else x @ state["chol"]
        cut = torch.unflatten(z, -1, (self.sub_vectors, -1))
        return cut.transpose(-3, -2).contiguous()

    def _codes(self, payload: Payload, heads: int) -> Tensor:
        """[B, K, sub_vectors, T]."""
        codes = ops.bits.unpack_wide(payload.tensors["codes"], self.bits, self.sub_vectors)
        heads_apart: Tensor = codes.reshape(-1, heads, *codes.shape[-2:])
        return heads_apart.mT

    def _measured(self, stats: Stats, stat: str, name: str) -> Tensor:
        if stat not in {s.name for s in self.requires()}:
            return torch.empty(0)
        if stat not in stats or not bool(stats[stat][name].isfinite().all()):
            fact = "are not finite" if stat in stats else "were not measured"
            raise KvpackError(f"vector: {stat} {fact}", hint="calibrate again with sound text and weights")
        return stats[stat][name]
