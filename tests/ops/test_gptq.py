"""The factor of the damped inverse, and the shape of the sweep."""

import torch

from kvpack.ops import gptq


def gram_of(channels: int, tokens: int) -> torch.Tensor:
    x = torch.randn(tokens, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x.T @ x


def test_factor_is_of_the_damped_inverse() -> None:
    gram = gram_of(12, 100)
    upper = gptq.inverse_factor(gram, 0.01)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    assert torch.allclose(upper.T @ upper, torch.linalg.inv(damped))
    assert torch.equal(upper, upper.triu())


def test_input_is_left_alone() -> None:
    gram = gram_of(12, 100)
    before = gram.clone()
    gptq.inverse_factor(gram, 0.01)
    assert torch.equal(gram, before)


def test_damping_grows_until_it_suffices() -> None:
    gram = gram_of(12, 100)
    gram -= 0.05 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    gram[0, 0] = -0.05 * gram.diagonal().mean()
    upper = gptq.inverse_factor(gram, 0.01)
    mean = gram.diagonal().mean()
    for damp in (0.1, 1.0):
        damped = gram + damp * mean * torch.eye(12, dtype=torch.float64)
        if torch.linalg.eigvalsh(damped)[0] > 0:
            break
    assert damp > 0.01
    assert torch.allclose(upper.T @ upper, torch.linalg.inv(damped))


def test_gives_up_beyond_the_limit() -> None:
    gram = -gram_of(12, 100)
    gram.diagonal().abs_()
    assert gptq.inverse_factor(gram * 1000 - 900 * gram.diagonal().diag(), 0.01, limit=0.05) is None


def test_dead_channels_are_isolated() -> None:
    gram = gram_of(12, 100) * 1e-6
    gram[4], gram[:, 4] = 0, 0
    upper = gptq.inverse_factor(gram, 0.01)
    assert upper[4, 5:].abs().max() == 0
    live = [i for i in range(12) if i != 4]
    rest = gptq.inverse_factor(gram[live][:, live], 0.01)
    assert torch.allclose(upper[live][:, live], rest), "a dead channel does not change the others"


def test_no_group_straddles_a_block() -> None:
    for columns, group, block in [(72, 24, 20), (72, 16, 40), (100, 32, 128), (70, 70, 32), (9, 4, 1)]:
        ranges = gptq.blocks(columns, group, block)
        assert [i for a, b in ranges for i in range(a, b)] == list(range(columns))
        for start, stop in ranges:
            inside = {i // group for i in range(start, stop)}
            assert len(inside) == 1 or (start % group == 0 and (stop % group == 0 or stop == columns))
