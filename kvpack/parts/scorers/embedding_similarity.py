"""How well a token's input embedding fits those of the text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from kvpack.core.errors import KvpackError
from kvpack.core.lazy import torch
from kvpack.core.roles import Scorer
from kvpack.core.types import ScoreView, State, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class EmbeddingSimilarity(Scorer):
    """``s_i = mean over text tokens j of <e_i, e_j>`` with the model's input embeddings e.

    The text tokens are those of the same forward pass that the caller's token types mark, padding
    not counted. Without token types, or without text in the pass, the `question_tokens` newest
    tokens stand for the question, so that a text model ranks its context by its end. All heads of
    all layers get the same scores. Source: VidKV, arXiv 2503.16257, section 3.3 (semantic token
    protection), which ranks visual tokens only and switches it off without a question.

    Sums: "similarity" float32 [B, 1, T]; every token is scored once, in the pass that brings it.
    """

    question_tokens: int = field(default=32, metadata={"minimum": 1})

    needs: ClassVar[Literal["queries", "embeddings"]] = "embeddings"

    @property
    def cut_free(self) -> bool:
        """False: the text of a pass depends on where passes begin."""
        return False

    def observe(self, view: ScoreView) -> State:
        """Similarities of this pass's tokens.

        Raises:
            KvpackError: the view lacks embeddings.
        """
        if view.embeddings is None:
            raise KvpackError(
                f"layer {view.layer}: embedding_similarity was not shown the input embeddings",
                hint="run the model through kvpack.load, which installs the hook that passes them on",
            )
        x = view.embeddings.detach().float()
        valid = view.valid if view.valid is not None else x.new_ones(x.shape[:2], dtype=torch.bool)
        age = valid.long().flip(-1).cumsum(-1).flip(-1)
        text = valid & (age <= self.question_tokens)
        if view.text is not None:
            told = valid & view.text.bool()
            text = torch.where(told.any(-1, keepdim=True), told, text)
        weight = text.float() / text.sum(-1, keepdim=True).clamp(min=1)
        mean = torch.einsum("bt,btc->bc", weight, x)
        return {"similarity": torch.einsum("btc,bc->bt", x, mean).unsqueeze(1)}

    def score(self, observed: State) -> Tensor:
        """The similarities."""
        return observed["similarity"]

    def observed_spec(self, kv_heads: int, tokens: int) -> dict[str, TensorSpec]:
        """Four bytes per token."""
        return {"similarity": TensorSpec((1, 1, tokens), "float32")}
