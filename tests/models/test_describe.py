from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from kvpack.core.errors import SourceError, UnsupportedModel
from kvpack.models import open_model
from tests.tiny_models import FAMILIES, make_model

MODELS = Path(__file__).resolve().parents[3] / "shared" / "models"


def _write(path: Path, model_type: str, auto=AutoModelForCausalLM, **settings) -> Path:
    auto.from_config(AutoConfig.for_model(model_type, **settings)).save_pretrained(path)
    return path


def _edit(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def _set(path: Path, **settings) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **settings}))


def test_every_family_is_described(folder, reference):
    spec = open_model(folder)
    assert spec.parameters == sum(p.numel() for p in reference.parameters())
    assert spec.nbytes == 4 * spec.parameters
    assert spec.dtype == "float32"
    assert (spec.ignored, spec.tied) == ({}, {})
    assert set(spec.tensors) == set(reference.state_dict())
    assert len(spec.blocks) == len(spec.attention) == 2
    for linear in spec.linears:
        module = reference.get_submodule(linear.name)
        assert linear.shape == tuple(module.weight.shape)
        assert linear.bias == (module.bias is not None)
        assert linear.layer == spec.block_of(linear.weight)
    in_blocks = [n for n, m in reference.named_modules() if isinstance(m, torch.nn.Linear)]
    assert [x.name for x in spec.linears] == in_blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_heads_windows_and_norms(family, checkpoint):
    spec = open_model(checkpoint(family))
    roles = {x.role for x in spec.linears}
    fused = {"phi3": {"qkv", "o", "gate_up", "down"}, "gpt_neox": {"qkv", "o", "up", "down"}}
    separate = {"q", "k", "v", "o", "gate", "up", "down"}
    assert roles == fused.get(family, separate) | {"lm_head"}
    windows = {"mistral": [24, 24], "gemma2": [24, None], "gemma3_text": [24, None]}
    assert [a.window for a in spec.attention] == windows.get(family, [None, None])
    assert all((a.kind == "sliding") == (a.window is not None) for a in spec.attention)
    kv_heads = 4 if family == "gpt_neox" else 2
    for a in spec.attention:
        assert (a.heads, a.kv_heads, a.head_dim) == (4, kv_heads, 16)
        assert len(a.key.heads) == len(a.value.heads) == kv_heads
        assert a.key_norm == (family in ("qwen3", "gemma3_text"))
        assert a.value_linear
    assert spec.kv_bytes_per_token() == 2 * 2 * kv_heads * 16 * 4


def test_ranges_find_the_keys_and_values_that_the_model_caches(folder, reference, tokens):
    """Values are cached as projected, so rows found by the spec must reproduce them."""
    from kvpack.calibrate.hooks import Tap

    spec = open_model(folder)
    projected, cached = [], []
    for a in spec.attention:
        reference.get_submodule(a.value.linear).register_forward_hook(lambda m, i, o: projected.append(o))
    with torch.no_grad():
        reference(tokens, past_key_values=Tap(lambda k, v: cached.append(v)), use_cache=True)
    for a, rows, value in zip(spec.attention, projected, cached, strict=True):
        assert torch.equal(torch.stack([rows[..., i:j] for i, j in a.value.heads], dim=1), value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(tmp_path, dtype):
    spec = open_model(make_model(tmp_path, "qwen2", dtype=dtype))
    assert spec.dtype == dtype
    assert spec.nbytes == 2 * spec.parameters


def test_tied_embedding_is_counted_once(tmp_path):
    spec = open_model(make_model(tmp_path / "a", "gemma2", tied=True))
    untied = open_model(make_model(tmp_path / "b", "gemma2"))
    assert untied.parameters - spec.parameters == 256 * 64


def test_a_checkpoint_may_hold_both_tied_tensors_if_they_agree(tmp_path):
    path = make_model(tmp_path, "llama", tied=True)
    _edit(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    spec = open_model(path)
    assert spec.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert spec.parameters == open_model(make_model(tmp_path / "b", "llama", tied=True)).parameters
    _edit(path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(SourceError, match="differ"):
        open_model(path)


def test_a_tied_checkpoint_may_hold_only_the_head(tmp_path):
    path = make_model(tmp_path, "llama", tied=True)
    _edit(path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert open_model(path).tied == {"model.embed_tokens.weight": "lm_head.weight"}


def test_renamed_tensors_keep_their_stored_name(checkpoint):
    spec = open_model(checkpoint("gpt_neox"))
    assert spec.tensors["lm_head.weight"].stored_name == "embed_out.weight"
    assert "embed_out.weight" not in spec.tensors


def test_computed_buffers_of_old_checkpoints_are_ignored(tmp_path):
    path = make_model(tmp_path, "llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _edit(path, lambda t: t.update({name: torch.ones(8)}))
    spec = open_model(path)
    assert list(spec.ignored) == [name]
    assert spec.parameters == open_model(make_model(tmp_path / "b", "llama")).parameters


def test_unknown_missing_and_misshapen_tensors(tmp_path):
    path = make_model(tmp_path, "llama")
    _edit(path, lambda t: t.update({"model.layers.0.mystery": torch.ones(1)}))
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.mystery"):
        open_model(path)
    _edit(path, lambda t: (t.pop("model.layers.0.mystery"), t.pop("model.norm.weight")))
    with pytest.raises(SourceError, match=r"model\.norm\.weight.*missing"):
        open_model(path)
    _edit(path, lambda t: t.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(SourceError, match=r"model\.norm\.weight is \[63\].*\[64\]"):
        open_model(path)


def test_scaled_and_nested_rope_types(tmp_path, checkpoint):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    assert open_model(make_model(tmp_path, "llama", rope_parameters=rope)).rope_type == "linear"
    assert open_model(checkpoint("gemma3_text")).rope_type == "default"


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}


def test_state_space_layers_are_refused(tmp_path):
    path = _write(tmp_path, "mamba", hidden_size=32, num_hidden_layers=2, vocab_size=32, state_size=4)
    with pytest.raises(UnsupportedModel):
        open_model(path)


def test_latent_attention_is_refused(tmp_path):
    settings = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    path = _write(tmp_path, "deepseek_v3", **SMALL, **settings, v_head_dim=8, first_k_dense_replace=2)
    with pytest.raises(UnsupportedModel, match="latent attention"):
        open_model(path)


def test_unknown_fused_layout_is_refused(tmp_path):
    path = _write(
        tmp_path,
        "falcon",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=32,
        alibi=False,
    )
    with pytest.raises(UnsupportedModel, match=r"falcon.*no known layout|falcon"):
        open_model(path)


def test_experts_of_a_layout_of_their_own_stay_fused(tmp_path):
    """Transposed, interleaved and with biases: their tensors are known, but no linear layers."""
    path = _write(tmp_path, "gpt_oss", **SMALL, num_local_experts=2, num_experts_per_tok=1)
    spec = open_model(path)
    assert len(spec.tensors["model.layers.0.mlp.experts.gate_up_proj"].shape) == 3
    assert {x.role for x in spec.linears} == {"q", "k", "v", "o", "lm_head"}


def test_encoder_decoder_is_refused(tmp_path):
    path = _write(
        tmp_path,
        "t5",
        AutoModelForSeq2SeqLM,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        vocab_size=32,
    )
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        open_model(path)


def test_quantised_checkpoint_is_refused(tmp_path):
    path = make_model(tmp_path, "llama")
    _set(path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModel, match="quantised already"):
        open_model(path)


def test_unknown_model_type(tmp_path):
    path = make_model(tmp_path, "llama")
    _set(path, model_type="no_such_type")
    with pytest.raises(SourceError, match=r"config\.json is not understood"):
        open_model(path)


@pytest.mark.real
@pytest.mark.skipif(not MODELS.is_dir(), reason="the real models are not beside the checkout")
@pytest.mark.parametrize("name", ["reference-3m", "stories260K", "recall-1m"])
def test_real_models(name):
    spec = open_model(MODELS / name)
    assert spec.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert spec.parameters > 200_000
