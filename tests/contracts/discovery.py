"""Every part of a role, in its default configuration and in those of `cases/<role>_<kind>.py`.

A new part is under contract as soon as its file exists. A cases file is only needed for further
configurations (`CASES`), or where a part has settings without defaults.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from kvpack.calibrate.stats import accumulator
from kvpack.core import registry
from kvpack.core.roles import Part
from kvpack.core.types import Group, State, Stats, TensorSpec
from kvpack.parts.codecs.affine import Affine

SYMMETRIC = Affine(bits=8, group=Group("channel", 0), zero="none")
CASES = Path(__file__).parent / "cases"


def parts(role: str) -> list:
    """Pytest parameters: one per configuration of every part of `role`."""
    found: list[Part] = []
    for kind in registry.kinds(role):
        cases = configurations(role, kind)
        try:
            default = [registry.find(role, kind)()]
            if role == "transforms":
                default = [default[0].for_codec(SYMMETRIC)]
        except TypeError:
            assert cases, f"{role}/{kind} has settings without defaults: add {CASES}/{role}_{kind}.py"
            default = []
        found += [*default, *(c for c in cases if c not in default)]
    return [pytest.param(part, id=repr(part)) for part in found]


def configurations(role: str, kind: str) -> list[Part]:
    return list(getattr(cases(role, kind), "CASES", ()))


def cases(role: str, kind: str) -> ModuleType | None:
    """The cases file of a part, None where there is none."""
    path = CASES / f"{role}_{kind}.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stats_of(part: Part, x: Tensor) -> Stats:
    """The statistics that `part` asks for, measured on `x` [B, K, T, D] or [T, C].

    Gradients, queries and projections are random; RoPE turns channel d with d + D/2.
    """
    layer_input = x.dim() == 2
    x = x if x.dim() == 4 else x[None, None]
    batch, heads, tokens, channels = x.shape
    streams = {
        "input": x,
        "gradient": 1e-4 * random(*x.shape, seed=11),
        "query": random(batch, heads, 2 * tokens, channels, seed=12),
        "factor": random(batch, heads, tokens, channels, seed=16),
    }
    found: dict[str, State] = {}
    for stat in part.requires():
        if stat.of == "projection":
            weight = random(heads * channels, 24, seed=13)
            found[stat.name] = {"weight": weight, "heads": torch.tensor(heads)}
            continue
        if stat.of == "consumers":
            rows = random(heads, 40, channels, seed=15)
            found[stat.name] = {"weight": rows[0] if layer_input else rows}
            continue
        if stat.of == "rope":
            half = channels // 2
            paired = torch.arange(2 * half).roll(half)
            found[stat.name] = {"partner": torch.cat((paired, torch.arange(2 * half, channels)))}
            continue
        statistic = accumulator(stat.kind)
        statistic.update(streams[stat.of])
        if stat.kind in ("all_rows", "head_gram"):  # clusters and their metric need many
            statistic.update(random(-(-512 // tokens), heads, tokens, channels, seed=14))
        found[stat.name] = statistic.state()
    return found


def fitted(part: Part, x: Tensor) -> State:
    """The state that `part` learns from `x`, as an artifact gives it back."""
    return through_safetensors(part.fit(stats_of(part, x)))


def through_safetensors(tensors: Mapping[str, Tensor]) -> State:
    return load(save({name: t.contiguous() for name, t in tensors.items()}))


def specs(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {n: TensorSpec(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in tensors.items()}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
