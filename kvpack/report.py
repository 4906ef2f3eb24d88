"""Bytes and bits, counted from what is stored, and texts to print them.

`bits` is the width of a code; `bits per element` counts everything stored for it: scales, zeros,
indices, the exact window, protected tokens and padding. No torch: plans and manifests suffice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from kvpack.core.errors import RecipeError
from kvpack.core.types import TensorSpec
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.patterns import outside
from kvpack.recipe.plan import Plan
from kvpack.recipe.recipe import LoadedRecipe
from kvpack.recipe.reference_shape import PROMPT_TOKENS, reference_model
from kvpack.recipe.resolve import resolve

PROTECTED_INDEX_BYTES = 8
"""Row and slot of one protected token, two int32."""
MANY_TOKENS = 20 * 4096
"""A prompt that is long enough to tell the share of each tier."""
POSITION_BYTES = 4
"""One int32 position per token, shared by all layers."""


def kv_elements(layers: Iterable[KVLayerPlan], tokens: int) -> int:
    """Numbers that the uncompressed cache holds for one sequence of `tokens`."""
    return sum(2 * x.attention.kv_heads * x.attention.head_dim * x.visible_tokens(tokens) for x in layers)


def kv_bytes_per_token(layers: Iterable[KVLayerPlan], dtype: str) -> Fraction:
    """Bytes that one more encoded token costs in the end, all layers: codes and their scales.

    That is what it takes in the last tier (where tokens are ranked, in the mixture of tiers), in
    segments of full length, without the constant part (window, protected tokens): a fraction, because
    a token block may hold one scale for many tokens.
    """
    total = Fraction(0)
    for layer in layers:
        for name in layer.planes:
            plane = layer.plane(name)
            if layer.ranked(name):
                shares = layer.policy.placement(MANY_TOKENS, plane.block, name)
                total += Fraction(plane.coded_nbytes(layer.plane_shape(name, 1), shares, dtype), MANY_TOKENS)
                continue
            codec = plane.codecs[-1]
            block = max(codec.token_block, codec.segment // codec.token_block * codec.token_block)
            specs = codec.spec(plane.coded_shape(layer.plane_shape(name, block)), dtype)
            total += Fraction(sum(s.nbytes for s in specs.values()), block)
        total += _index_bytes(layer, 1, dtype)
    return total


def _index_bytes(layer: KVLayerPlan, tokens: int, dtype: str) -> int:
    """Bytes of the codes that tokens are found by; 0 where none are retrieved."""
    if layer.retrieval is None:
        return 0
    return layer.retrieval.index.coded_nbytes(layer.plane_shape("key", 1), (tokens,), dtype)


def most_read(layers: Sequence[KVLayerPlan], tokens: int) -> float | None:
    """The largest share of `tokens` tokens that one query head reads where tokens are retrieved.

    None without retrieval.
    """
    found = [x.retrieval.retriever.most(tokens) for x in layers if x.retrieval is not None]
    return max(found) / tokens if found else None


@dataclass(frozen=True)
class KVBytes:
    """What a compressed cache holds for one sequence of `tokens`.

    `coded` are codes with scales, `exact` the tail in the model's dtype, `protected` an upper
    bound for sink tokens, `positions` the shared token positions, `index` the codes that tokens are
    found by, `ranking` what decides between tiers (masks, scores, and scales that a cache fits to
    its prompt). Of these, `on_cpu` are not on the model's device.
    """

    tokens: int
    elements: int
    coded: int
    exact: int
    protected: int
    positions: int
    index: int = 0
    on_cpu: int = 0
    ranking: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        held = self.coded + self.exact + self.protected + self.positions
        return held + self.index + self.ranking

    @property
    def on_device(self) -> int:
        """Bytes on the model's device."""
        return self.total - self.on_cpu

    @property
    def bits_per_element(self) -> float:
        """Stored bits over logical elements."""
        return 8 * self.total / self.elements


def kv_bytes(layers: Sequence[KVLayerPlan], tokens: int, dtype: str) -> KVBytes:
    """Bytes of the cache after a prompt of `tokens` given in one piece, batch 1."""
    coded = exact = protected = index = on_cpu = ranking = 0
    for layer in layers:
        before = coded + exact + protected
        heads, channels = layer.attention.kv_heads, layer.attention.head_dim
        token = TensorSpec((1, heads, 1, channels), dtype).nbytes
        kept = min(layer.policy.protected_tokens(), layer.visible_tokens(tokens))
        protected += kept * (2 * token + PROTECTED_INDEX_BYTES)
        for name in layer.planes:
            shape = layer.plane_shape(name, 1)
            stored, tail = layer.held_tokens(tokens, name)
            coded += layer.plane(name).coded_nbytes(shape, stored, dtype)
            exact += tail * TensorSpec(shape, dtype).nbytes
            ranking += layer.plane(name).fitted_nbytes(shape)
        ranking += layer.ranking_nbytes(tokens)
        index += _index_bytes(layer, tokens, dtype)
        if layer.retrieval is not None and layer.retrieval.residency == "cpu":
            on_cpu += coded + exact + protected - before
    positions = tokens * POSITION_BYTES if layers else 0
    elements = kv_elements(layers, tokens)
    return KVBytes(tokens, elements, coded, exact, protected, positions, index, on_cpu, ranking)


@dataclass(frozen=True)
class WeightBytes:
    """Stored bytes of a plan's weights and what they come to per parameter."""

    packed: int
    packed_elements: int
    copied: int
    parameters: int
    source: int

    @property
    def total(self) -> int:
        """All weight bytes of the artifact."""
        return self.packed + self.copied

    @property
    def packed_bits(self) -> float:
        """Bits per element of the packed layers alone; 0 when nothing is packed."""
        return 8 * self.packed / self.packed_elements if self.packed_elements else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Bits per parameter, embeddings, norms and biases included."""
        return 8 * self.total / self.parameters


def weight_bytes(plan: Plan) -> WeightBytes:
    """Count a plan's weights; equals the exported artifact's tensors to the byte."""
    packed = sum(w.nbytes for w in plan.weights.values())
    elements = sum(w.linear.shape[0] * w.linear.shape[1] for w in plan.weights.values())
    copied = sum(t.nbytes for t in plan.copied.values())
    if plan.sparsity is not None:
        copied += sum(t.nbytes for t in plan.sparsity.tensors().values())
    return WeightBytes(packed, elements, copied, plan.model.parameters, plan.model.nbytes)


@dataclass(frozen=True)
class ReferenceBits:
    """Stored bits per element of a recipe at the reference shape, everything counted.

    `kv` after a prompt of 4096 tokens and `weights` over all linear layers of the decoder blocks;
    None for what the recipe leaves alone. `refused` tells why the shape does not suit the recipe.
    """

    kv: float | None = None
    weights: float | None = None
    refused: str | None = None


def reference_bits(loaded: LoadedRecipe) -> ReferenceBits:
    """What a recipe takes, before there is a model: counted at `kvpack.recipe.reference_shape`."""
    try:
        plan = reference_plan(loaded)
    except RecipeError as error:
        return ReferenceBits(refused=error.message)
    kv = kv_bytes(plan.kv, PROMPT_TOKENS, plan.model.dtype).bits_per_element if plan.kv else None
    return ReferenceBits(kv, weight_bytes(plan).bits_per_weight if plan.weights else None)


def reference_plan(loaded: LoadedRecipe) -> Plan:
    """A recipe at the reference shape, which has no embedding and no head: without rules for those.

    Raises:
        RecipeError: the shape does not suit the recipe.
    """
    rules = tuple(rule for rule in loaded.recipe.weights if not outside(rule.match))
    return resolve(replace(loaded, recipe=replace(loaded.recipe, weights=rules)), reference_model())


def human_bytes(count: float) -> str:
    """`5_300_000_000` -> ``"5.30 GB"``: decimal units, three significant digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return (
        f"{count:.0f} {unit}"
        if unit == "B"
        else f"{count:.3g} {unit}"
        if count >= 100
        else f"{count:.2f} {unit}"
    )
