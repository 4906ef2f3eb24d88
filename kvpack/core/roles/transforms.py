"""The role of transforms: in which basis are the channels easiest to compress?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from kvpack.core.errors import RecipeError
from kvpack.core.roles.part import Part
from kvpack.core.rows import Step
from kvpack.core.types import Shape, Site, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from kvpack.core.roles.codecs import Codec


class Transform(Part, ABC):
    """A change of basis in which the channels are easier to compress.

    Laws, held by the contract tests: ``inverse(forward(x)) == x``, and where `dual` is not None
    ``<dual(q), forward(k)> == <q, k>`` per head. Inputs are [B, K, T, D]; the output may merge
    heads into wider ones ([B, K/g, T, g*D]) but keeps B and T.
    """

    linear: ClassVar[bool] = True
    """Linear in `x` and independent of the token, so that it can be folded into projections."""

    commutes_with_rope: ClassVar[bool] = False
    """``forward`` and `dual` may run before RoPE as well as after it, so that keys can be folded too."""

    needs_rope: ClassVar[bool] = False
    """Whether `forward` reads `Site.rope` and `Site.positions`."""

    diagonal: ClassVar[bool] = False
    """``forward`` multiplies every channel by a factor of its own."""

    permutes: ClassVar[bool] = False
    """``forward`` only puts channels in another order."""

    orthonormal: ClassVar[bool] = False
    """``forward`` multiplies by an orthonormal matrix, at least within one head."""

    fits_prompt: ClassVar[bool] = False
    """Whether a cache makes this transform's state from its first tokens, see `fit_prompt`."""

    def fit_prompt(self, x: Tensor, queries: Tensor, valid: Tensor | None, rows: Tensor | None) -> State:
        """State of one cache, from the tokens it is given first; it is frozen from then on.

        Args:
            x: what `forward` will be given [B, K, T, D].
            queries: the queries of the same tokens in the same basis [B, K, G*T, D], one kv head's
                query heads one after another.
            valid: tokens of `x` that are not padding [B, T]; None when all are.
            rows: the same for `queries` [B, G*T].

        Returns:
            Tensors with the batch axis first. Until there are any, `forward` must change nothing.
        """
        return {}

    def prompt_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """Shapes of what `fit_prompt` returns for an `x` of `shape`; empty by default."""
        return {}

    def shape(self, shape: Shape) -> Shape:
        """Shape of `forward`'s output for an input of `shape`; unchanged by default."""
        return shape

    def for_codec(self, codec: Codec | None) -> Transform:
        """This transform, knowing which codec the weights in its basis will get; itself by default.

        None where none of them is packed.
        """
        return self

    @abstractmethod
    def forward(self, x: Tensor, state: State, at: Site) -> Tensor:
        """Into the compressible basis. Computes in float32."""

    @abstractmethod
    def inverse(self, z: Tensor, state: State, at: Site) -> Tensor:
        """Back to the model's basis. Computes in float32; the input's head layout is restored."""

    def dual(self, q: Tensor, state: State, at: Site) -> Tensor | None:
        """The query-side partner of `forward`, or None when there is none."""
        return None

    def gradient(self, g: Tensor, state: State, at: Site) -> Tensor:
        """Gradients with respect to `forward`'s input [B, K, T, D] -> with respect to its output.

        The chain rule makes this the transposed inverse, which is what `dual` is.

        Raises:
            RecipeError: the transform cannot map gradients.
        """
        return self._partner(g, state, at, "cannot map gradients", "the gradients")

    def query(self, q: Tensor, state: State, at: Site) -> Tensor:
        """Queries [B, K, T, D] in this basis, for scores that may be approximate: `dual` by default.

        Raises:
            RecipeError: the transform has no query side.
        """
        return self._partner(q, state, at, "has no query side", "to know the queries")

    def _partner(self, x: Tensor, state: State, at: Site, lack: str, wanted: str) -> Tensor:
        found = self.dual(x, state, at)
        if found is None:
            raise RecipeError(
                f"transform {type(self).__name__} {lack}",
                why=f"a part after it wants {wanted} in its basis",
            )
        return found


class RowTransform(Transform):
    """A transform whose `inverse` takes every token alone, in steps that compiled loops know."""

    @abstractmethod
    def row_steps(self, state: State, at: Site, channels: int) -> tuple[Step, ...]:
        """What `inverse` does to a row, all heads side by side.

        Args:
            state: what the transform has learned.
            at: layer, positions and rotary embedding.
            channels: of one head of `forward`'s input.
        """


class UnropedTransform(Transform):
    """Keys as they were before RoPE; a subclass says what queries see."""

    linear: ClassVar[bool] = False
    needs_rope: ClassVar[bool] = True

    kind: ClassVar[str]
    """Its name in recipes, for messages."""

    def forward(self, x: Tensor, state: State, at: Site) -> Tensor:
        """Rotate keys [B, K, T, D] back to position 0."""
        rope, positions = at.rotary(self.kind)
        return rope.undo(x, positions)

    def inverse(self, z: Tensor, state: State, at: Site) -> Tensor:
        """Rotate `z` to its positions again."""
        rope, positions = at.rotary(self.kind)
        return rope.apply(z.float(), positions)

    def gradient(self, g: Tensor, state: State, at: Site) -> Tensor:
        """Gradients rotate as keys do, but for the length of the rotation, which is one."""
        return self.forward(g, state, at)


class DiagonalTransform(Transform):
    """z = x / s with a factor s per channel; what reads x is multiplied by s.

    A subclass says how s is found (`fit`). State: "factor" float32 [K, D].
    """

    diagonal: ClassVar[bool] = True

    def state_spec(self, shape: Shape) -> dict[str, TensorSpec]:
        """One factor per channel."""
        return {"factor": TensorSpec((shape[-3], shape[-1]), "float32")}

    def forward(self, x: Tensor, state: State, at: Site) -> Tensor:
        """Divide."""
        return x.float() / state["factor"].unsqueeze(-2)

    def inverse(self, z: Tensor, state: State, at: Site) -> Tensor:
        """Multiply."""
        return z.float() * state["factor"].unsqueeze(-2)

    def dual(self, q: Tensor, state: State, at: Site) -> Tensor:
        """Multiply; `q` may have several heads per kv head."""
        repeat = q.shape[1] // state["factor"].shape[0]
        return q.float() * state["factor"].repeat_interleave(repeat, 0).unsqueeze(-2)
