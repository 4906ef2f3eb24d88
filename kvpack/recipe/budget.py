"""A budget of bits: which layers take part, what they may take, and who gets how many."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from kvpack import ops
from kvpack.core.errors import RecipeError
from kvpack.core.roles import Codec
from kvpack.core.types import TensorSpec
from kvpack.core.weight_code import stored_spec
from kvpack.recipe.build import settings, to_mapping
from kvpack.recipe.load import digest
from kvpack.recipe.plan import Plan, WeightPlan
from kvpack.recipe.recipe import BudgetRecipe, LoadedRecipe, Recipe, WeightRule

Losses = Mapping[str, Mapping[int, float]]
"""By layer and width, what an allocator found."""


def with_bits(codec: Codec, bits: int) -> Codec | None:
    """The codec at another width, None where it has none or not that one."""
    field = settings(type(codec)).get("bits")
    if field is None or type(getattr(codec, "bits", None)) is not int:
        return None
    if not field.metadata.get("minimum", 1) <= bits <= field.metadata.get("maximum", bits):
        return None
    try:
        changed: Codec = dataclasses.replace(codec, bits=bits)  # type: ignore[type-var]  # every part is a dataclass
    except (RecipeError, ValueError):
        return None
    return changed


def at_width(recipe: Recipe, rule: int, linear: str) -> WeightRule:
    """A rule as it applies to one layer: at the width that a budget has found for it.

    Raises:
        RecipeError: the rule's codec does not have that width.
    """
    found, bits = recipe.weights[rule], (recipe.budget and recipe.budget.bits) or {}
    if linear not in bits or found.codec is None:
        return found
    codec = with_bits(found.codec, bits[linear])
    if codec is None:
        raise RecipeError(f"budget.bits: {linear} cannot have {bits[linear]} bits with this rule's codec")
    return dataclasses.replace(found, codec=codec)


def unknown(recipe: Recipe, packed: Mapping[str, WeightPlan]) -> Sequence[RecipeError]:
    """Layers of `budget.bits` that are not packed."""
    stray = sorted(((recipe.budget and recipe.budget.bits) or {}).keys() - packed.keys())
    if not stray:
        return ()
    what = f"budget.bits: {stray[0]} is no packed layer ({len(stray)} such)"
    return (RecipeError(what, hint="remove budget.bits to spend the budget on this model"),)


@dataclass(frozen=True)
class Options:
    """What the layers of a plan may be.

    `codecs` and `sizes` (stored bytes) are by layer and width, of those that take part. All other
    tensors that the target counts take `fixed` bytes, and `target` is for both together; None
    without one. `elements` is the number of weights or parameters that the target is about.
    """

    plan: Plan
    codecs: Mapping[str, Mapping[int, Codec]]
    sizes: Mapping[str, Mapping[int, int]]
    fixed: int
    target: int | None
    elements: int

    @classmethod
    def of(cls, plan: Plan, budget: BudgetRecipe) -> Options:
        """Look at every packed layer.

        Raises:
            RecipeError: none can have several widths.
        """
        codecs = {name: _codecs(weight, budget.widths) for name, weight in plan.weights.items()}
        codecs = {name: found for name, found in codecs.items() if found}
        if not codecs:
            raise RecipeError(
                "no packed layer can have one of several widths",
                why="a budget chooses the bits of layers whose codec has `bits`",
                hint="use a recipe that packs weights, such as gptq, or another list of budget.widths",
            )
        sizes = {n: {b: _nbytes(plan, n, c) for b, c in found.items()} for n, found in codecs.items()}
        everything = budget.counts == "all"
        held = sum(spec.nbytes for spec in plan.artifact_tensors().values())
        packed = sum(weight.nbytes for weight in plan.weights.values())
        fixed = (held if everything else packed) - sum(plan.weights[name].nbytes for name in codecs)
        elements = plan.model.parameters if everything else _elements(plan, plan.weights)
        target = budget.target_bytes
        if budget.target_bpw is not None:
            target = int(budget.target_bpw * elements / 8)
        return cls(plan, codecs, sizes, fixed, target, elements)

    @cached_property
    def least(self) -> int:
        """Bytes with every layer at its smallest."""
        return self.fixed + sum(min(sizes.values()) for sizes in self.sizes.values())

    @cached_property
    def used(self) -> int:
        """Bytes as planned, of what the target counts."""
        return self.fixed + sum(self.plan.weights[name].nbytes for name in self.sizes)

    def check(self) -> None:
        """Refuse a target that cannot be met.

        Raises:
            RecipeError: the floor, what it consists of, and what to do.
        """
        if self.target is None or self.least <= self.target:
            return
        raise RecipeError(
            f"the target of {_amount(self.target, self.elements)} cannot be met: with every layer at its "
            f"smallest it takes {_amount(self.least, self.elements)}",
            why=_fixed_text(self),
            hint=_way_out(self),
        )


def spend(options: Options, budget: BudgetRecipe, losses: Losses) -> dict[str, int]:
    """The width of every layer that takes part: least loss within the target.

    Raises:
        RecipeError: the target cannot be met.
    """
    options.check()
    if options.target is None:
        raise RecipeError("budget: there is no target", hint="--target-bpw 3.0, or --target-size 700MB")
    room = options.target - options.fixed
    if budget.scope == "model":
        return _choose(options.sizes, losses, room)
    return _by_block(options, losses, room)


def settled(loaded: LoadedRecipe, bits: Mapping[str, int]) -> LoadedRecipe:
    """The recipe with the widths that were found: what an artifact records, and `export` takes again."""
    if loaded.recipe.budget is None:
        raise ValueError("the recipe has no budget")
    budget = dataclasses.replace(loaded.recipe.budget, bits=dict(sorted(bits.items())))
    recipe = dataclasses.replace(loaded.recipe, budget=budget)
    resolved = to_mapping(recipe)
    origins = dict(loaded.origins) | {f"budget.bits.{name}": "budget" for name in bits}
    return dataclasses.replace(
        loaded, recipe=recipe, resolved=resolved, sha256=digest(resolved), origins=origins
    )


def shortfall(options: Options) -> str | None:
    """Why a plan stays more than 1 % below its target; None where it does not."""
    if options.target is None or options.used >= 0.99 * options.target:
        return None
    below = f"{options.used / options.target:.1%} of the target is used"
    widest = all(options.plan.weights[n].nbytes == max(sizes.values()) for n, sizes in options.sizes.items())
    if widest:
        return f"{below}: every layer has the largest of budget.widths"
    steps = (b - a for s in options.sizes.values() for a, b in pairwise(sorted(s.values())))
    return f"{below}: layers are few, and one more step takes {min(steps):,} bytes or more"


def _codecs(weight: WeightPlan, widths: Sequence[int]) -> dict[int, Codec]:
    found = {bits: with_bits(weight.codec, bits) for bits in sorted(widths)}
    return {bits: codec for bits, codec in found.items() if codec is not None}


def _nbytes(plan: Plan, name: str, codec: Codec) -> int:
    """Bytes of a layer with another codec; what else is stored for it stays."""
    weight = plan.weights[name]
    dtype = plan.model.tensors[weight.linear.weight].dtype

    def stored(of: Codec) -> int:
        specs: Mapping[str, TensorSpec] = stored_spec(of, weight.linear.shape, dtype)
        return sum(spec.nbytes for spec in specs.values())

    return weight.nbytes - stored(weight.codec) + stored(codec)


def _elements(plan: Plan, names: Mapping[str, object]) -> int:
    return sum(plan.weights[n].linear.shape[0] * plan.weights[n].linear.shape[1] for n in names)


def _choose(sizes: Mapping[str, Mapping[int, int]], losses: Losses, room: int) -> dict[str, int]:
    names = list(sizes)
    values = [_falling(losses[name], list(sizes[name])) for name in names]
    chosen = ops.knapsack.choose([list(sizes[name].values()) for name in names], values, room)
    if chosen is None:
        raise RecipeError("the target cannot be met", hint="raise it, or allow smaller budget.widths")
    return {name: list(sizes[name])[at] for name, at in zip(names, chosen, strict=True)}


def _falling(losses: Mapping[int, float], widths: Sequence[int]) -> list[float]:
    """Losses by growing width; where more bits seem to harm, they count as no gain instead."""
    found: list[float] = []
    for bits in widths:
        found.append(min([losses[bits], *(loss * (1 - 1e-9) for loss in found[-1:])]))
    return found


def _by_block(options: Options, losses: Losses, room: int) -> dict[str, int]:
    """Every block, and what stands outside the blocks, within its share; leftovers go to the next."""
    blocks: dict[int, list[str]] = {}
    for name in options.sizes:
        layer = options.plan.weights[name].linear.layer
        blocks.setdefault(-1 if layer is None else layer, []).append(name)
    whole = _elements(options.plan, options.sizes)
    bits: dict[str, int] = {}
    seen = used = 0
    for _, names in sorted(blocks.items()):
        seen += _elements(options.plan, dict.fromkeys(names))
        sizes = {name: options.sizes[name] for name in names}
        bits |= _choose(sizes, losses, room * seen // whole - used)
        used += sum(sizes[name][bits[name]] for name in names)
    return bits


def _amount(nbytes: int, elements: int) -> str:
    return f"{nbytes:,} bytes ({8 * nbytes / elements:.3f} bits per weight)"


def _fixed_text(options: Options) -> str:
    copied = sum(t.nbytes for t in options.plan.copied.values())
    if options.fixed < copied:
        return "scales and zeros are counted, too"
    largest = max(options.plan.copied, key=lambda n: options.plan.copied[n].nbytes, default="")
    size = options.plan.copied[largest].nbytes if largest else 0
    return f"{options.fixed:,} bytes are not up to the budget, {size:,} of them {largest}"


def _way_out(options: Options) -> str:
    outside = [n for n in options.plan.copied if n == options.plan.model.embedding or "lm_head" in n]
    if outside and options.fixed >= sum(t.nbytes for t in options.plan.copied.values()):
        measured = any(w.solver.requires() for w in options.plan.weights.values())
        rule = "a rule in front, {match: '@vocabulary', codec: {kind: affine}, solver: {kind: rtn}}"
        return (
            f"pack embedding and head, too: {rule if measured else '--set weights.0.match=@all'}; "
            "or raise the target"
        )
    return "raise the target, allow smaller budget.widths, or use larger groups: fewer scales"
