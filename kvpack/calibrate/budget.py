"""Spending a budget of bits: measure what layers lose, or find it measured, and choose their widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from kvpack.calibrate import sensitivity_cache
from kvpack.calibrate.data import draw
from kvpack.calibrate.sensitivity import sensitivities
from kvpack.calibrate.sequential import check
from kvpack.core.access import CLOSED, Access
from kvpack.core.cache_dir import cache_dir
from kvpack.core.model_spec import ModelSpec
from kvpack.core.progress import SILENT, Progress
from kvpack.models.scan import scan
from kvpack.models.tokenizer import load_tokenizer
from kvpack.recipe.budget import Options, settled, shortfall, spend
from kvpack.recipe.plan import Plan
from kvpack.recipe.recipe import BudgetRecipe
from kvpack.recipe.resolve import resolve


def spend_budget(
    plan: Plan,
    model: ModelSpec,
    *,
    cache: Path | None = None,
    access: Access = CLOSED,
    progress: Progress = SILENT,
) -> Plan:
    """The plan with the widths that its recipe's budget buys.

    Its recipe states them, so that it is the same plan wherever it is resolved again. What was
    measured is kept in the folder `cache`: another target costs no further pass.

    Raises:
        RecipeError: the target cannot be met, or no layer takes part.
        SourceError: the weights hold NaN or Inf.
        UsageError: the calibration text is missing or too short.
    """
    budget = plan.recipe.recipe.budget
    if budget is None or not budget.open:
        return plan
    options = Options.of(plan, budget)
    options.check()  # before anything is measured
    losses = _losses(options, budget, cache_dir(cache), access, progress)
    made = resolve(settled(plan.recipe, spend(options, budget, losses)), model)
    note = shortfall(Options.of(made, budget))
    return made if note is None else replace(made, notes=(*made.notes, note))


def _losses(
    options: Options, budget: BudgetRecipe, cache: Path, access: Access, progress: Progress
) -> Mapping[str, Mapping[int, float]]:
    plan = options.plan
    calibration = plan.recipe.recipe.calibration
    fewer = replace(calibration, samples=min(calibration.samples, budget.samples))
    tokenizer = load_tokenizer(plan.model, trust_remote_code=access.trust_remote_code)
    samples = draw(fewer, tokenizer, allow_download=access.allow_download)
    check(plan, samples)
    hashes = scan(plan.model, progress)
    key = sensitivity_cache.key_of(options, budget, hashes, samples.tokens_sha256)
    known = sensitivity_cache.read(cache, key)
    if known is not None:
        return known
    with TemporaryDirectory(prefix="kvpack-sensitivities-") as scratch:
        found = sensitivities(
            options,
            budget,
            samples.tokens,
            Path(scratch),
            trust_remote_code=access.trust_remote_code,
            progress=progress,
        )
    sensitivity_cache.write(cache, key, found)
    return found
