"""Changes of basis inside the model that leave its function as it is, planned and refused by name.

A tensor x inside the model is read by linear layers, x W^T. With ``<dual(w), forward(x)> = <w, x>``
the readers' rows become ``dual(w)``, and ``forward`` goes into whatever makes x: a norm's gain, the
rows of a projection, or, for the residual stream, the embedding and all layers that add to it.
Where nothing can take it in, it runs online, on the layer's input.
(SmoothQuant, arXiv 2211.10438; AWQ, arXiv 2306.00978; QuaRot, arXiv 2404.00456.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from kvpack.core.errors import RecipeError
from kvpack.core.model_spec import AttentionSpec, InputSite, ModelSpec
from kvpack.core.registry import kind_of
from kvpack.core.roles import Codec, Transform
from kvpack.core.types import Shape, TensorSpec
from kvpack.recipe.recipe import BasisRule

BasisRole = Literal["residual", "attention_input", "attention_output", "mlp_input", "mlp_middle"]


@dataclass(frozen=True)
class BasisPlan:
    """Transforms of one tensor inside the model: the input of some layers, or the residual stream.

    `number` is the place among all of a plan's changes of basis, in which they are applied. `states`
    are what each transform learns. `site` is None for the residual stream. `online`: the transforms
    run on the layers' input; else they are part of the weights.
    """

    number: int
    role: BasisRole
    transforms: tuple[Transform, ...]
    states: tuple[Mapping[str, TensorSpec], ...]
    site: InputSite | None = None
    online: bool = False

    @property
    def place(self) -> InputSite:
        """The site.

        Raises:
            ValueError: this is the residual stream.
        """
        if self.site is None:
            raise ValueError("the residual stream is not the input of some layers")
        return self.site

    @property
    def layer(self) -> int | None:
        """The decoder block that it belongs to, None for the residual stream."""
        return None if self.site is None else self.site.layer

    def state_tensors(self) -> dict[str, TensorSpec]:
        """What the transforms learn, by its name in artifacts, for proofs; online ones learn nothing."""
        return {
            basis_state(self.number, index, name): spec
            for index, state in enumerate(self.states)
            for name, spec in state.items()
            if self.transforms[index].requires()
        }


def basis_state(number: int, index: int, name: str) -> str:
    """Name of what the `index`-th transform of a change of basis learned."""
    return f"basis.{number}.{index}.{name}"


def site_shape(site: InputSite, attention: AttentionSpec, tokens: int = 1) -> Shape:
    """The layout in which transforms see a site's tensor: kv heads apart behind attention."""
    if site.role == "attention_output":
        return (1, attention.kv_heads, tokens, attention.head_dim)
    return (1, 1, tokens, site.channels)


def plan_basis(
    rules: tuple[BasisRule, ...], model: ModelSpec, packed: Mapping[str, Codec]
) -> tuple[BasisPlan, ...]:
    """Changes of basis in the order of the recipe, then of the layers.

    Args:
        rules: the recipe's section.
        model: what it is applied to.
        packed: codec of every packed weight, by checkpoint name.

    Raises:
        RecipeError: a rule asks for what cannot be folded in this model, or is never used.
    """
    plans: list[BasisPlan] = []
    for rule in rules:
        if rule.at == "residual":
            check_residual(rule, model)
            states = _states(rule.transforms, (1, 1, 1, model.hidden_size))
            plans.append(BasisPlan(len(plans), "residual", rule.transforms, states))
            continue
        sites = [site for site in model.sites if site.role == rule.at]
        if not sites:
            raise RecipeError(f"{rule.at}: {model.architecture} has no such place")
        for site in sites:
            attention = model.attention[site.layer]
            transforms = tuple(t.for_codec(_codec(site, packed)) for t in rule.transforms)
            _check_site(rule, site, attention, packed)
            states = _states(transforms, site_shape(site, attention))
            plans.append(BasisPlan(len(plans), rule.at, transforms, states, site, rule.online))
    return tuple(plans)


def _codec(site: InputSite, packed: Mapping[str, Codec]) -> Codec | None:
    """The codec of the first packed reader."""
    return next((packed[name] for name in site.readers if name in packed), None)


def _states(transforms: tuple[Transform, ...], shape: Shape) -> tuple[Mapping[str, TensorSpec], ...]:
    states = []
    for transform in transforms:
        states.append(transform.state_spec(shape))
        if transform.shape(shape) != shape or not transform.linear or transform.needs_rope:
            raise RecipeError(
                f"transform {kind_of(transform)!r} cannot change the basis of weights",
                why="it merges heads or depends on the token",
            )
    return tuple(states)


def _check_site(
    rule: BasisRule, site: InputSite, attention: AttentionSpec, packed: Mapping[str, Codec]
) -> None:
    """Refuse what the maker of the site's tensor cannot take in.

    Raises:
        RecipeError: says what stands in the way.
    """
    if rule.online:
        if loose := [name for name in site.readers if name not in packed]:
            raise RecipeError(
                f"{site.name}: {loose[0]} is not packed",
                why="only packed layers can transform their input online",
                hint="add it to the rules under weights",
            )
        if learning := next((t for t in rule.transforms if t.requires()), None):
            raise RecipeError(
                f"transform {kind_of(learning)!r} cannot run online", why="it learns from calibration"
            )
        if site.role == "attention_output" and attention.kv_heads > 1:
            raise RecipeError(f"{site.name}: transforms of several heads cannot run online")
        return
    if len({transform.permutes for transform in rule.transforms}) > 1:
        raise RecipeError(
            f"{site.name}: one rule both orders and scales channels",
            why="they are folded into different rows",
            hint="give each a rule of its own",
        )
    for transform in rule.transforms:
        if problem := _obstacle(transform, site, attention):
            raise RecipeError(
                f"transform {kind_of(transform)!r} cannot be folded at {site.name}",
                why=problem,
                hint="set online: true, or leave it out",
            )


def _obstacle(transform: Transform, site: InputSite, attention: AttentionSpec) -> str:
    """Why a transform cannot be folded at a site; empty when it can."""
    if site.role == "attention_output":
        return "" if attention.value_linear else "a norm or gate stands between values and output projection"
    if site.role == "mlp_middle":
        if transform.permutes:
            return "" if site.makers else "the layers that make this tensor are not known"
        if not transform.diagonal:
            return "gate and up are multiplied element by element in between"
        return "" if site.scaled is not None else "an activation function stands in between"
    if site.norm is None:
        return "no norm that is known stands in front of these layers"
    return "" if transform.diagonal else "a norm's gain takes in factors only"


def check_residual(rule: BasisRule, model: ModelSpec) -> None:
    """Refuse a change of basis of the residual stream where something else than linear layers meets it.

    Raises:
        RecipeError: names the tensor, or the transform.
    """
    for transform in rule.transforms:
        if not transform.orthonormal or transform.requires():
            raise RecipeError(
                f"transform {kind_of(transform)!r} cannot turn the residual stream",
                why="norms only let orthonormal matrices pass, and all blocks share one",
            )
    norms = [*(s.norm for s in model.sites if s.norm is not None), model.final_norm]
    if any(norm is None or norm.centred or norm.bias for norm in norms):
        raise RecipeError(
            f"the residual stream of {model.architecture} cannot be turned",
            why="its norms subtract the mean, or are not known",
            hint="leave out the rule at: residual",
        )
    if strangers := sorted(set(model.tensors) - set(_residual_known(model)) - set(model.ignored)):
        raise RecipeError(
            f"the residual stream of {model.architecture} cannot be turned",
            why=f"{strangers[0]} acts on it channel by channel, or is not known",
            hint="leave out the rule at: residual",
        )


def _residual_known(model: ModelSpec) -> Iterator[str]:
    """Tensors whose part in the residual stream is understood."""
    yield from (model.embedding, *model.tied)
    for norm in (model.final_norm, *(site.norm for site in model.sites)):
        if norm is not None:
            yield norm.weight
    for linear in model.linears:
        yield from (linear.weight, f"{linear.name}.bias")
    for site in model.sites:
        yield from site.readers
    for attention in model.attention:
        inside = f"{attention.module}."
        yield from (name for name in model.tensors if name.startswith(inside) and "norm" in name)


def untie(model: ModelSpec) -> ModelSpec:
    """The same model with a tensor of its own for everything that was tied."""
    own = {
        name: dataclasses.replace(
            model.tensors[holder], stored_name=model.tensors[holder].stored_name or holder
        )
        for name, holder in model.tied.items()
    }
    return dataclasses.replace(
        model, tensors={**model.tensors, **own}, tied={}, untied={**model.untied, **model.tied}
    )
