"""Roles that answer what happens to each token: its importance, its tier, and who reads it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from kvpack.core.roles.part import Part
from kvpack.core.types import CacheView, ScoreView, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

Plane = Literal["key", "value"]


class Scorer(Part, ABC):
    """How important is each token, per row of the batch and per kv head?

    A cache shows every forward pass to `observe` and adds up what it returns, so that whole
    attention matrices are never held; `score` turns the sums into an order.
    """

    needs: ClassVar[Literal["queries", "embeddings"]] = "queries"
    """What `observe` reads: queries and keys of an attention call, or the model's input embeddings."""

    @property
    def cut_free(self) -> bool:
        """Whether a text fed token by token is scored as one fed in pieces of up to 32 tokens."""
        return True

    @abstractmethod
    def observe(self, view: ScoreView) -> State:
        """What one forward pass tells: tensors whose last axis are the newest tokens, to be added up."""

    @abstractmethod
    def score(self, observed: State) -> Tensor:
        """Scores [B, K or 1, T] of the tokens on the last axis, higher is more important."""

    @abstractmethod
    def observed_spec(self, kv_heads: int, tokens: int) -> dict[str, TensorSpec]:
        """Shapes of the sums for `tokens` tokens and one row of the batch."""


class TierPolicy(Part, ABC):
    """Which tokens stay exact, when the others are encoded, and by which codec.

    New tokens are exact (tier `inside`). They leave that tail in order of age, as whole token
    blocks, for the coded tiers. Where there are several, a token moves from one to the next and
    never back. Decisions about age look only at how many tokens a tier holds, so that cropping and
    beam search need no special cases.

    A policy with a `scorer` spreads the tokens over two coded tiers by importance instead, the
    important ones first, for every row of the batch and every head on its own.
    """

    inside: str
    scorer: Scorer | None = None
    demote: bool = False
    """Whether tokens that have left the tail may still fall from the first tier to the second."""

    needs_hidden: ClassVar[bool] = False
    """Whether `protect` reads `CacheView.hidden`."""

    @property
    def window(self) -> int | None:
        """How many tokens a query reads at most, the newest with itself, beside protected ones; None: all.

        What is older and not protected is dropped, whatever the model would let a query read.
        """
        return None

    @property
    @abstractmethod
    def coded(self) -> tuple[str, ...]:
        """Names of the coded tiers, in the order in which a token passes them."""

    @abstractmethod
    def leaving(self, tail_tokens: int, block: int, plane: Plane) -> int:
        """How many of the oldest `tail_tokens` exact tokens are encoded now.

        `block` is the codecs' token block; the answer is a multiple of it.
        """

    def placement(self, tokens: int, block: int, plane: Plane) -> tuple[int, ...]:
        """How many of the `tokens` oldest tokens, which have left the tail, each coded tier holds.

        In the order of `coded`; by default the first tier holds all. Must not move a token back
        to an earlier tier when `tokens` grows.
        """
        return (tokens, *(0 for _ in self.coded[1:]))

    def important(self, tokens: Tensor) -> Tensor:
        """How many of `tokens` int64 [B] tokens of each row belong to the first tier, int64 [B].

        Both the answer and what is left over must not fall when `tokens` grows. Asked only where
        there is a `scorer`; all by default.
        """
        return tokens

    def choose(self, scores: Tensor, candidates: Tensor, valid: Tensor) -> Tensor:
        """Which tokens belong to the first tier, bool [B, K, T]: exactly `important` of each row.

        Asked only where there is a `scorer`; the highest scores by default.

        Args:
            scores: [B, K, T], in order of age.
            candidates: tokens that may, bool [B, K, T]; always enough.
            valid: tokens that are not padding, bool [B, T].
        """
        ranked = scores.masked_fill(~(candidates & valid.unsqueeze(1)), -float("inf"))
        order = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return order < self.important(valid.sum(-1)).reshape(-1, 1, 1)

    @abstractmethod
    def protect(self, view: CacheView) -> Tensor | None:
        """Tokens of this update that stay exact for good, bool [B, T]; None when none do."""

    @abstractmethod
    def protected_tokens(self) -> int:
        """The most tokens per row that `protect` keeps from a prompt given in one piece."""


class Retriever(Part, ABC):
    """Which of the tokens before it a query reads, chosen by scores that may be approximate."""

    @abstractmethod
    def select(self, scores: Tensor, visible: Tensor) -> Tensor:
        """What each query head reads.

        Args:
            scores: float32 [B, H, T, S] of T queries with S tokens, the higher the likelier read.
            visible: which tokens a query may read, bool [B or 1, 1, T, S], oldest first.

        Returns:
            bool [B, H, T, S]; never what is not visible.
        """

    @abstractmethod
    def always(self, visible: Tensor) -> Tensor:
        """Those of the `visible` tokens that are read whatever their scores."""

    @abstractmethod
    def most(self, tokens: int) -> int:
        """The most tokens that one query head reads of `tokens` visible ones."""
