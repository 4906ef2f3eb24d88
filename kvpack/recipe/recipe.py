"""The recipe: which parts answer which question, for which tensors.

These dataclasses are the schema. The strict loader (`load.py`), the JSON Schema
(`json_schema.py`) and the manifest are all derived from their fields and metadata, so that a key
exists in one place only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvpack.core.errors import RecipeError
from kvpack.core.roles import Allocator, Codec, Packer, Retriever, Solver, Thresholds, TierPolicy, Transform


@dataclass(frozen=True)
class Paper:
    """The publication that a recipe implements."""

    title: str
    arxiv: str = ""


@dataclass(frozen=True)
class Fidelity:
    """How close a recipe is to its paper, and where it departs from it."""

    level: Literal["faithful", "adapted", "reconstruction", "original"]
    deviations: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlaneRecipe:
    """Transforms that run on keys or on values before the codec, in order.

    `fold` moves them into the projections, which costs nothing at run time; only linear transforms
    with a dual can be folded, and into keys only those that commute with RoPE. Keys that a norm
    follows are not folded: their transforms run as tokens are stored, to the same effect.
    """

    transforms: tuple[Transform, ...] = ()
    fold: bool = False


@dataclass(frozen=True)
class Tier:
    """Where tokens go: a codec for keys and one for values.

    In YAML, `codec:` stands for both.
    """

    key: Codec
    value: Codec


@dataclass(frozen=True)
class DifferenceRecipe:
    """Store a layer's input as its difference from the reconstructed input of the layer before.

    The first `base_layers` layers are stored as they are, by the codec `base`; the others by the
    tiers'. Source: XQuant-CL, arXiv 2508.10395.
    """

    base: Codec
    base_layers: int = field(default=3, metadata={"minimum": 1})


@dataclass(frozen=True)
class InputsRecipe:
    """Store the input X [T, C] of the attention projections; keys and values are made again from it.

    `basis`: "none" stores X itself, as one plane, by the value codecs. "svd" stores X in the left
    singular bases of W_k and W_v, by the key and the value codecs; with `difference` in the one
    basis of [W_k|W_v], by the value codecs. "auto" takes X itself where it is no wider than keys
    and values together, C <= 2*K*D, else "svd". `tap`: "post_norm" is X as the projections get it,
    "residual" the input of the decoder layer, whose norm is applied again; it is stored as it is.
    Source: XQuant, arXiv 2508.10395.
    """

    basis: Literal["auto", "none", "svd"] = "auto"
    tap: Literal["post_norm", "residual"] = "post_norm"
    difference: DifferenceRecipe | None = None


@dataclass(frozen=True)
class IndexRecipe:
    """Codes of keys, kept only to score them: transforms, then a codec."""

    codec: Codec
    transforms: tuple[Transform, ...] = ()


@dataclass(frozen=True)
class RetrievalRecipe:
    """Queries read chosen tokens only; layers with a sliding window are left alone.

    `residency` "cpu" keeps keys and values in CPU memory, whatever device the model is on.
    """

    retriever: Retriever
    index: IndexRecipe
    residency: Literal["model", "cpu"] = "model"


@dataclass(frozen=True)
class KVCacheRecipe:
    """The KV-cache scheme; with `inputs` it stores those instead of keys and values."""

    tiers: Mapping[str, Tier]
    policy: TierPolicy
    key: PlaneRecipe = PlaneRecipe()
    value: PlaneRecipe = PlaneRecipe()
    inputs: InputsRecipe | None = None
    retrieve: RetrievalRecipe | None = None


@dataclass(frozen=True)
class BasisRule:
    """Change the basis of a tensor inside the model, so that weights and inputs are easier to compress.

    What the model computes stays the same. `at`: "residual" (the stream between the blocks),
    "attention_input", "attention_output" (in front of the output projection, head by head),
    "mlp_input", or "mlp_middle" (in front of the last layer of an MLP). The transforms become part of
    norms, embeddings and weights; with `online` they run on the layers' input, which only packed
    layers can do. The rules are applied in order.
    """

    at: Literal["residual", "attention_input", "attention_output", "mlp_input", "mlp_middle"]
    transforms: tuple[Transform, ...]
    online: bool = False


@dataclass(frozen=True)
class WeightRule:
    """What happens to the linear layers that `match` selects; the first matching rule wins.

    `match` is a glob over path segments ("layers.*.mlp.up_proj"; `*` is one segment, `**` any
    number, `{a,b}` alternatives; leading segments may be left out), a fully anchored expression
    ("re:..."), or a role: "@linear" (all in decoder blocks), "@attention", "@mlp", "@q" ...,
    "@embedding", "@lm_head", "@vocabulary" (those two), "@all". Embedding and head that are tied are
    one tensor: the first rule that matches either of them holds for both.

    `inputs` is a codec for what the layers are given, each token on its own as it comes: 8-bit
    activations, for example.
    """

    match: str
    keep: bool = False
    codec: Codec | None = None
    solver: Solver | None = None
    inputs: Codec | None = None


@dataclass(frozen=True)
class BudgetRecipe:
    """What packed weights may take, and what decides who gets how many bits.

    The target is `target_bytes` for all weights of the artifact, or `target_bpw`, stored bits per
    element with scales, zeros and everything else: of all parameters, those that are copied among
    them, or with `counts` "packed" of the packed layers only. Every packed layer whose codec has
    `bits` gets one of the `widths`, so that the sum of losses that `allocator` finds is the least
    within the target: of all layers ("model"), or of every decoder block within its share ("block",
    where what a block leaves over passes to the next).

    Losses are measured on the first `samples` samples of the calibration text, in the uncompressed
    model. `rounding` tells what stands for a layer at a width: codes rounded to nearest ("nearest");
    codes of its own solver ("solver"), which takes as much time per width as solving once; or
    ("solver_once") rounding to nearest, by the factor that the solver gains at the smallest width,
    which hardly depends on the width where grids are even.

    `bits` are the widths by layer that were found; where they are given, nothing is measured.
    """

    allocator: Allocator
    target_bpw: float | None = field(default=None, metadata={"minimum": 0.05, "maximum": 32.0})
    target_bytes: int | None = field(default=None, metadata={"minimum": 1})
    counts: Literal["all", "packed"] = "all"
    scope: Literal["model", "block"] = "model"
    widths: tuple[int, ...] = field(default=(2, 3, 4, 5, 6, 8), metadata={"minimum": 1, "maximum": 16})
    rounding: Literal["nearest", "solver", "solver_once"] = "solver_once"
    samples: int = field(default=32, metadata={"minimum": 1})
    bits: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.target_bpw is not None and self.target_bytes is not None:
            raise RecipeError("target_bpw and target_bytes are both given", hint="leave one of them out")
        if self.counts == "packed" and self.target_bytes is not None:
            raise RecipeError("target_bytes counts all weights", hint="leave out counts: packed")
        if not self.widths or len(set(self.widths)) < len(self.widths):
            raise RecipeError("widths names no width, or one of them twice", hint="widths: [2, 3, 4, 6, 8]")

    @property
    def open(self) -> bool:
        """Whether there is a target, and the bits have yet to be spent."""
        return self.bits is None and (self.target_bpw is not None or self.target_bytes is not None)


@dataclass(frozen=True)
class StorageRecipe:
    """How packed weights are stored: losslessly coded, in blocks of `block_bytes`, each checksummed.

    A tensor that would not save the share `gain` is stored as it is. Copied tensors are not coded.
    """

    packer: Packer
    block_bytes: int = field(default=1 << 20, metadata={"minimum": 4096, "maximum": 1 << 24})
    gain: float = field(default=0.02, metadata={"minimum": 0.0, "maximum": 1.0})

    def __post_init__(self) -> None:
        if self.block_bytes % 8:
            raise ValueError("block_bytes: not a multiple of 8")


@dataclass(frozen=True)
class SparseInputRule:
    """Linear layers that are given only the large numbers of their input; `match` as in `WeightRule`.

    The first matching rule wins; without `thresholds` the input stays as it is.
    """

    match: str
    thresholds: Thresholds | None = None


@dataclass(frozen=True)
class SparsityRecipe:
    """Small numbers inside the decoder blocks become zero, and what they would meet is not read.

    `gate` is for the activated gate of every FFN: rows of the up projection and columns of the down
    projection are skipped. `inputs` are for what linear layers are given: columns are skipped.

    `prefill`: "dense" leaves several tokens of one row (a prompt) as they are, "masked" makes them
    sparse, too. Both save time only where tokens come one by one.
    """

    gate: Thresholds | None = None
    inputs: tuple[SparseInputRule, ...] = ()
    prefill: Literal["dense", "masked"] = "dense"


@dataclass(frozen=True)
class CalibrationRecipe:
    """The text that statistics are measured on, and how.

    `sequential`: every layer is measured behind the packed layers before it, those of its own decoder
    block included (GPTQ's "true sequential"). Otherwise all layers of a block are measured in the
    unpacked block, whose input comes from packed ones; so are keys and values then.
    """

    data: str = "builtin:stdlib"
    samples: int = field(default=128, metadata={"minimum": 1})
    sample_tokens: int = field(default=512, metadata={"minimum": 8})
    batch: int = field(default=8, metadata={"minimum": 1})
    seed: int = 0
    sequential: bool = True


@dataclass(frozen=True)
class Recipe:
    """A validated recipe, ready to be resolved against a model."""

    kvpack: int
    name: str
    summary: str = ""
    paper: Paper | None = None
    fidelity: Fidelity | None = None
    basis: tuple[BasisRule, ...] = ()
    weights: tuple[WeightRule, ...] = ()
    budget: BudgetRecipe | None = None
    kv_cache: KVCacheRecipe | None = None
    storage: StorageRecipe | None = None
    sparsity: SparsityRecipe | None = None
    calibration: CalibrationRecipe = CalibrationRecipe()


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with its origin.

    `source` is the file's text, byte for byte; `resolved` the plain mapping after `extends`,
    variant and overrides; `sha256` the hash of its canonical JSON; `origins` tells for every key
    path of `resolved` where its value came from ("kivi.yaml:14", "--set", "default").
    """

    recipe: Recipe
    path: str
    source: str
    variant: str | None
    overrides: tuple[str, ...]
    resolved: Mapping[str, Any]
    sha256: str
    origins: Mapping[str, str]
