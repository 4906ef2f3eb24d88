"""A complete artifact of a few kilobytes, made of real parts and without any model library."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpack.artifact.manifest import (
    BaseModel,
    FileRecord,
    Manifest,
    PackedLinear,
    RecipeRecord,
    Totals,
    bits_per_element,
)
from kvpack.artifact.reader import Artifact
from kvpack.artifact.writer import ArtifactWriter, Written
from kvpack.core.model_spec import AttentionSpec, Projection
from kvpack.core.types import Group, TensorSpec
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.policies.sink_recent import SinkRecent
from kvpack.parts.solvers.rtn import Rtn
from kvpack.parts.transforms.channel_reorder import ChannelReorder
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.plan import DroppedTensor
from kvpack.recipe.plane_plan import PlanePlan

LINEARS = {"blocks.0.up": (6, 20), "blocks.0.down": (4, 9)}
CODEC = Affine(bits=3, group=Group("channel", 8), zero="integer")
KV_CODEC = Affine(bits=2, group=Group("token", 4))
ATTENTION = AttentionSpec(
    layer=0,
    module="blocks.0.attn",
    block="blocks.0",
    kind="full",
    window=None,
    heads=2,
    kv_heads=2,
    head_dim=4,
    query=Projection("blocks.0.q", ((0, 4), (4, 8))),
    key=Projection("blocks.0.k", ((0, 4), (4, 8))),
    value=Projection("blocks.0.v", ((0, 4), (4, 8))),
    output=Projection("blocks.0.o", ((0, 4), (4, 8))),
    key_norm=False,
)


def tensors() -> dict[str, Tensor]:
    """Weight tensors in the order in which they are written."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for name, shape in LINEARS.items():
        payload = CODEC.encode(torch.randn(shape, generator=generator), {})
        made.update({f"{name}.{part}": tensor for part, tensor in payload.tensors.items()})
    made["norm.weight"] = torch.randn(7, generator=generator).to(torch.bfloat16)
    return made


def specs_of(made: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {n: TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in made.items()}


def kv_layer() -> KVLayerPlan:
    shape = (1, 2, 1, 4)
    reorder = ChannelReorder()
    key = PlanePlan((reorder,), False, (KV_CODEC,), (reorder.state_spec(shape), {}))
    return KVLayerPlan(ATTENTION, key, PlanePlan((), False, (KV_CODEC,), ({},)), SinkRecent(recent_tokens=8))


def kv_state() -> dict[str, Tensor]:
    return {"layers.0.key.0.perm": torch.arange(8, dtype=torch.int32).reshape(2, 4)}


def manifest_for(written: Written) -> Manifest:
    weights = {}
    for name, shape in LINEARS.items():
        parts = {p: written.tensors[f"{name}.{p}"] for p in CODEC.spec(shape, "float32")}
        stored = sum(t.nbytes for t in parts.values())
        bits = bits_per_element(stored, shape[0] * shape[1])
        weights[name] = PackedLinear("up", shape, "float32", CODEC, Rtn(), parts, bits, 3, 0, 0.125)
    total = sum(t.nbytes for t in written.tensors.values())
    state = sum(t.nbytes for t in written.kv_state.values())
    return Manifest(
        base_model=BaseModel(
            "Tiny", "tiny", "float32", 163, {"m": FileRecord(1, "0" * 64)}, {"head": "embed"}
        ),
        recipe=RecipeRecord("r", "r.yaml", "name: r # \u00e4\n", hashlib.sha256(b"").hexdigest(), ("a=1",)),
        resolved_recipe={"name": "r", "weights": [{"match": "@linear", "codec": None}]},
        weights=weights,
        copied={"norm.weight": written.tensors["norm.weight"]},
        basis=(),
        sparsity=None,
        thresholds={},
        dropped=(DroppedTensor("head", "tied to embed, stored once"),),
        kv=(kv_layer(),),
        kv_state=written.kv_state,
        totals=Totals(total, state, bits_per_element(total, 163)),
        files=written.files,
        calibration=None,
        seed=0,
        versions={"torch": "2"},
        kvpack_version="0.1.0",
    )


def write_rest(writer: ArtifactWriter) -> Manifest:
    writer.write_kv_state(specs_of(kv_state()), kv_state())
    writer.write_json("config.json", {"model_type": "tiny"})
    writer.write_text("README.md", "# tiny\n")
    return writer.finish(manifest_for(writer.written()))


def write_artifact(out: Path, **options: Any) -> Manifest:
    with ArtifactWriter(out, **options) as writer:
        made = tensors()
        writer.begin_weights(specs_of(made), shard_bytes=120)
        for name, tensor in made.items():
            writer.write_tensor(name, tensor)
        return write_rest(writer)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of everything below a folder, by name; folders have a slash at the end."""
    return {
        str(p.relative_to(folder)) + ("/" if p.is_dir() else ""): b"" if p.is_dir() else p.read_bytes()
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    write_artifact(out)
    Artifact.open(out)
    return out
