"""Caches of transformers itself, and what they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvpack.core.errors import UnsupportedModel
from kvpack.loading.load import load_source
from kvpack.loading.plain_cache import plain_cache, tensor_nbytes
from tests.tiny_models import make_model


def test_views_hold_less_than_their_memory(tmp_path: Path) -> None:
    model = load_source(make_model(tmp_path / "model"))
    cache = plain_cache(model)
    model(input_ids=torch.arange(10)[None], past_key_values=cache, use_cache=True)
    token = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, channels, bytes
    assert tensor_nbytes(cache) == (10 * token, 10 * token)
    cache.crop(-4)
    assert tensor_nbytes(cache) == (6 * token, 10 * token)


def test_a_backend_that_does_not_suit_the_model_is_said(tmp_path: Path) -> None:
    model = load_source(make_model(tmp_path / "model", "gemma3_text"))
    with pytest.raises(UnsupportedModel, match="QuantizedCache with fp8 cannot be used"):
        plain_cache(model, "fp8")


def test_a_source_can_be_loaded_in_another_dtype(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", dtype="bfloat16")
    assert load_source(path).dtype == torch.bfloat16
    assert load_source(path, dtype="float32").dtype == torch.float32
