"""The block-wise backward pass against plain autograd through the whole model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvpack.calibrate import gradients
from kvpack.calibrate.hooks import Tap
from kvpack.core.errors import ResourceError, SourceError
from kvpack.models import open_model
from kvpack.models.view import ModelView
from kvpack.models.weights import SourceReader
from tests.calibrate.conftest import job_for
from tests.tiny_models import make_model

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox")


def tokens(samples: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(3, 256, (samples, length), generator=torch.Generator().manual_seed(3))


def by_autograd(path, ids: torch.Tensor) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Per sample and layer, gradients of the mean loss per token, from one backward of everything."""
    model, found = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), []
    for row in ids:
        seen: list[torch.Tensor] = []
        tap = Tap(lambda *pair, seen=seen: seen.extend(pair))
        loss = model(row[None], labels=row[None], past_key_values=tap, use_cache=True).loss
        flat = torch.autograd.grad(loss, seen)
        found.append(list(zip(flat[::2], flat[1::2], strict=True)))
    return found


def swept(path, ids: torch.Tensor, folder, layers=(0, 1)) -> gradients.Gradients:
    spec = open_model(path)
    view = ModelView.build(spec)
    folder.mkdir()
    with torch.no_grad():
        done = gradients.sweep(view, SourceReader.of(spec), ids, folder, layers)
    assert not list(view.resident())
    return done


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_autograd(family, tied, tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "LOGIT_ELEMENTS", 256 * 7)
    path = make_model(tmp_path / "m", family, tied=tied)
    ids = tokens()
    expected, found = by_autograd(path, ids), swept(path, ids, tmp_path / "g")
    for layer in (0, 1):
        for plane, gradient in enumerate(found.of(layer, slice(0, 3))):
            whole = torch.cat([sample[layer][plane] for sample in expected])
            assert gradient.shape == whole.shape
            assert whole.abs().max() > 0
            assert (gradient - whole).abs().max() <= 1e-4 * whole.abs().max()


def test_only_wanted_layers_are_kept(tmp_path):
    path = make_model(tmp_path / "m", layers=3)
    whole, part = swept(path, tokens(), tmp_path / "a", (0, 1, 2)), swept(path, tokens(), tmp_path / "b", [1])
    assert list(part.keys) == list(part.values) == [1]
    for a, b in zip(whole.of(1, slice(1, 3)), part.of(1, slice(1, 3)), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_models_keep_bfloat16_gradients(tmp_path):
    path = make_model(tmp_path / "m", dtype="bfloat16")
    found = swept(path, tokens(), tmp_path / "g")
    assert found.keys[0].dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.save_pretrained(tmp_path / "wide")
    expected = by_autograd(tmp_path / "wide", tokens())
    for plane, gradient in enumerate(found.of(1, slice(0, 3))):
        whole = torch.cat([sample[1][plane] for sample in expected])
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), whole.flatten(), 0) > 0.999


def test_a_full_disk_is_refused_before_any_work(tmp_path, monkeypatch):
    path, folder = make_model(tmp_path / "m"), tmp_path / "g"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(ResourceError, match=r"needs [0-9,]+ bytes"):
        swept(path, tokens(), folder)
    assert not list(folder.iterdir())


def test_announced_bytes_are_those_of_the_files(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gradients, "require_space", lambda target, nbytes: asked.append(nbytes))
    swept(make_model(tmp_path / "m", layers=3), tokens(), tmp_path / "g", (0, 2))
    assert asked == [sum(f.stat().st_size for f in (tmp_path / "g").iterdir())]


def test_progress_and_refusal(tmp_path):
    path = make_model(tmp_path / "m")
    told = []
    spec = open_model(path)
    (tmp_path / "g").mkdir()
    with torch.no_grad():
        gradients.sweep(
            ModelView.build(spec),
            SourceReader.of(spec),
            tokens(),
            tmp_path / "g",
            (0, 1),
            lambda stage, done, total, detail="": told.append((stage, done, total)),
        )
    assert told == [("gradients", i, 4) for i in range(5)]

    class Broken:
        def read(self, name):
            tensor = SourceReader.of(spec).read(name)
            return tensor * torch.nan if "mlp" in name else tensor

    with torch.no_grad(), pytest.raises(SourceError, match="block 0 computes NaN"):
        gradients.sweep(ModelView.build(spec), Broken(), tokens(), tmp_path / "g", (0,))


def projections(job, learned: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a key or value projection gives, and its gradient, from a backward of the whole model."""
    model = AutoModelForCausalLM.from_pretrained(job.plan.model.path, dtype=torch.float32).eval()
    outputs: list[torch.Tensor] = []
    model.get_submodule(learned).register_forward_hook(lambda m, i, out: outputs.append(out))
    found = []
    for row in job.samples.tokens:
        loss = model(row[None], labels=row[None], use_cache=False).loss
        found.append((outputs[-1].detach()[0], torch.autograd.grad(loss, outputs[-1])[0][0]))
    rows, gradient = (torch.cat(t)[None] for t in zip(*found, strict=True))
    return rows, gradient


@pytest.mark.parametrize("plane", ["key", "value"])
def test_a_calibration_learns_from_the_projections_and_their_gradients(plane, tmp_path):
    """Through un-RoPE and merged heads: what the paper measures at k_proj and v_proj."""
    job = job_for(make_model(tmp_path / "m"), "kvquant")
    done = job.run(tmp_path / "c")
    assert not [p for p in (tmp_path / "c").iterdir() if p.is_dir()], "no scratch files are left"
    for layer in job.plan.kv:
        attention = layer.attention
        rows, gradient = projections(job, (attention.key if plane == "key" else attention.value).linear)
        position = torch.arange(rows.shape[1]) % job.samples.tokens.shape[1]
        stats = {
            "rows": {"rows": rows, "position": position},
            "gradient.rows": {"rows": gradient, "position": position},
        }
        codec = layer.plane(plane).codecs[0]
        expected, found = codec.fit(stats), done.states(attention.layer, plane)[-1]
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.allclose(found[name].float(), tensor.float(), atol=4e-3, rtol=2e-3), name
