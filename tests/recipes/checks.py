"""What every export must fulfil, whatever the recipe and the family."""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvpack.artifact.reader import Artifact
from kvpack.recipe.plan import Plan
from kvpack.report import kv_bytes, weight_bytes
from kvpack.runtime.cache import KVPackCache
from tests.recipes.conftest import Made


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bytes: NaN equals NaN, and 0.0 differs from -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def source_tensors(plan: Plan) -> dict[str, Tensor]:
    """Tensors of the source by the names of the transformers model, read by safetensors itself."""
    found = {}
    for name, tensor in plan.model.tensors.items():
        with safe_open(plan.model.path / tensor.file, "pt") as file:
            found[name] = file.get_tensor(tensor.stored_name or name)
    return found


def folded_names(plan: Plan) -> set[str]:
    """Source tensors that folded transforms change."""
    names: set[str] = set()
    for layer in plan.kv:
        if layer.value.folded and layer.value.transforms:
            value, output = layer.attention.value.linear, layer.attention.output.linear
            names |= {f"{value}.weight", f"{value}.bias", f"{output}.weight"}
        if layer.key.folded and layer.key.transforms:
            query, key = layer.attention.query.linear, layer.attention.key.linear
            names |= {f"{linear}.{kind}" for linear in (query, key) for kind in ("weight", "bias")}
    return names


def check_bytes(made: Made) -> None:
    """The plan's weight bytes are those of the tensors on the disk."""
    artifact = made.artifact
    stored = sum(
        artifact.read(name).numel() * artifact.read(name).element_size() for name in artifact.tensor_names
    )
    assert weight_bytes(made.plan).total == stored == artifact.manifest.totals.weight_bytes
    shards = sum(f.stat().st_size for f in made.path.glob("kvpack-0*.safetensors"))
    assert stored <= shards < stored + 200_000  # headers only on top


def check_accounting(made: Made) -> None:
    """Every source tensor is packed, copied, or dropped with a reason; each in one way only."""
    plan, manifest = made.plan, made.artifact.manifest
    packed = {w.linear.weight for w in plan.weights.values()}
    dropped = {d.name for d in plan.dropped}
    assert len(packed) + len(plan.copied) + len(dropped) == len(plan.model.tensors)
    assert packed | set(plan.copied) | dropped == set(plan.model.tensors)
    assert all(d.reason for d in plan.dropped)
    assert set(manifest.copied) == set(plan.copied)
    assert {f"{name}.weight" for name in manifest.weights} == packed
    assert tuple(manifest.dropped) == tuple(plan.dropped)
    assert not packed & set(made.artifact.tensor_names)


def check_copied(made: Made) -> None:
    """What is copied has the source's bytes; what is folded has changed."""
    folded, artifact = folded_names(made.plan), made.artifact
    for name, tensor in source_tensors(made.plan).items():
        if name in made.plan.copied:
            assert same_bits(artifact.read(name), tensor) == (name not in folded), name


def check_loaded(made: Made, model: PreTrainedModel) -> None:
    """Every tensor of the running model has the artifact's bytes."""
    artifact, state = made.artifact, model.state_dict()
    assert set(artifact.tensor_names) == set(state) - set(artifact.manifest.base_model.tied)
    for name in artifact.tensor_names:
        assert same_bits(state[name], artifact.read(name)), name


def fake_quantised(made: Made) -> PreTrainedModel:
    """The source in plain transformers, its weights replaced by what the artifact stands for."""
    artifact: Artifact = made.artifact
    reference = AutoModelForCausalLM.from_pretrained(made.source, dtype="auto")
    state = reference.state_dict()
    with torch.no_grad():
        for name in artifact.manifest.copied:
            state[name].copy_(artifact.read(name))
        for name, linear in artifact.manifest.weights.items():
            weight = state[f"{name}.weight"]
            found = artifact.solution(name)
            weight.copy_(linear.codec.decode(found.payload, found.state, weight.dtype))
    return reference.eval()


def check_logits(made: Made, model: PreTrainedModel, tokens: Tensor) -> None:
    """Packed equals fake-quantised where the cache plays no part."""
    with torch.inference_mode():
        expected = fake_quantised(made)(tokens, use_cache=False).logits
        found = model(tokens, use_cache=False).logits
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def check_cache(made: Made, model: PreTrainedModel, tokens: Tensor) -> None:
    """Bytes of the cache after a prompt are the plan's, and old tokens are really encoded."""
    with torch.inference_mode():
        cache = model(tokens, use_cache=True).past_key_values
    if not made.plan.kv:
        assert not isinstance(cache, KVPackCache)
        return
    assert isinstance(cache, KVPackCache)
    planned = kv_bytes(made.plan.kv, tokens.shape[1], made.plan.model.dtype)
    assert (cache.stored_tokens > 0) == (planned.coded > 0)
    assert planned.total - planned.protected <= cache.nbytes <= planned.total
    assert cache.elements == planned.elements
    assert cache.nbytes == planned.total or planned.protected


def check_generation(made: Made, model: PreTrainedModel, tokens: Tensor) -> None:
    """`generate()` uses the compressed cache by itself where there is one."""
    done = model.generate(
        tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False, return_dict_in_generate=True
    )
    assert done.sequences.shape[1] == tokens.shape[1] + 8
    assert isinstance(done.past_key_values, KVPackCache) == bool(made.plan.kv)
    assert done.past_key_values.get_seq_length() == tokens.shape[1] + 7


def check_everything(made: Made, tokens: Tensor) -> None:
    """All of the above."""
    model = made.load()
    check_bytes(made)
    check_accounting(made)
    check_copied(made)
    check_loaded(made, model)
    check_logits(made, model, tokens)
    check_cache(made, model, tokens)
    check_generation(made, model, tokens)
