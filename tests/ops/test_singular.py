"""Singular bases: orthonormal, spanning what the projection sees, in order."""

import pytest
import torch

from kvpack import ops


@pytest.mark.parametrize(("rows", "channels"), [(8, 32), (48, 48), (64, 40), (1, 16)])
def test_a_projection_sees_nothing_outside_of_its_basis(rows: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, channels, generator=generator, dtype=torch.float64)
    x = torch.randn(20, channels, generator=generator, dtype=torch.float64)
    basis = ops.singular.input_basis(weight.float()).double()
    assert basis.shape == (channels, min(rows, channels))
    torch.testing.assert_close(
        basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), rtol=0, atol=1e-6
    )
    torch.testing.assert_close((x @ basis) @ basis.T @ weight.T, x @ weight.T, rtol=0, atol=1e-5)


def test_the_most_amplified_direction_comes_first() -> None:
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    gains = (ops.singular.input_basis(weight).T @ weight.T).norm(dim=1)
    assert bool((gains[:-1] >= gains[1:]).all())
    torch.testing.assert_close(gains, torch.linalg.svdvals(weight))


def test_signs_do_not_depend_on_the_library() -> None:
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(2))
    basis = ops.singular.input_basis(weight)
    assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("weight", [torch.zeros(4, 9), torch.ones(4, 9)])
def test_degenerate_weights_still_give_an_orthonormal_basis(weight: torch.Tensor) -> None:
    basis = ops.singular.input_basis(weight)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), rtol=0, atol=1e-5)


def test_a_bfloat16_weight_is_taken() -> None:
    assert ops.singular.input_basis(torch.randn(4, 9).bfloat16()).dtype == torch.float32
