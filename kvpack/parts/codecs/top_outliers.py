"""A fixed number of extreme entries per vector kept exact, the rest left to another codec."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from kvpack import ops
from kvpack.core.errors import KvpackError, RecipeError
from kvpack.core.lazy import torch
from kvpack.core.nested import inside, prefixed
from kvpack.core.roles import Codec
from kvpack.core.rows import Outliers, TokenRows
from kvpack.core.types import Payload, Shape, Stat, State, Stats, TensorSpec
from kvpack.kernels.codecs import RowCodec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TopOutliers(RowCodec):
    """Takes the extreme entries out of every vector and gives the rest to `codec`.

    A vector of n entries gives up ceil(keep/2*n) at each end, at least one, and never more:
    ties are broken by rank. What is taken leaves the vector's `fill` behind, the median or mean of
    its other entries, and comes back on decoding, rounded to `dtype` only (numbers beyond its range
    become its largest). Vectors run along the channels of one token ("channel": tokens stand
    alone), or along the tokens of a segment ("token": one vector per channel, segments of at most
    `segment_tokens`).

    `select` "rank" takes the largest and the smallest numbers. "threshold" knows the range that
    the central `1 - keep` of every channel fills in calibration, and takes the same total number
    from each token, those farthest from the middle of their channel's range in units of its half
    width. That fills every slot, also where fewer entries leave their range; where more do, the
    least extreme of them go to `codec`, as under the paper's cap.

    Payload for [..., T, D] with k = both ends: "outliers" and "places" [..., T, k] ("channel") or
    [..., k, D] ("token"); places are uint8, int16 or int32, as the vector's length asks. The rest
    is `codec`'s, named "codec.…". State: "lower" and "upper" float16 [K, D] for "threshold", and
    `codec`'s. `codec` is fitted to whole vectors. Sources: KVQuant, arXiv 2401.18079, section 3.4;
    GEAR, arXiv 2403.05527, section 3.

    Raises:
        RecipeError: thresholds along tokens, or segments that do not hold whole token blocks.
    """

    codec: Codec
    keep: float = field(default=0.01, metadata={"minimum": 0.0, "maximum": 1.0})
    axis: Literal["channel", "token"] = "channel"
    select: Literal["rank", "threshold"] = "rank"
    fill: Literal["median", "mean"] = "median"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    segment_tokens: int = field(default=4096, metadata={"minimum": 1})

    def __post_init__(self) -> None:
        if self.select == "threshold" and self.axis == "token":
            raise RecipeError(
                "thresholds belong to channels and choose among the channels of a token",
                hint="use axis: channel with select: threshold",
            )
        if self.segment % self.token_block:
            raise RecipeError(
                f"segments of {self.segment} tokens do not hold whole blocks of {self.token_block}",
                hint="make segment_tokens a multiple of the codec's token block",
            )

    @property
    def token_block(self) -> int:
        """That of `codec`."""
        return self.codec.token_block

    @property
    def segment(self) -> int:
        """`segment_tokens` along tokens, or a shorter one of `codec`; along channels `codec`'s."""
        own = self.segment_tokens if self.axis == "token" else 0
        return min((s for s in (own, self.codec.segment) if s), default=0)

    def requires(self) -> frozenset[Stat]:
        """What `codec` asks for, and the rows where there are thresholds."""
        own = {Stat("rows")} if self.select == "threshold" else set()
        return self.codec.requires() | own

    def fit(self, stats: Stats) -> State:
        """Thresholds of every channel, and `codec`'s state.

        Raises:
            KvpackError: the rows are missing or not finite.
        """
        state = prefixed("codec", self.codec.fit(stats))
        if self.select == "rank":
            return state
        rows = stats["rows"]["rows"] if "rows" in stats else None
        if rows is None or not bool(rows.isfinite().all()):
            fact = "were not measured" if rows is None else "are not finite"
            raise KvpackError(f"the rows {fact}", hint="calibrate again with sound text and weights")
        lower, upper = ops.outliers.central_range(rows, 1 - self.keep, 1)
        low = ops.affine.round_towards(lower, torch.float16, up=False)
        return {**state, "lower": low, "upper": ops.affine.round_towards(upper, torch.float16, up=True)}

    def state_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """Thresholds of every channel, and `codec`'s state."""
        state = prefixed("codec", self.codec.state_spec(shape))
        if self.select == "rank":
            return state
        threshold = TensorSpec((shape[-3], shape[-1]), "float16")
        return {**state, "lower": threshold, "upper": threshold}

    def spec(self, shape: Shape, dtype: str = "float16") -> dict[str, TensorSpec]:
        """Outliers, their places, and the payload of `codec`."""
        *outer, tokens, channels = shape
        length = channels if self.axis == "channel" else tokens
        count = sum(ops.outlier_counts.sides(self.keep, length))
        kept = (*outer, tokens, count) if self.axis == "channel" else (*outer, count, channels)
        return {
            "outliers": TensorSpec(kept, self.dtype),
            "places": TensorSpec(kept, ops.outlier_counts.index_dtype(length)),
            **prefixed("codec", self.codec.spec(shape, dtype)),
        }

    def encode(self, x: Tensor, state: State, valid: Tensor | None = None) -> Payload:
        """Take out the extreme entries, then encode the rest."""
        dim, counted = self._dim, None
        rest = x.float().nan_to_num(0.0)
        if valid is not None and self.axis == "token":
            counted = ops.rows.mask(valid, x)
        places = self._places(rest, state, counted)
        limit = torch.finfo(getattr(torch, self.dtype)).max
        outliers = rest.gather(dim, places).clamp(-limit, limit).to(getattr(torch, self.dtype))
        rest = ops.outliers.replaced(rest, places, dim, self.fill, counted)
        index = getattr(torch, ops.outlier_counts.index_dtype(x.shape[dim]))
        inner = self.codec.encode(rest, inside("codec", state), valid)
        own = {"outliers": outliers, "places": places.to(index)}
        return Payload({**own, **prefixed("codec", inner.tensors)}, tuple(x.shape))

    def decode(self, payload: Payload, state: State, dtype: torch.dtype) -> Tensor:
        """What `codec` decodes to, with the outliers put back."""
        inner = Payload(inside("codec", payload.tensors), payload.shape)
        x = self.codec.decode(inner, inside("codec", state), torch.float32)
        places, outliers = payload.tensors["places"].long(), payload.tensors["outliers"].float()
        return x.scatter(self._dim, places, outliers).to(dtype)

    @property
    def in_rows(self) -> bool:
        """Where outliers belong to tokens, around a codec that works in rows and keeps none itself."""
        return self.axis == "channel" and self.codec.in_rows and not isinstance(self.codec, TopOutliers)

    def token_rows(self, payload: Payload, state: State) -> TokenRows:
        """The rows of `codec`, with the outliers; decoded where these do not belong to tokens."""
        if not self.in_rows:
            return Codec.token_rows(self, payload, state)
        inner = Payload(inside("codec", payload.tensors), payload.shape)
        rows = self.codec.token_rows(inner, inside("codec", state))
        outliers = Outliers(payload.tensors["outliers"], payload.tensors["places"])
        return rows._replace(outliers=outliers)

    @property
    def _dim(self) -> int:
        return -1 if self.axis == "channel" else -2

    def _places(self, x: Tensor, state: State, counted: Tensor | None) -> Tensor:
        smallest, largest = ops.outlier_counts.sides(self.keep, x.shape[self._dim])
        if self.select == "rank":
            return ops.outliers.both_ends(x, smallest, largest, self._dim, counted)
        lower, upper = (ops.rows.per_channel(state[n], x).float() for n in ("lower", "upper"))
        return ops.outliers.farthest(x, lower, upper, smallest + largest)
