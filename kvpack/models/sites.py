"""Where linear layers get their input from: tensors that several layers read, and what makes them.

The norms in front of attention and MLP are known by name, everything else by structure. What is
found here is proven on real numbers during calibration (`kvpack.calibrate.basis`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from kvpack.core.model_spec import AttentionSpec, InputSite, LinearSpec, NormSpec, Projection

_ATTENTION_NORMS = ("input_layernorm", "self_attn_layer_norm", "ln_1")
_MLP_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm", "final_layer_norm", "ln_2")
_FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")


def describe_sites(
    model: PreTrainedModel, linears: Sequence[LinearSpec], attention: Sequence[AttentionSpec]
) -> Iterator[InputSite]:
    """Every tensor inside the decoder blocks that linear layers of known roles read.

    Sites whose maker is not understood have no norm and no makers: nothing can be folded there.
    """
    for spec in attention:
        block = model.get_submodule(spec.block)
        inside = [x for x in linears if x.layer == spec.layer]
        norms = {name: norm for name, norm in _norms(spec.block, block).items() if norm is not None}
        if any(parameter.dim() > 2 for parameter in block.parameters()):
            norms.pop("mlp", None)  # fused experts of an unknown layout read it
        yield from _attention_sites(spec, inside, norms, _strangers(model, spec, inside))
        yield from _middle_sites(spec, inside)


def final_norm(model: PreTrainedModel) -> NormSpec | None:
    """The norm between the last block and the head; None where it is not known."""
    base = model.base_model
    prefix = next((n for n, m in model.named_modules() if m is base), "")
    for name in _FINAL_NORMS:
        module = getattr(base, name, None)
        if isinstance(module, nn.Module):
            return _norm(f"{prefix}.{name}" if prefix else name, module)
    return None


def _norms(path: str, block: nn.Module) -> dict[str, NormSpec | None]:
    """The norms in front of attention ("attention") and of the MLP ("mlp"), as far as there are."""
    children = dict(block.named_children())
    found: dict[str, NormSpec | None] = {}
    name = next((n for n in _ATTENTION_NORMS if n in children), None)
    if name is not None:
        found["attention"] = _norm(f"{path}.{name}", children[name])
    # Beside `post_feedforward_layernorm` the one after attention stands behind it, not before the MLP.
    candidates = _MLP_NORMS[:1] if "post_feedforward_layernorm" in children else _MLP_NORMS
    name = next((n for n in candidates if n in children), None)
    if name is not None:
        found["mlp"] = _norm(f"{path}.{name}", children[name])
    elif "post_feedforward_layernorm" not in children:
        found["mlp"] = found.get("attention")  # one norm feeds both, side by side
    return found


def _norm(path: str, module: nn.Module) -> NormSpec | None:
    """What a norm does, found out by letting a copy of it work on numbers."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        return None
    probe = copy.deepcopy(module).to_empty(device="cpu").float()
    channels = weight.shape[0]
    ramp = torch.linspace(1, 2, channels)[None]
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.zero_()
        offset = 1.0 if bool(probe(ramp).abs().max() > 1e-3) else 0.0
        probe.get_parameter("weight").fill_(1.0 - offset)
        centred = bool(probe(torch.ones(1, channels)).abs().max() < 1e-3)
    bias = f"{path}.bias" if getattr(module, "bias", None) is not None else ""
    return NormSpec(f"{path}.weight", bias, offset, centred)


def _strangers(model: PreTrainedModel, spec: AttentionSpec, inside: Sequence[LinearSpec]) -> list[str]:
    """Weights outside attention that read the MLP's input and are no linear layers of ours: routers."""
    known = {x.weight for x in inside}
    width = next((x.shape[1] for x in inside if x.role in ("gate", "up", "gate_up")), 0)
    block = model.get_submodule(spec.block)
    return [
        f"{spec.block}.{name}"
        for name, parameter in block.named_parameters()
        if parameter.dim() == 2
        and parameter.shape[1] == width
        and f"{spec.block}.{name}" not in known
        and not f"{spec.block}.{name}".startswith(f"{spec.module}.")
    ]


def _attention_sites(
    spec: AttentionSpec, inside: Sequence[LinearSpec], norms: dict[str, NormSpec], routers: list[str]
) -> Iterator[InputSite]:
    first = [x for x in inside if x.role in ("q", "k", "v", "qkv")]
    second = [x for x in inside if x.role in ("gate", "up", "gate_up")]
    output = next((x for x in inside if x.name == spec.output.linear), None)
    attention, mlp = norms.get("attention"), norms.get("mlp")
    mlp_readers = (*(x.weight for x in second), *routers)
    shared = mlp_readers if mlp is not None and mlp == attention else ()
    if first:
        readers = (*(x.weight for x in first), *shared)
        yield InputSite(
            "attention_input",
            f"{spec.block}.attention_input",
            spec.layer,
            first[0].shape[1],
            readers,
            attention,
        )
    if output is not None:
        name = f"{spec.block}.attention_output"
        yield InputSite("attention_output", name, spec.layer, output.shape[1], (output.weight,))
    if second and not shared:
        yield InputSite(
            "mlp_input", f"{spec.block}.mlp_input", spec.layer, second[0].shape[1], mlp_readers, mlp
        )


def _middle_sites(spec: AttentionSpec, inside: Sequence[LinearSpec]) -> Iterator[InputSite]:
    """One per MLP or expert: what its last layer reads, and the rows that make it."""
    by_parent: dict[str, dict[str, LinearSpec]] = {}
    for linear in inside:
        by_parent.setdefault(linear.name.rpartition(".")[0], {})[linear.role] = linear
    for parent, found in by_parent.items():
        down, up, both = found.get("down"), found.get("up"), found.get("gate_up")
        if down is None:
            continue
        name, width = f"{parent}.mlp_middle", down.shape[1]
        makers: tuple[Projection, ...] = ()
        scaled: Projection | None = None
        if both is not None and both.shape[0] == 2 * width:
            gate = Projection(both.name, ((0, width),))
            scaled = Projection(both.name, ((width, 2 * width),))
            makers = (gate, scaled)
        elif up is not None and up.shape[0] == width:
            rows = Projection(up.name, ((0, width),))
            gated = "gate" in found
            makers = (Projection(found["gate"].name, ((0, width),)), rows) if gated else (rows,)
            scaled = rows if gated else None
        yield InputSite("mlp_middle", name, spec.layer, width, (down.weight,), None, makers, scaled)
