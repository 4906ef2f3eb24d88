"""With quantisation switched off, changes of basis leave a model as it was, whatever its family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import kvpack
import kvpack.artifact.reader
from kvpack import pipeline
from kvpack.core.errors import RecipeError
from kvpack.verify import verify
from tests.recipes.conftest import SMALL, MakeSource

EXACT = """
kvpack: 1
name: turned-not-quantised
weights:
  - {match: "@down", codec: {kind: identity}, solver: {kind: rtn}}
basis:
"""
RESIDUAL = "  - {at: residual, transforms: [{kind: hadamard}]}\n"
HEADS = "  - {at: attention_output, transforms: [{kind: hadamard}]}\n"
ONLINE = "  - {at: mlp_middle, transforms: [{kind: hadamard}], online: true}\n"
SORTED = "  - {at: mlp_middle, transforms: [{kind: channel_sort, by: max}]}\n"
HEADS_SORTED = "  - {at: attention_output, transforms: [{kind: channel_sort, by: max}]}\n"
SCALE = "{kind: range_scale, alpha: 0.6, beta: 0.4}"
SCALED = "".join(f"  - {{at: {at}, transforms: [{SCALE}]}}\n" for at in ("attention_input", "mlp_input"))
SORTED_AND_SCALED = SORTED + f"  - {{at: mlp_middle, transforms: [{SCALE}]}}\n"
SCALED_INSIDE = "".join(
    f"  - {{at: {at}, transforms: [{SCALE}]}}\n" for at in ("attention_output", "mlp_middle")
)

TURNED = RESIDUAL + HEADS + ONLINE
MOVED = SCALED + SORTED + HEADS_SORTED + SCALED_INSIDE


def exported(tmp_path: Path, source: Path, basis: str) -> tuple[Path, pipeline.Plan]:
    recipe = tmp_path / "exact.yaml"
    recipe.write_text(EXACT + basis)
    plan = pipeline.make_plan(source, str(recipe), SMALL)
    return pipeline.export(plan, tmp_path / "out").path, plan


def largest_difference(source: Path, artifact: Path, prompt: torch.Tensor) -> float:
    reference = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    with torch.inference_mode():
        expected = reference(prompt, use_cache=False).logits
        found = kvpack.load(artifact)(prompt, use_cache=False).logits
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gemma"])
@pytest.mark.parametrize("basis", [TURNED, MOVED, TURNED + SCALED], ids=["turned", "moved", "both"])
def test_the_function_stays(
    family: str, basis: str, tmp_path: Path, make_source: MakeSource, prompt: torch.Tensor
) -> None:
    source = make_source(family)
    path, _ = exported(tmp_path, source, basis)
    assert largest_difference(source, path, prompt) < 1e-4


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_norms_behind_a_block_let_scales_pass_but_no_rotation(
    family: str, tmp_path: Path, make_source: MakeSource, prompt: torch.Tensor
) -> None:
    source = make_source(family)
    path, _ = exported(tmp_path, source, MOVED)
    assert largest_difference(source, path, prompt) < 1e-4
    with pytest.raises(RecipeError, match="cannot be turned") as caught:
        exported(tmp_path, source, RESIDUAL)
    assert "layernorm" in caught.value.message


def test_layer_norms_take_in_scales_with_their_bias(
    tmp_path: Path, make_source: MakeSource, prompt: torch.Tensor
) -> None:
    source = make_source("gpt_neox")
    path, _ = exported(tmp_path, source, SCALED + HEADS + SORTED)
    assert largest_difference(source, path, prompt) < 1e-4
    with pytest.raises(RecipeError, match="subtract the mean"):
        exported(tmp_path, source, RESIDUAL)
    with pytest.raises(RecipeError, match="activation function"):
        exported(tmp_path, source, SCALED_INSIDE)


def test_turning_the_residual_stream_unties_the_head(
    tmp_path: Path, make_source: MakeSource, prompt: torch.Tensor
) -> None:
    source = make_source("llama", tied=True)
    path, plan = exported(tmp_path, source, TURNED)
    assert largest_difference(source, path, prompt) < 1e-4
    assert any("no longer tied" in note for note in plan.notes)
    assert "lm_head.weight" in plan.copied


def test_learned_factors_travel_so_that_the_source_can_be_compared(
    tmp_path: Path, make_source: MakeSource
) -> None:
    source = make_source("llama", dtype="bfloat16")
    path, _ = exported(tmp_path, source, MOVED)
    done = verify(path, source)
    assert done.passed, [c.detail for c in done.checks]


def test_norms_refuse_to_take_in_a_rotation(tmp_path: Path, make_source: MakeSource) -> None:
    with pytest.raises(RecipeError, match="factors only"):
        exported(tmp_path, make_source("llama"), "  - {at: mlp_input, transforms: [{kind: hadamard}]}\n")
    with pytest.raises(RecipeError, match="element by element"):
        exported(tmp_path, make_source("llama"), "  - {at: mlp_middle, transforms: [{kind: hadamard}]}\n")
    with pytest.raises(RecipeError, match="is not packed"):
        exported(
            tmp_path,
            make_source("llama"),
            "  - {at: mlp_input, transforms: [{kind: hadamard}], online: true}\n",
        )


def test_a_second_change_is_measured_in_the_basis_of_the_first(
    tmp_path: Path, make_source: MakeSource
) -> None:
    """Factors of sorted channels are the sorted factors."""
    source = make_source("llama")
    found = {}
    for name, basis in (("both", SORTED_AND_SCALED), ("scaled", SORTED_AND_SCALED.replace(SORTED, ""))):
        (tmp_path / name).mkdir()
        path, plan = exported(tmp_path / name, source, basis)
        state = kvpack.artifact.reader.Artifact.open(path).kv_state()
        found[name] = [
            {n: state[f"basis.{c.number}.0.{n}"][0] for n in c.states[0]} for c in plan.basis if c.layer == 1
        ]
    perm = found["both"][0]["perm"].long()
    assert perm.tolist() != sorted(perm.tolist())
    assert torch.allclose(found["both"][1]["factor"], found["scaled"][0]["factor"][perm], rtol=1e-3)
