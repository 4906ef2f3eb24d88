"""Parts and schemes in a few words."""

from __future__ import annotations

from kvpack.core.registry import kind_of
from kvpack.core.roles import Part, Plane
from kvpack.core.types import Group
from kvpack.recipe.build import settings
from kvpack.recipe.inputs_plan import InputsPlan
from kvpack.recipe.kv_plan import KVLayerPlan
from kvpack.recipe.plane_plan import PlanePlan


def describe(part: Part) -> str:
    """A part in a few words: ``affine bits 4, group channel/128, zero integer``.

    Whole numbers and groups are always shown, other settings where they differ from the default.
    """
    words: list[str] = []
    cls: type = type(part)
    for name, field in settings(cls).items():
        value = getattr(part, name)
        if isinstance(value, Part):
            words.append(f"{name} ({describe(value)})")
        elif isinstance(value, tuple) and value and all(isinstance(v, Part) for v in value):
            words.append(f"{name} ({'; '.join(describe(v) for v in value)})")
        elif isinstance(value, Group):
            words.append(f"{name} {value.axis}/{value.size}")
        elif type(value) is int or value != field.default:
            words.append(f"{name} {value}")
    return f"{kind_of(part)} {', '.join(words)}".rstrip()


def plane_text(plane: PlanePlan) -> str:
    """Transforms and codecs of keys or values: ``unrope > hadamard heads 4 > affine bits 2``."""
    folded = " (folded)" if plane.folded else ""
    codecs = " | ".join(describe(codec) for codec in plane.codecs)
    return " > ".join([*(describe(t) + folded for t in plane.transforms), codecs])


def side_text(layer: KVLayerPlan, name: Plane) -> str:
    """The same for one side of a layer, which may store its input instead."""
    if name not in layer.planes:
        return "made again from the stored inputs"
    stored = "" if layer.inputs is None else f"{_inputs_text(layer.inputs, name)} > "
    return stored + plane_text(layer.plane(name))


def _inputs_text(inputs: InputsPlan, name: Plane) -> str:
    basis = f", {inputs.width(name)} singular" if name in inputs.bases else ""
    difference = ", less the layer before's" if inputs.link == "difference" else ""
    place = " before the norm" if inputs.tap == "residual" else ""
    return f"inputs{place} ({inputs.channels} channels{basis}{difference})"
