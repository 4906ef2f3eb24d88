from __future__ import annotations

import itertools
import re
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvpack.calibrate.hooks import Tap
from kvpack.calibrate.identity import needs_calibration
from kvpack.core import weight_code
from kvpack.core.errors import SourceError, UsageError
from kvpack.models.fold import fold_value
from kvpack.models.view import ModelView
from tests.calibrate.conftest import Job, job_for
from tests.tiny_models import FAMILIES, make_model


def _model(job: Job):
    return AutoModelForCausalLM.from_pretrained(job.plan.model.path, dtype=torch.float32).eval()


def _fold(model, job: Job) -> None:
    for layer in job.plan.kv:
        a = layer.attention
        names = [f"{a.value.linear}.weight", f"{a.output.linear}.weight"]
        weights = {n: model.get_parameter(n) for n in names}
        for name, tensor in fold_value(a, weights, layer.value.transforms, [{}]).items():
            model.get_parameter(name).copy_(tensor)


def _grams(model, tokens: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Gram matrices from a forward of the whole model, by plain hooks."""
    found: dict[str, torch.Tensor] = {}

    def hook(name):
        def see(module, args):
            flat = args[0].reshape(-1, args[0].shape[-1])
            found[name] = found.get(name, 0) + flat.T @ flat

        return see

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    for part in tokens.split(4):
        model(part)
    for handle in handles:
        handle.remove()
    return found


STAGES = ("[qkv]_proj", "o_proj", "(gate|up)_proj", "down_proj")


@pytest.mark.parametrize("sequential", [True, False])
@torch.no_grad()
def test_codes_equal_those_of_a_whole_model_quantised_piece_by_piece(checkpoint, tmp_path, sequential):
    """The slow way: the whole model in memory, one forward per piece, earlier pieces quantised."""
    job = job_for(checkpoint("llama"), "rotatekv-w4", f"calibration.sequential={str(sequential).lower()}")
    done, model = job.run(tmp_path / "c"), _model(job)
    _fold(model, job)
    pieces = STAGES if sequential else (".*",)
    for layer, piece in itertools.product(range(len(job.plan.model.blocks)), pieces):
        inside = re.compile(rf"model\.layers\.{layer}\..*{piece}")
        weights = {n: w for n, w in job.plan.weights.items() if inside.fullmatch(n)}
        assert weights
        grams = _grams(model, job.samples.tokens, list(weights))
        for name, weight in weights.items():
            parameter = model.get_parameter(f"{name}.weight")
            stats = {"gram": {"gram": grams[name]}}
            expected = weight.solver.solve(parameter.clone(), weight.codec, stats).payload
            found = done.solved(name)
            assert found is not None
            same = (expected.tensors["codes"] == found["codes"]).float().mean()
            assert same > 0.995, name
            parameter.copy_(weight_code.decode(weight.codec, found, parameter.shape, torch.float32))


@torch.no_grad()
def test_states_equal_those_fitted_on_the_keys_of_the_whole_model(checkpoint, tmp_path):
    job = job_for(checkpoint("llama"), "rotatekv")
    done = job.run(tmp_path / "c")
    model, keys = _model(job), {}
    for layer in job.plan.kv:
        model.get_submodule(layer.attention.key.linear).register_forward_hook(
            lambda m, i, out, layer=layer.attention.layer: keys.setdefault(layer, []).append(out)
        )
    for part in job.samples.tokens.split(4):
        model(part)
    for layer in job.plan.kv:
        a, (_, hadamard, _) = layer.attention, layer.key.transforms
        before = torch.cat(keys[a.layer]).unflatten(-1, (a.kv_heads, a.head_dim)).transpose(1, 2)
        turned = hadamard.forward(before, {}, None)
        means = turned.double().mean((0, 2)).flatten()
        perm = done.states(a.layer, "key")[2]["perm"].flatten().long()
        assert sorted(perm.tolist()) == list(range(len(means)))
        assert (means[perm].diff() > -1e-5).all()
        assert means.diff().lt(0).any()
    assert done.states(0, "value") == ({}, {})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_calibrates(family, checkpoint, tmp_path):
    job = job_for(checkpoint(family), "rotatekv-w4")
    done = job.run(tmp_path / "c")
    done.matches(job.plan, job.hashes, job.samples.tokens_sha256)
    assert set(done.output_errors) == set(job.plan.weights)
    assert all(0 < e < 0.2 for e in done.output_errors.values())
    for name, weight in job.plan.weights.items():
        tensors = done.solved(name)
        assert tensors is not None
        found = {n: (tuple(t.shape), str(t.dtype)[6:]) for n, t in tensors.items()}
        assert found == {n: (s.shape, s.dtype) for n, s in weight.tensors.items()}


def test_gptq_output_error_is_below_round_to_nearest(job, done):
    from dataclasses import replace

    from kvpack.calibrate.solve import solve
    from kvpack.models.weights import SourceReader
    from kvpack.parts.solvers.rtn import Rtn

    name = "model.layers.0.mlp.up_proj"
    model = _model(job)
    with torch.no_grad():
        _fold(model, job)
        gram = _grams(model, job.samples.tokens, [name])[name]
    matrix = SourceReader.of(job.plan.model).read(f"{name}.weight")
    weight = replace(job.plan.weights[name], solver=Rtn())
    rounded = solve(weight, matrix, {"gram": {"gram": gram}}, torch.float32)
    assert rounded.output_error is not None
    assert done.output_errors[name] < 0.9 * rounded.output_error


def test_two_runs_write_the_same_bytes(job, done, tmp_path):
    again = job.run(tmp_path / "again")
    names = sorted(p.name for p in done.path.iterdir())
    assert names == ["block-00000.safetensors", "block-00001.safetensors", "calibration.json"]
    assert names == sorted(p.name for p in again.path.iterdir())
    for name in names:
        assert (done.path / name).read_bytes() == (again.path / name).read_bytes()
    assert str(tmp_path) not in (again.path / "calibration.json").read_text()


def test_sharding_does_not_change_the_results(job, done, tmp_path):
    other = job_for(make_model(tmp_path / "m", "llama", shard_size="100KB"), "rotatekv-w4").run(
        tmp_path / "c"
    )
    for file in ("block-00000.safetensors", "block-00001.safetensors"):
        assert (done.path / file).read_bytes() == (other.path / file).read_bytes()


def test_only_one_block_is_ever_loaded(job, tmp_path, monkeypatch):
    seen = []
    load = ModelView.load_block

    def spy(self, layer, *args):
        assert list(self.resident()) == []
        load(self, layer, *args)
        seen.append(set(self.resident()) == set(self.block_tensors(layer)))

    monkeypatch.setattr(ModelView, "load_block", spy)
    job.run(tmp_path / "c")
    assert seen == [True, True]


def test_the_head_can_be_solved_too(checkpoint, tmp_path):
    job = job_for(checkpoint("qwen2"), "w4", "weights.0.match=re:.*(proj|lm_head)")
    assert "lm_head" in job.plan.weights
    done = job.run(tmp_path / "c")
    assert done.solved("lm_head") is not None
    assert (done.path / "outer.safetensors").is_file()
    assert 0 < done.output_errors["lm_head"] < 0.2


def test_progress_covers_every_block(job, tmp_path):
    seen = []
    job.run(tmp_path / "c", progress=lambda stage, done, total, detail="": seen.append((stage, done, total)))
    assert seen == [("calibrate", 0, 2), ("calibrate", 1, 2), ("calibrate", 2, 2)]


def test_what_needs_calibration(checkpoint):
    for recipe, needs in {"w4": True, "w4@rtn": False, "rotatekv": True, "kivi": False}.items():
        assert needs_calibration(job_for(checkpoint("llama"), recipe).plan) == needs, recipe


def test_failures_leave_nothing_behind(job, tmp_path, checkpoint, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("stop")

    with monkeypatch.context() as patch:
        patch.setattr("kvpack.calibrate.sequential.solve_all", broken)
        with pytest.raises(RuntimeError, match="stop"):
            job.run(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    job.run(tmp_path / "c")
    before = (tmp_path / "c" / "calibration.json").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        job.run(tmp_path / "c")
    job.run(tmp_path / "c", force=True)
    assert (tmp_path / "c" / "calibration.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_samples_that_do_not_fit_the_model_are_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="samples have 520 tokens, the model reads 512"):
        job_for(checkpoint("llama"), "w4", "calibration.sample_tokens=520").run(tmp_path / "c")
    job = job_for(checkpoint("llama"), "w4")
    job.samples.tokens[0, 0] = 256
    with pytest.raises(SourceError, match="token 256, the model knows 256"):
        job.run(tmp_path / "c")


def test_random_state_is_left_alone(job, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    job.run(tmp_path / "c")
    assert torch.equal(torch.rand(3), expected)


def test_bf16_and_fp16_models(tmp_path):
    for dtype in ("bfloat16", "float16"):
        job = job_for(make_model(tmp_path / dtype, "llama", dtype=dtype), "rotatekv-w4")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            done = job.run(tmp_path / f"c-{dtype}")
        assert all(0 < e < 0.2 for e in done.output_errors.values())


def test_tap_shows_every_layer_once(job):
    model, seen = _model(job), []
    with torch.no_grad():
        model(job.samples.tokens[:2], past_key_values=Tap(lambda k, v: seen.append(k.shape)), use_cache=True)
    assert seen == [(2, 2, 48, 16)] * 2
