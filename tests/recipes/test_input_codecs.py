"""Layers whose input is rounded to 8 bits token by token, from recipe to running model.

Fused projections (phi3), biases (qwen2) and experts (mixtral) are the cases in which it could be
the wrong tensor that is rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kvpack import pipeline
from tests.recipes.checks import check_accounting, check_bytes, check_loaded, fake_quantised
from tests.recipes.conftest import SMALL, Made, MakeSource

INPUTS = "weights.0.inputs={kind: affine, bits: 8, group: {size: 0}, zero: none}"


def rounded(x: Tensor) -> Tensor:
    """Every token on a grid of its own from -128 to 127 steps; a step is a float16, rounded upwards."""
    exact = torch.maximum(x.amax(-1, keepdim=True) / 127, -x.amin(-1, keepdim=True) / 128)
    near = exact.half()
    step = torch.where(near.float() < exact, near.nextafter(torch.tensor(torch.inf).half()), near).float()
    return (x / step).round().clamp(-128, 127) * step


def round_inputs(model: nn.Module, packed: set[str]) -> None:
    """Make plain transformers round the inputs of linear layers, and of experts one by one."""
    for name, module in model.named_modules():
        if name in packed:
            module.register_forward_pre_hook(lambda m, args: (rounded(args[0]),))
        elif name.endswith(".experts"):
            module.forward = experts_forward(module)


def experts_forward(fused: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Every expert on every token, weighted by what the router gives it there, mostly zero."""

    def forward(x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for index in range(fused.gate_up_proj.shape[0]):
            gate, up = functional.linear(rounded(x), fused.gate_up_proj[index]).chunk(2, -1)
            middle = rounded(functional.silu(gate) * up)
            share = (weights * (chosen == index)).sum(-1, keepdim=True)
            result += share * functional.linear(middle, fused.down_proj[index])
        return result

    return forward


@pytest.mark.parametrize("recipe", ["w4", "w4@rtn"])
@pytest.mark.parametrize("family", ["phi3", "qwen2", "mixtral"])
def test_packed_equals_fake_quantised(
    family: str, recipe: str, make_source: MakeSource, tmp_path: Path, prompt: Tensor
) -> None:
    source = make_source(family)
    plan = pipeline.make_plan(source, recipe, (*SMALL, INPUTS))
    made = Made(source, plan, pipeline.export(plan, tmp_path / "out").path)
    reference, model = fake_quantised(made, inputs=False), made.load()
    with torch.inference_mode():
        unrounded = reference(prompt, use_cache=False).logits
        round_inputs(reference, set(plan.weights))
        expected = reference(prompt, use_cache=False).logits
        found = model(prompt, use_cache=False).logits
    size = expected.abs().max()
    assert (unrounded - expected).abs().max() > 1e-4 * size, "rounding does something"
    # Sums in another order may tip a rounding here and there: such a step is the most that differs.
    assert (found - expected).abs().mean() <= 1e-5 * size
    check_bytes(made)
    check_accounting(made)
    check_loaded(made, model)
    names = {"phi3": "self_attn.qkv_proj", "qwen2": "self_attn.q_proj", "mixtral": "mlp.experts.1.up_proj"}
    assert made.artifact.manifest.weights[f"model.layers.0.{names[family]}"].inputs is not None
    if family == "qwen2":
        assert model.model.layers[0].self_attn.q_proj.bias is not None
