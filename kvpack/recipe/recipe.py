"""The recipe: which parts answer which question, for which tensors.

These dataclasses are the schema. The strict loader (`load.py`), the JSON Schema
(`json_schema.py`) and the manifest are all derived from their fields and metadata, so that a key
exists in one place only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvpack.core.roles import Codec, Retriever, Solver, TierPolicy, Transform


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
class WeightRule:
    """What happens to the linear layers that `match` selects; the first matching rule wins.

    `match` is a glob over path segments ("layers.*.mlp.up_proj"; `*` is one segment, `**` any
    number, `{a,b}` alternatives; leading segments may be left out), a fully anchored expression
    ("re:..."), or a role: "@linear" (all in decoder blocks), "@attention", "@mlp", "@q" ...

    `inputs` is a codec for what the layers are given, each token on its own as it comes: 8-bit
    activations, for example.
    """

    match: str
    keep: bool = False
    codec: Codec | None = None
    solver: Solver | None = None
    inputs: Codec | None = None


@dataclass(frozen=True)
class CalibrationRecipe:
    """The text that statistics are measured on."""

    data: str = "builtin:stdlib"
    samples: int = field(default=128, metadata={"minimum": 1})
    sample_tokens: int = field(default=512, metadata={"minimum": 8})
    batch: int = field(default=8, metadata={"minimum": 1})
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """A validated recipe, ready to be resolved against a model."""

    kvpack: int
    name: str
    summary: str = ""
    paper: Paper | None = None
    fidelity: Fidelity | None = None
    weights: tuple[WeightRule, ...] = ()
    kv_cache: KVCacheRecipe | None = None
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
