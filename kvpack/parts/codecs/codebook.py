"""Levels of one learned codebook for all normalised numbers of a plane."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kvpack import kernels, ops
from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.lazy import torch
from kvpack.core.rows import LevelCodes, TokenRows
from kvpack.core.types import Payload, Shape, Stat, State, Stats, TensorSpec
from kvpack.kernels.codecs import RowCodec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Codebook(RowCodec):
    """``x ~ z + s * c[q]``: one codebook c of 2^bits levels per layer and plane.

    z and s are the middle and half the width of a range, floats of 16 bits. `axis` "channel": the
    range of every channel over the calibration tokens, fixed before any token is stored. "token":
    the range of every token (of every head, where heads are not merged), stored beside it.

    c comes from a weighted k-means on ``(x - z) / s`` of the calibration rows, without the first
    `skip_tokens` tokens of each sample. There a range spans the central `keep_fraction` of the
    entries, and what lies outside of it does not count; in use, numbers out of range take the
    nearest level unless a codec around this one keeps them. `weight` "fisher_scaled" is F s^2, with
    F the squared gradient of the loss (the paper's appendix); "fisher" is F (the official code);
    "none" needs no gradients. `levels` "even" spaces the levels evenly over [-1, 1] instead, which is
    what the paper compares with. With `q_norm`, levels are decoded as ``alpha * c + beta``, which
    restores the mean and the standard deviation that rounding changes.

    Payload for [..., T, D]: "codes" uint8 [..., T, ceil(D*bits/8)]; along tokens "centre" and
    "scale" float16 [..., T, 1]. State: "codebook" float16 [2^bits], ascending; along channels
    "centre" and "scale" float16 [K, D]; with `q_norm` "norm" float32 [2], alpha and beta. Source:
    KVQuant, arXiv 2401.18079, sections 3.3 to 3.6 and appendices on nuqX and Q-Norm.
    """

    bits: int = field(default=4, metadata={"minimum": 1, "maximum": 8})
    axis: Literal["channel", "token"] = "channel"
    weight: Literal["fisher_scaled", "fisher", "none"] = "fisher_scaled"
    levels: Literal["learned", "even"] = "learned"
    q_norm: bool = False
    keep_fraction: float = field(default=0.99, metadata={"minimum": 0.5, "maximum": 1.0})
    skip_tokens: int = field(default=1, metadata={"minimum": 0})

    def requires(self) -> frozenset[Stat]:
        """Rows, and their gradients where these weigh them."""
        weighed = self.weight != "none" and self.levels == "learned"
        return frozenset({Stat("rows")} | ({Stat("rows", of="gradient")} if weighed else set()))

    def for_rows(self, rows: int) -> Codebook:
        """Itself; whether the channels make up for few tokens shows in `fit`.

        Raises:
            RecipeError: no range can be measured on so few tokens.
        """
        if rows < self.skip_tokens + 2:
            raise RecipeError(
                f"codebook cannot learn from {rows} calibration tokens, of which it skips {self.skip_tokens}",
                hint=f"calibrate on {self.skip_tokens + 2} tokens or more",
            )
        return self

    def fit(self, stats: Stats) -> State:
        """Ranges, codebook and norm.

        Raises:
            KvpackError: rows are missing or not finite, or fewer numbers than levels are left.
        """
        rows, gradient = self._rows(stats)
        dim = 1 if self.axis == "channel" else 2
        lower, upper = ops.outliers.central_range(rows, self.keep_fraction, dim)
        centre, scale = ops.codebook.middle(lower, upper)
        counts = (rows >= lower.unsqueeze(dim)) & (rows <= upper.unsqueeze(dim))
        counts &= scale.unsqueeze(dim) > 0
        points = ops.codebook.normalised(rows, centre.unsqueeze(dim), scale.unsqueeze(dim))[counts]
        if gradient is not None:
            factor = scale.float().unsqueeze(dim) if self.weight == "fisher_scaled" else 1.0
            gradient = (gradient * factor)[counts]
        codebook = self._codebook(points, gradient).half()
        state = {"codebook": codebook}
        if self.axis == "channel":
            state |= {"centre": centre, "scale": scale}
        if self.q_norm:
            state["norm"] = ops.codebook.norm(points, codebook)
        return state

    def state_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """Codebook, and what goes with it."""
        state = {"codebook": TensorSpec((2**self.bits,), "float16")}
        if self.axis == "channel":
            channels = TensorSpec((shape[-3], shape[-1]), "float16")
            state |= {"centre": channels, "scale": channels}
        if self.q_norm:
            state["norm"] = TensorSpec((2,), "float32")
        return state

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Codes, and along tokens one range each."""
        *outer, channels = shape
        payload = {"codes": TensorSpec((*outer, (channels * self.bits + 7) // 8), "uint8")}
        if self.axis == "token":
            ranges = TensorSpec((*outer, 1), "float16")
            payload |= {"centre": ranges, "scale": ranges}
        return payload

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Normalise and take the nearest level."""
        tensors: State = {}
        if self.axis == "token":
            numbers = x.float().nan_to_num(0.0)
            centre, scale = ops.codebook.middle(numbers.amin(-1, True), numbers.amax(-1, True))
            tensors = {"centre": centre, "scale": scale}
        else:
            centre, scale = (ops.rows.per_channel(state[name], x) for name in ("centre", "scale"))
        levels = ops.codebook.normalised(x.float(), centre, scale)
        codes = ops.kmeans.nearest(levels, state["codebook"].float()).to(torch.uint8)
        return Payload({"codes": ops.bits.pack(codes, self.bits), **tensors}, tuple(x.shape))

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """``z + s * c[q]``, with the norm where there is one."""
        return kernels.rows.dense(self.token_rows(payload, state)).to(dtype)

    def token_rows(self, payload: Payload, state: State) -> TokenRows:
        """Codes, levels and ranges."""
        codes, levels = payload.tensors["codes"], state["codebook"].float()
        if self.q_norm:
            levels = state["norm"][0] * levels + state["norm"][1]
        if self.axis == "token":
            centre, scale = (payload.tensors[name] for name in ("centre", "scale"))
        else:
            centre, scale = (ops.rows.per_channel(state[name], codes) for name in ("centre", "scale"))
        return TokenRows(LevelCodes(codes, levels, centre, scale, self.bits, payload.shape[-1]))

    def _codebook(self, points: Tensor, gradient: Tensor | None) -> Tensor:
        if self.levels == "even":
            return torch.linspace(-1, 1, 2**self.bits)
        self._check(points)
        weights = None
        if gradient is not None:
            # Gradients are tiny: their squares would leave the range of float32.
            weights = (gradient / gradient.abs().max().clamp(min=1e-38)).square()
        return ops.kmeans.fit(points, weights, 2**self.bits)

    def _rows(self, stats: Stats) -> tuple[Tensor, Tensor | None]:
        """Rows [K, N, D] and gradients without the first tokens of the samples."""
        names = sorted(stat.name for stat in self.requires())
        found = [stats[name]["rows"] for name in names if name in stats]
        if len(found) < len(names) or not all(bool(rows.isfinite().all()) for rows in found):
            fact = "were not measured" if len(found) < len(names) else "are not finite"
            raise KvpackError(
                f"codebook: {' or '.join(names)} {fact}", hint="calibrate again with sound text and weights"
            )
        late = stats["rows"]["position"] >= self.skip_tokens
        if not bool(late.any()):
            raise KvpackError(
                f"codebook skips the first {self.skip_tokens} tokens of each sample, which is all of them",
                hint=f"set calibration.sample_tokens to {2 * self.skip_tokens} or more",
            )
        kept = {name: rows[:, late] for name, rows in zip(names, found, strict=True)}
        return kept["rows"], kept.get("gradient.rows")

    def _check(self, points: Tensor) -> None:
        if points.numel() < 2**self.bits:
            fits = points.numel().bit_length() - 1
            raise KvpackError(
                f"codebook: {2**self.bits} levels cannot be learned from {points.numel()} numbers",
                hint=f"calibrate on more tokens, or set bits to {fits}" if fits > 0 else "use more tokens",
            )
