"""What an export says of itself: the manifest, from the plan and what was written, and config.json."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from kvpack import __version__
from kvpack.artifact.manifest import (
    FORMAT_VERSION,
    BaseModel,
    FileRecord,
    Manifest,
    PackedLinear,
    RecipeRecord,
    Totals,
    bits_per_element,
)
from kvpack.artifact.writer import Written
from kvpack.recipe.plan import Plan, WeightPlan
from kvpack.recipe.recipe import LoadedRecipe
from kvpack.recipe.sparsity import SparsityPlan


def library_versions() -> dict[str, str]:
    """Versions that the bytes of an artifact may depend on."""
    libraries = ("safetensors", "torch", "transformers", "zstandard")
    return {**{name: metadata.version(name) for name in libraries}, "python": platform.python_version()}


def config_of(plan: Plan) -> dict[str, Any]:
    """The source's config.json, marked so that transformers asks kvpack to load it.

    It states the dtype: where the source's does not, transformers would take that of some scale.
    """
    config: dict[str, Any] = json.loads((plan.model.path / "config.json").read_text(encoding="utf-8"))
    if not (config.get("dtype") or config.get("torch_dtype")):
        config["dtype"] = plan.model.dtype
    if plan.model.untied:
        config["tie_word_embeddings"] = False
    config["quantization_config"] = {"quant_method": "kvpack", "format_version": FORMAT_VERSION}
    return config


def manifest_of(
    plan: Plan,
    written: Written,
    *,
    source_hashes: Mapping[str, str],
    relative_errors: Mapping[str, float],
    sparsity: SparsityPlan | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> Manifest:
    """Describe a written artifact.

    Args:
        plan: what was exported.
        written: what `ArtifactWriter` has on the disk.
        source_hashes: sha256 of every weight file of the source.
        relative_errors: by packed layer.
        sparsity: the plan's, with the calibrated shares.
        calibration: fingerprint of what was calibrated on.
    """
    loaded, model = plan.recipe, plan.model
    weight_bytes = sum(record.nbytes for record in written.tensors.values())
    return Manifest(
        base_model=_base_model(plan, source_hashes),
        recipe=_recipe(loaded),
        resolved_recipe=loaded.resolved,
        weights={
            n: _packed(n, w, written, model.tensors[w.linear.weight].dtype, relative_errors)
            for n, w in plan.weights.items()
        },
        copied={name: written.tensors[name] for name in plan.copied},
        basis=plan.basis,
        sparsity=sparsity,
        thresholds={} if sparsity is None else {n: written.tensors[n] for n in sparsity.tensors()},
        dropped=plan.dropped,
        kv=plan.kv,
        kv_state=written.kv_state,
        totals=Totals(
            weight_bytes,
            sum(record.nbytes for record in written.kv_state.values()),
            bits_per_element(weight_bytes, model.parameters),
        ),
        files=written.files,
        calibration=calibration,
        seed=loaded.recipe.calibration.seed,
        versions=library_versions(),
        kvpack_version=__version__,
    )


def _recipe(loaded: LoadedRecipe) -> RecipeRecord:
    return RecipeRecord(
        name=loaded.recipe.name,
        path=loaded.path.replace("\\", "/").rpartition("/")[2],
        source=loaded.source,
        sha256=loaded.sha256,
        overrides=loaded.overrides,
        variant=loaded.variant,
    )


def _base_model(plan: Plan, source_hashes: Mapping[str, str]) -> BaseModel:
    model = plan.model
    return BaseModel(
        architecture=model.architecture,
        family=model.family,
        dtype=model.dtype,
        parameters=model.parameters,
        files={f: FileRecord((model.path / f).stat().st_size, source_hashes[f]) for f in model.files},
        tied=model.tied,
        repository=model.repository,
        revision=model.revision,
    )


def _packed(
    name: str, weight: WeightPlan, written: Written, dtype: str, relative_errors: Mapping[str, float]
) -> PackedLinear:
    linear = weight.linear
    rows, columns = linear.shape
    tensors = {part: written.tensors[f"{name}.{part}"] for part in weight.tensors}
    stored = sum(record.nbytes for record in tensors.values())
    return PackedLinear(
        role=linear.role,
        shape=linear.shape,
        dtype=dtype,
        codec=weight.codec,
        solver=weight.solver,
        tensors=tensors,
        bits_per_element=bits_per_element(stored, rows * columns),
        bits=getattr(weight.codec, "bits", None),
        layer=linear.layer,
        relative_error=relative_errors.get(name),
        inputs=weight.inputs,
        online=weight.online,
    )
