"""Every layer of a block is measured behind the packed layers before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvpack.calibrate import block
from kvpack.calibrate.collect import Chain
from kvpack.calibrate.passes import Passes
from kvpack.calibrate.store import Calibration
from kvpack.core import weight_code
from kvpack.core.errors import CalibrationMismatch
from tests.calibrate.conftest import Job, job_for

AT_ONCE = "calibration.sequential=false"
W4 = "weights=[{match: '@linear', codec: {kind: affine, bits: 4}, solver: {kind: gptq}}]"
MIXED = (
    "weights=[{match: '@k', codec: {kind: affine, bits: 3}, solver: {kind: rtn}},"
    " {match: '@gate', keep: true},"
    " {match: '@linear', codec: {kind: affine, bits: 3}, solver: {kind: gptq}}]"
)
RECIPES = {
    "a cache that learns": ("llama", "rotatekv-w4", ()),
    "queries and several passes": ("qwen3", "a2ats", (W4,)),
    "inputs coded and turned online": ("llama", "quarot", ()),
    "some rounded, some not packed": ("llama", "w4", (MIXED,)),
    "sparse sites": ("llama", "chess", (W4,)),
    "experts": ("mixtral", "w4", ()),
}


def both(job: Job, folder: Path, monkeypatch) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Files of a calibration whose batches wait, and of one whose forwards are repeated."""
    files, asked = [], []
    for wait in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(block, "fits", lambda needed, wait=wait: asked.append(needed) or wait)
            made = job.run(folder / str(wait))
        files.append({path.name: path.read_bytes() for path in made.path.iterdir()})
    assert min(asked) > 0
    return files[0], files[1]


@pytest.mark.parametrize("what", RECIPES)
def test_the_way_does_not_show_in_a_calibration(what, checkpoint, tmp_path, monkeypatch) -> None:
    family, recipe, changes = RECIPES[what]
    waited, repeated = both(job_for(checkpoint(family), recipe, *changes), tmp_path, monkeypatch)
    assert waited == repeated


def blocks(made: Calibration) -> list[bytes]:
    return [path.read_bytes() for path in sorted(made.path.glob("block-*"))]


@pytest.mark.parametrize(("changes", "passes"), [((), 4), ((AT_ONCE,), 6)])
def test_two_batches_pass_two_blocks(checkpoint, tmp_path, monkeypatch, changes, passes) -> None:
    """Nobody wants what the last block gives; the first one runs twice where all is measured at once."""
    count, through = [], Passes.through

    def counted(self, layer, part, *, chains):
        count.append(layer)
        return through(self, layer, part, chains=chains)

    monkeypatch.setattr(Passes, "through", counted)
    job_for(checkpoint("llama"), "w4", *changes).run(tmp_path / "c")
    assert len(count) == passes


def test_another_order_of_layers_falls_back_to_measuring_at_once(checkpoint, tmp_path, monkeypatch) -> None:
    expected = blocks(job_for(checkpoint("llama"), "w4", AT_ONCE).run(tmp_path / "at-once"))
    job = job_for(checkpoint("llama"), "w4")
    found = block.find_stages
    monkeypatch.setattr(block, "find_stages", lambda *args: found(*args)[::-1])
    assert blocks(job.run(tmp_path / "reversed")) == expected
    monkeypatch.setattr(block, "find_stages", lambda *args: [])
    assert blocks(job.run(tmp_path / "none")) == expected


@pytest.mark.parametrize("wait", [True, False])
def test_what_was_solved_before_an_odd_batch_stays(job, done, tmp_path, monkeypatch, wait) -> None:
    """The states of keys and values, too, are measured once and behind packed projections."""
    found = block.find_stages

    def odd(*args):
        first, second, *others, last = found(*args)
        return [first, last, *others, second]

    monkeypatch.setattr(block, "find_stages", odd)
    monkeypatch.setattr(block, "fits", lambda needed: wait)
    made = job.run(tmp_path / "odd")
    for name, same in {"self_attn.k_proj": True, "mlp.down_proj": False}.items():
        ours, regular = (x.solved(f"model.layers.0.{name}") for x in (made, done))
        assert torch.equal(ours["codes"], regular["codes"]) == same
    for ours, regular in zip(made.states(0, "key"), done.states(0, "key"), strict=True):
        assert all(torch.equal(ours[name], regular[name]) for name in regular)


@torch.no_grad()
def test_chains_see_values_of_the_packed_projection(checkpoint, tmp_path, monkeypatch) -> None:
    job = job_for(checkpoint("llama"), "rotatekv-w4", "kv_cache.value.transforms=[]", "calibration.batch=6")
    seen, see = [], Chain.see
    monkeypatch.setattr(Chain, "see", lambda self, x, gradient=None: seen.append(x) or see(self, x, gradient))
    done = job.run(tmp_path / "c")
    model = AutoModelForCausalLM.from_pretrained(job.plan.model.path, dtype=torch.float32).eval()
    projection, name = model.model.layers[0].self_attn.v_proj, "model.layers.0.self_attn.v_proj"
    codec, shape = job.plan.weights[name].codec, projection.weight.shape
    projection.weight.copy_(weight_code.decode(codec, done.solved(name), shape, torch.float32))
    values = []
    projection.register_forward_hook(lambda m, args, out: values.append(out))
    model(job.samples.tokens)
    expected = values[0].unflatten(-1, (2, 16)).transpose(1, 2)
    assert torch.allclose(seen[1], expected, atol=1e-5)


def test_the_order_belongs_to_what_identifies_a_calibration_of_weights(checkpoint, tmp_path) -> None:
    job = job_for(checkpoint("llama"), "w4")
    done = job.run(tmp_path / "c")
    with pytest.raises(CalibrationMismatch, match="other values of: sequential"):
        done.matches(job_for(checkpoint("llama"), "w4", AT_ONCE).plan, job.hashes)
    cache = job_for(checkpoint("llama"), "rotatekv").run(tmp_path / "cache")
    cache.matches(job_for(checkpoint("llama"), "rotatekv", AT_ONCE).plan, job.hashes)
