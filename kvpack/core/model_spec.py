"""What is known of a model before any weight is read: pure data, made by `kvpack.models`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kvpack.core.types import Shape, TensorSpec


@dataclass(frozen=True)
class SourceTensor(TensorSpec):
    """One tensor of the checkpoint: its shape and dtype, and the shard that holds it.

    `stored_name` is its name inside the shard where transformers renames it on load, else empty.
    Where several are stored as one (fused experts), that one has `stored_shape`, and this one is a
    run of its elements in row-major order that begins with element `first`.
    """

    file: str
    stored_name: str = ""
    stored_shape: Shape = ()
    first: int = 0


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer whose weight may be packed.

    `name` is the module's path in the transformers model ("model.layers.0.self_attn.q_proj"),
    which is also the prefix of its tensors in the checkpoint. `role` is one of "q", "k", "v",
    "qkv", "o", "gate", "up", "gate_up", "down", "lm_head". `shape` is (R, C) = (out, in).

    The token embedding is described in the same way, with role "embedding" and one row per token.
    """

    name: str
    role: str
    shape: tuple[int, int]
    layer: int | None
    bias: bool

    @property
    def weight(self) -> str:
        """Checkpoint name of the weight."""
        return f"{self.name}.weight"


@dataclass(frozen=True)
class Projection:
    """Rows (or columns, for the output projection) of a linear layer, one range per head."""

    linear: str
    heads: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer, in the terms that KV compression needs.

    `module` and `block` are paths of the attention module and of its decoder layer. `window` is
    the sliding window in tokens, None for full attention. `key_norm` tells that a norm stands
    between the key projection and RoPE, `value_linear` that nothing but attention, RoPE and such
    norms stands between the other projections and the output projection.
    """

    layer: int
    module: str
    block: str
    kind: Literal["full", "sliding"]
    window: int | None
    heads: int
    kv_heads: int
    head_dim: int
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    key_norm: bool
    value_linear: bool = True


@dataclass(frozen=True)
class NormSpec:
    """A norm over the channels: names of its tensors, `bias` empty where it has none.

    Its gain is ``offset + weight``. A `centred` one subtracts the mean (LayerNorm), another does not
    (RMSNorm).
    """

    weight: str
    bias: str = ""
    offset: float = 0.0
    centred: bool = False


SiteRole = Literal["attention_input", "attention_output", "mlp_input", "mlp_middle"]


@dataclass(frozen=True)
class InputSite:
    """A tensor [B, T, C] that linear layers read, and what makes it.

    `readers` are checkpoint names of the weights [R, C] that are applied to it, routers among them.
    It is made by `norm`, by the value rows of the layer's attention ("attention_output"), or by the
    rows `makers` ("mlp_middle": gate and up, multiplied element by element), of which `scaled` are
    those that a factor per channel passes through.
    """

    role: SiteRole
    name: str
    layer: int
    channels: int
    readers: tuple[str, ...]
    norm: NormSpec | None = None
    makers: tuple[Projection, ...] = ()
    scaled: Projection | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint and the architecture it belongs to.

    `tensors` has the names of the transformers model. `tied` maps a tensor name to the one that
    holds its data (lm_head -> embedding). `untied` are names that an export gives a tensor of their
    own, made from that of another name. `final_norm` stands before the head, `embedding` is the name
    of the token embedding's weight. `ignored` are checkpoint tensors that the architecture
    does not use, with the reason. `repository` is the hub id and `revision` the commit of a hub
    snapshot, both None for a local folder.
    """

    path: Path
    family: str
    architecture: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    dtype: str
    rope_type: str
    tensors: Mapping[str, SourceTensor]
    linears: tuple[LinearSpec, ...]
    attention: tuple[AttentionSpec, ...]
    blocks: tuple[str, ...]
    sites: tuple[InputSite, ...] = ()
    final_norm: NormSpec | None = None
    embedding: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)
    untied: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    repository: str | None = None
    revision: str | None = None

    @property
    def packable(self) -> tuple[LinearSpec, ...]:
        """Everything whose weight may be packed: the linear layers, and the token embedding."""
        tensor = self.tensors.get(self.tied.get(self.embedding, self.embedding))
        if tensor is None or len(tensor.shape) != 2:
            return self.linears
        rows, channels = tensor.shape
        name = self.embedding.removesuffix(".weight")
        return (*self.linears, LinearSpec(name, "embedding", (rows, channels), None, bias=False))

    def holder(self, linear: LinearSpec) -> LinearSpec | None:
        """Who holds the weight of `linear` [R, C]: itself, or what it is tied to; None when unknown."""
        weight = self.tied.get(linear.weight, linear.weight)
        return next((x for x in self.packable if x.weight == weight), None)

    def applied(self, linear: LinearSpec) -> LinearSpec | None:
        """The linear layer that multiplies by the weight of `linear`; None for an untied embedding."""
        if linear.role != "embedding":
            return linear
        return next((x for x in self.linears if self.tied.get(x.weight) == linear.weight), None)

    @property
    def parameters(self) -> int:
        """Stored elements, tied tensors counted once."""
        return sum(
            t.elements
            for n, t in self.tensors.items()
            if n not in self.ignored and n not in self.tied and n not in self.untied
        )

    @property
    def nbytes(self) -> int:
        """Stored bytes, tied tensors counted once."""
        gone = {*self.ignored, *self.tied, *self.untied}
        return sum(t.nbytes for n, t in self.tensors.items() if n not in gone)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weight shards, sorted."""
        return tuple(sorted({t.file for t in self.tensors.values()}))

    def block_of(self, tensor: str) -> int | None:
        """Index of the decoder block that a tensor belongs to, None outside the blocks."""
        for index, block in enumerate(self.blocks):
            if tensor.startswith(block + "."):
                return index
        return None

    def kv_bytes_per_token(self) -> int:
        """Bytes that the uncompressed cache holds per token, all layers, in the model's dtype."""
        item = TensorSpec((1,), self.dtype).nbytes
        return sum(2 * a.kv_heads * a.head_dim * item for a in self.attention)
