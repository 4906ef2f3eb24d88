"""Codecs whose products with queries and weights are the kernels'; a subclass says what these read.

They stand here and not beside the role, because `kvpack.core` knows no kernels. No torch at import.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from kvpack import kernels
from kvpack.core.roles import Codec
from kvpack.core.rows import TokenRows
from kvpack.core.types import CodedRows, Payload, State

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class RowCodec(Codec):
    """A codec whose tokens are decoded one after another, by `kvpack.kernels.rows`."""

    @property
    def in_rows(self) -> bool:
        """Always; a codec around others may have to ask these."""
        return True

    @abstractmethod
    def token_rows(self, payload: Payload, state: State) -> TokenRows:
        """What is stored, as compiled loops read it."""

    def scores(self, query: Tensor, payload: Payload, state: State) -> Tensor:
        """Products of queries [B, K, R, D] with the tokens, a few rows at a time: float32 [B, K, R, T]."""
        if not self.in_rows:
            return super().scores(query, payload, state)
        return kernels.rows.scores(query, self.token_rows(payload, state))

    def mix(self, weights: Tensor, payload: Payload, state: State) -> Tensor:
        """Sums of the tokens with weights [B, K, M, T], a few rows at a time: float32 [B, K, M, D]."""
        if not self.in_rows:
            return super().mix(weights, payload, state)
        return kernels.rows.mix(weights, self.token_rows(payload, state))


class LookupCodec(Codec):
    """A codec whose codes are looked up in levels or codebooks, by `kvpack.kernels.lookup`."""

    @abstractmethod
    def coded_rows(self, payload: Payload, state: State) -> CodedRows:
        """Codes, and what they are looked up in."""

    @property
    def reads_codes(self) -> bool:
        """Always."""
        return True

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """What the codes stand for, [..., T, D] in `dtype`."""
        return kernels.lookup.dense(self.coded_rows(payload, state), dtype)

    def scores(self, query: Tensor, payload: Payload, state: State) -> Tensor:
        """Products of queries [..., R, D] with the numbers, a few rows at a time: float32 [..., R, T]."""
        return kernels.lookup.scores(query, self.coded_rows(payload, state))

    def mix(self, weights: Tensor, payload: Payload, state: State) -> Tensor:
        """Sums of the numbers with weights [..., M, T], a few rows at a time: float32 [..., M, D]."""
        return kernels.lookup.mix(weights, self.coded_rows(payload, state))
