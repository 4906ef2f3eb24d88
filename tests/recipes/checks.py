"""What every export must fulfil, whatever the recipe and the family."""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvpack.artifact.manifest import PackedLinear
from kvpack.artifact.reader import Artifact
from kvpack.core.weight_code import prepare_input
from kvpack.folding import Folding, learned
from kvpack.recipe.plan import Plan
from kvpack.report import kv_bytes, weight_bytes
from kvpack.runtime.cache import KVPackCache
from kvpack.runtime.sparsity import count_anew, every_token_sparse, sparsity_of
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
            found[name] = projection(file.get_tensor(tensor.stored_name or name), name, tensor.shape)
    return found


def projection(stored: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """One expert's projection where `stored` holds all of them, as transformers fuses them; a view."""
    if stored.shape == shape:
        return stored
    _, expert, side, _ = name.rsplit(".", 3)
    rows = stored[int(expert)]
    return rows if side == "down_proj" else rows.chunk(2)[("gate_proj", "up_proj").index(side)]


def parameter(state: dict[str, Tensor], name: str) -> Tensor:
    """What plain transformers calls the tensor `name`: a tensor of its own, or part of fused experts."""
    if name in state:
        return state[name]
    module, _, side, _ = name.rsplit(".", 3)
    fused = state[f"{module}.{'down_proj' if side == 'down_proj' else 'gate_up_proj'}"]
    return projection(fused, name, ())


def folded_names(plan: Plan) -> set[str]:
    """Source tensors that folded transforms and changes of basis change."""
    folding = Folding(plan)
    names: set[str] = {name for change in plan.basis for name in folding.names(change)}
    for layer in plan.kv:
        if layer.value.folded and layer.value.transforms:
            value, output = layer.attention.value.linear, layer.attention.output.linear
            names |= {f"{value}.weight", f"{value}.bias", f"{output}.weight"}
        if layer.key.folded and layer.key.transforms:
            query, key = layer.attention.query.linear, layer.attention.key.linear
            names |= {f"{linear}.{kind}" for linear in (query, key) for kind in ("weight", "bias")}
    return names


def check_bytes(made: Made) -> None:
    """The plan's weight bytes are those of the tensors; without lossless coding, those on the disk too."""
    artifact = made.artifact
    unpacked = sum(artifact.read(name).nbytes for name in artifact.tensor_names)
    stored = sum(artifact.read_stored(name).nbytes for name in artifact.tensor_names)
    assert weight_bytes(made.plan).total == unpacked
    assert artifact.manifest.totals.weight_bytes == stored
    if made.plan.recipe.recipe.storage is None:
        assert stored == unpacked
    else:
        assert stored < unpacked
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
    folded, artifact, folding = folded_names(made.plan), made.artifact, Folding(made.plan)
    # A search may find that changing nothing is best.
    searched = {name for change in made.plan.basis if learned(change) for name in folding.names(change)}
    for name, tensor in source_tensors(made.plan).items():
        if name in made.plan.copied and name not in searched:
            assert same_bits(artifact.read(name), tensor) == (name not in folded), name


def check_loaded(made: Made, model: PreTrainedModel) -> None:
    """Every tensor of the running model has the artifact's bytes."""
    artifact, state = made.artifact, model.state_dict()
    assert set(artifact.tensor_names) == set(state) - set(artifact.manifest.base_model.tied)
    for name in artifact.tensor_names:
        assert same_bits(state[name], artifact.read(name)), name


def fake_quantised(made: Made, *, inputs: bool = True) -> PreTrainedModel:
    """The source in plain transformers, its weights replaced by what the artifact stands for.

    With `inputs` its layers get theirs as the packed ones do.
    """
    artifact: Artifact = made.artifact
    reference = AutoModelForCausalLM.from_pretrained(made.source, dtype="auto")
    state = reference.state_dict()
    with torch.no_grad():
        for name in artifact.manifest.copied:
            parameter(state, name).copy_(artifact.read(name))
        for name, linear in artifact.manifest.weights.items():
            weight = parameter(state, f"{name}.weight")
            found = artifact.solution(name)
            weight.copy_(linear.codec.decode(found.payload, found.state, weight.dtype))
            if inputs and (linear.inputs is not None or linear.online):
                prepare_inputs(reference.get_submodule(name), linear)
    return reference.eval()


def prepare_inputs(module: nn.Module, linear: PackedLinear) -> None:
    """Let a dense layer get its input as the packed one does."""
    module.register_forward_pre_hook(
        lambda _, args: (prepare_input(args[0], linear.online, linear.inputs), *args[1:])
    )


def check_logits(made: Made, model: PreTrainedModel, tokens: Tensor) -> None:
    """Packed equals fake-quantised where the cache plays no part."""
    with torch.inference_mode():
        expected = fake_quantised(made)(tokens, use_cache=False).logits
        found = model(tokens, use_cache=False).logits
    assert found.dtype == expected.dtype
    # In 16 bits the two differ in where they round: a packed layer rounds its sums only.
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(found.dtype, 1e-5)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def mask_activations(made: Made, reference: PreTrainedModel) -> None:
    """Make plain transformers leave out what an artifact's thresholds stop, for every token."""
    for name, site in made.artifact.manifest.sparsity.sites.items():
        threshold, module = made.artifact.read(f"{name}.threshold"), reference.get_submodule(name)

        def cut(x: Tensor, threshold: Tensor = threshold) -> Tensor:
            return x.masked_fill(x.abs() < threshold, 0)

        if site.kind == "input":
            module.register_forward_pre_hook(lambda m, args, cut=cut: (cut(args[0]), *args[1:]))
            continue
        activation = next(child for key, child in module.named_children() if key.startswith("act"))
        activation.register_forward_hook(lambda m, args, out, cut=cut: cut(out))


def check_sparse(made: Made, model: PreTrainedModel, tokens: Tensor) -> None:
    """Sparse tokens, masked together or skipping weights one by one, are those of a masked reference."""
    if made.plan.sparsity is None:
        return
    reference, few = fake_quantised(made), tokens[:, :24]
    mask_activations(made, reference)
    with torch.inference_mode(), every_token_sparse(model):
        expected = reference(few, use_cache=False).logits
        count_anew(model)
        together = model(few, use_cache=False).logits
        masked = sparsity_of(model)
        cache = DynamicCache()
        steps = [model(step, past_key_values=cache).logits for step in few.split(1, 1)]
    assert (together - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (torch.cat(steps, 1) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert all(activity.active < 1 for activity in masked.values())
    assert set(masked) == set(made.plan.sparsity.sites)


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
    check_sparse(made, model, tokens)
    check_cache(made, model, tokens)
    check_generation(made, model, tokens)
