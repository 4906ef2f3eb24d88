"""From a folder to a running model, and what is refused on the way."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import TracebackType

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import kvpack
from kvpack.artifact.reader import Artifact
from kvpack.core.errors import ArtifactError, UsageError
from kvpack.loading.generate import generate
from kvpack.loading.load import load_tokenizer
from kvpack.runtime.cache import KVPackCache
from kvpack.runtime.linear import PackedLinear

TOKENS = torch.randint(3, 256, (1, 180), generator=torch.Generator().manual_seed(0))


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, "float16"], ids=str)
def test_dtype_is_that_of_the_computation_and_not_of_what_is_stored(
    artifact: Path, dtype: torch.dtype | str
) -> None:
    model = kvpack.load(artifact, dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert model.dtype == wanted
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert model(TOKENS).logits.dtype == wanted
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    opened = Artifact.open(artifact)
    layers = packed_layers(model)
    assert layers.keys() == opened.manifest.weights.keys()
    for name, layer in layers.items():
        assert layer.bias is None or layer.bias.dtype == wanted
        for part in layer.payload_names:
            assert torch.equal(layer.get_buffer(part), opened.read(f"{name}.{part}")), f"{name}.{part}"
    assert any(layer.bias is not None for layer in layers.values()), "qwen2 has biases"


def test_the_dtype_of_the_source_is_the_default(artifact: Path) -> None:
    assert kvpack.load(artifact).dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(artifact).dtype == torch.bfloat16


def test_precision_changes_the_result_only_by_rounding(artifact: Path) -> None:
    with torch.inference_mode():
        exact = kvpack.load(artifact, dtype=torch.float32)(TOKENS, use_cache=False).logits
        rounded = kvpack.load(artifact, dtype=torch.float16)(TOKENS, use_cache=False).logits
    assert 0 < (exact - rounded.float()).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(artifact: Path, attention: str) -> None:
    model = kvpack.load(artifact, dtype=torch.float32, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    with torch.inference_mode():
        found = model(TOKENS).logits
        expected = kvpack.load(artifact, dtype=torch.float32)(TOKENS).logits
    assert torch.allclose(found, expected, atol=1e-4)


def test_it_is_ready_to_use_and_not_to_train(artifact: Path) -> None:
    model = kvpack.load(str(artifact))
    assert isinstance(model, PreTrainedModel)
    assert not model.training
    assert not model.hf_quantizer.is_trainable
    assert not hasattr(model.config, "transformers_weights"), "a name that only loading needs"


def test_generation_uses_the_compressed_cache_by_itself(artifact: Path) -> None:
    done = kvpack.load(artifact).generate(TOKENS, max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(done.past_key_values, KVPackCache)
    assert done.past_key_values.encoded_tokens > 0


def test_the_callers_own_cache_is_used(artifact: Path) -> None:
    model = kvpack.load(artifact)
    own = DynamicCache(config=model.config)
    found = model(TOKENS, past_key_values=own)
    assert found.past_key_values is own
    assert own.get_seq_length() == TOKENS.shape[1]
    own = DynamicCache(config=model.config)
    done = model.generate(TOKENS, past_key_values=own, max_new_tokens=4, return_dict_in_generate=True)
    assert done.past_key_values is own
    named = model.generate(
        TOKENS, cache_implementation="dynamic", max_new_tokens=4, return_dict_in_generate=True
    )
    assert type(named.past_key_values) is DynamicCache
    assert model(TOKENS, use_cache=False).past_key_values is None


def test_an_artifact_without_a_scheme_keeps_the_usual_cache(source: Path, tmp_path: Path) -> None:
    from kvpack import pipeline

    pipeline.export(pipeline.make_plan(source, "w8"), tmp_path / "out")
    model = kvpack.load(tmp_path / "out")
    assert type(model(TOKENS).past_key_values) is DynamicCache


def test_saving_is_refused_with_a_way_out(artifact: Path, tmp_path: Path) -> None:
    model = kvpack.load(artifact)
    with pytest.raises(UsageError, match="cannot be saved by transformers") as caught:
        model.save_pretrained(tmp_path / "saved")
    assert "copy the artifact's folder" in caught.value.hint
    assert not list(tmp_path.glob("saved/*.safetensors"))


def models_in(trace: TracebackType | None) -> list[nn.Module]:
    """Every model that any frame of a traceback holds."""
    frames = [frame for frame, _ in traceback.walk_tb(trace)]
    return [value for frame in frames for value in frame.f_locals.values() if isinstance(value, nn.Module)]


def test_damage_is_found_before_any_weight_is_allocated(copied: Path) -> None:
    shard = next(copied.glob("kvpack-0*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"is damaged: .*; the other \d+ tensors") as caught:
        kvpack.load(copied)
    held = models_in(caught.value.__traceback__)
    assert held, "the skeleton was there"
    assert all(p.is_meta for model in held for p in model.parameters())
    assert not any(packed_layers(model) for model in held)


@pytest.mark.parametrize("damage", ["truncated", "missing", "added"])
def test_wrong_files_are_found_before_transformers_looks(copied: Path, damage: str) -> None:
    shard = next(copied.glob("kvpack-0*.safetensors"))
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "missing":
        shard.unlink()
    else:
        (copied / "extra.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError) as caught:
        kvpack.load(copied)
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(caught.value.__traceback__)]
    assert not any("transformers" in Path(file).parts for file in files)
    with pytest.raises(ArtifactError):
        AutoModelForCausalLM.from_pretrained(copied)


def test_what_is_no_artifact_is_said_so(source: Path, tmp_path: Path) -> None:
    for folder in (source, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ArtifactError, match=r"holds no kvpack\.json"):
            kvpack.load(folder)


def test_a_missing_tokenizer_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_sampling_leaves_the_callers_random_numbers_alone(artifact: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    texts = {generate(artifact, "ab", max_new_tokens=8, sample=True, seed=s).text for s in (0, 0, 1)}
    assert torch.equal(torch.rand(3), expected)
    assert len(texts) == 2


def test_an_empty_prompt_is_refused_before_loading(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        generate(tmp_path, "")
