"""MLWQ: one division for layers with one input, and the bytes that the recipe's formula promises."""

from __future__ import annotations

import pytest
import torch

from tests.recipes.conftest import Make

WIDTHS = {"mlwq": (4, 3), "mlwq@2bit": (4, 3, 2), "mlwq@4bit": (5, 4)}
"""Bits of the classes: rows so narrow have none of fewer bits."""


@pytest.mark.parametrize("recipe", WIDTHS)
def test_stored_bytes_are_those_of_the_formula(recipe: str, make: Make) -> None:
    artifact = make(recipe).artifact
    for name, linear in artifact.manifest.weights.items():
        rows, channels = linear.shape
        counts = (8, 8, channels - 16) if recipe == "mlwq@2bit" else (8, channels - 8)
        codes = sum(count * bits for count, bits in zip(counts, WIDTHS[recipe], strict=True)) // 8
        found = artifact.solution(name)
        assert found.payload.nbytes == rows * (codes + 3 * len(counts))
        assert sum(t.numel() for t in found.state.values()) == channels // 4


def test_layers_with_one_input_share_their_classes(make: Make) -> None:
    artifact = make("mlwq").artifact

    def classes(name: str) -> torch.Tensor:
        return artifact.solution(f"model.layers.1.{name}").state["classes"]

    for first, *others in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        assert all(torch.equal(classes(first), classes(other)) for other in others)
    assert not torch.equal(classes("self_attn.q_proj"), classes("mlp.gate_proj"))
