"""What codecs and transforms promise to attention that reads codes."""

import pytest
import torch
from torch import Tensor

from kvpack.core.roles import Codec, RowTransform
from kvpack.core.rows import TokenRows
from kvpack.core.types import Payload
from kvpack.kernels import rows as token_rows
from tests.contracts.discovery import fitted, parts, random
from tests.contracts.test_transforms import fitted as fitted_transform
from tests.contracts.test_transforms import site

CODECS = parts("codecs")
TRANSFORMS = [p for p in parts("transforms") if isinstance(p.values[0], RowTransform)]


def close(ours: Tensor, expected: Tensor) -> None:
    assert (ours.dtype, ours.shape) == (torch.float32, expected.shape)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def encoded(codec: Codec, channels: int) -> tuple[Payload, dict[str, Tensor], Tensor]:
    """A payload of some tokens, and what it decodes to; not all tokens where they stand apart."""
    x = random(2, 3, 6 * max(codec.token_block, 4), channels)
    state = fitted(codec, x)
    payload = codec.encode(x, state)
    if codec.segment == 0:
        payload = payload.rows(2 * codec.token_block, 4 * codec.token_block)
    return payload, state, codec.decode(payload, state, torch.float32)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("channels", [40, 64])
def test_scores_and_sums_are_those_of_decoded_tokens(codec: Codec, channels: int) -> None:
    payload, state, x = encoded(codec, channels)
    for queries in (1, 4):
        query, weights = random(2, 3, queries, channels, seed=1), random(2, 3, queries, x.shape[2], seed=2)
        close(codec.scores(query, payload, state), query @ x.mT)
        close(codec.mix(weights, payload, state), weights @ x)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("channels", [40, 64])
def test_rows_are_the_decoded_tokens(codec: Codec, channels: int) -> None:
    payload, state, x = encoded(codec, channels)
    assert torch.equal(token_rows.dense(codec.token_rows(payload, state)), x)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("heads", "channels"), [(8, 64), (4, 48), (1, 8), (6, 100), (3, 80)])
def test_steps_are_the_inverse(transform: RowTransform, heads: int, channels: int) -> None:
    x, at = random(2, heads, 5, channels), site(heads, 5)
    state = fitted_transform(transform, x)
    z = transform.forward(x, state, at)
    stored = TokenRows(z, None, transform.row_steps(state, at, channels), heads // z.shape[1])
    close(token_rows.dense(stored), transform.inverse(z, state, at))
