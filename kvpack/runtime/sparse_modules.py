"""The modules of sparse activations: an FFN, a linear layer, and the mask in front of a packed layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvpack import ops
from kvpack.core.errors import UnsupportedModel
from kvpack.core.weight_code import decode_rows, prepare_input
from kvpack.models.feed_forward import FeedForward
from kvpack.recipe.sparsity import SparseSite, SparsityPlan
from kvpack.runtime.linear import PackedLinear
from kvpack.runtime.sparsity import SWITCH, Gate, Switch


def replace_sparse(model: nn.Module, plan: SparsityPlan) -> None:
    """Put sparse modules in the place of the plan's FFNs and linear layers, thresholds not yet there.

    Packed layers keep their class and get their input masked.

    Raises:
        UnsupportedModel: an FFN is of no known kind.
    """
    switch = Switch(plan.prefill)
    setattr(model, SWITCH, switch)
    # Linear layers first: an FFN takes over the children that it then has.
    for name, site in sorted(plan.sites.items(), key=lambda item: item[1].kind == "feed_forward"):
        old = model.get_submodule(name)
        if site.kind == "input" and type(old) is not nn.Linear:
            switch.gates[name] = mask_input(old, site, switch)
            continue
        new: SparseFeedForward | SparseLinear
        if site.kind == "feed_forward":
            new = SparseFeedForward(old, site, switch, name)
        else:
            new = SparseLinear(cast(nn.Linear, old), site, switch)
        model.set_submodule(name, new)
        switch.gates[name] = new.gate


class SparseFeedForward(nn.Module):
    """``down(a * up(x))`` with ``a = act(gate(x))`` where ``|a| >= t``, else 0.

    It has the children of the FFN that it replaces, under their names.
    """

    def __init__(self, old: nn.Module, site: SparseSite, switch: Switch, where: str) -> None:
        super().__init__()
        for name, child in old.named_children():
            self.add_module(name, child)
        # In a tuple: these are no children, or children already.
        self._held = (old, FeedForward.of(old, where), where)
        self.gate = Gate(self, site, switch)
        self._skipping = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply the FFN to `x` [..., C]."""
        parts, way = self._held[1], self.gate.way(x)
        if way == "skipping" and self._skipping:
            return self._skip(parts, x)
        gate, factor = parts.parts(x)
        kept = gate if way == "dense" else self.gate.mask(gate)
        result: Tensor = parts.down(kept if factor is None else kept * factor)
        return result

    def _skip(self, parts: FeedForward, x: Tensor) -> Tensor:
        """One token: the gate as it is, then only the rows and columns that its large numbers meet."""
        width = self.gate.site.channels
        gate = parts.activation(_first_rows(parts.first, x, width)).reshape(-1)
        kept = self.gate.choose(gate)
        factors = gate[kept]
        if parts.fused:
            factors = factors * _rows_of(parts.first, kept + width, x.reshape(-1))
        elif parts.up is not None:
            factors = factors * _rows_of(parts.up, kept, x.reshape(-1))
        return _columns_of(parts.down, kept, factors, width).reshape(*x.shape[:-1], -1)

    def start(self, stops: bool) -> None:
        """Check that this is the FFN that it replaces; put each column of the down projection in one piece.

        A threshold that `stops` nothing leaves the model's own computation as it is.

        Raises:
            UnsupportedModel: the results differ.
        """
        old, parts, where = self._held
        self._check(old, parts, where)
        maker = parts.first if parts.up is None else parts.up
        self._skipping = stops and (not parts.gated or _plain(maker) or type(maker) is PackedLinear)
        if not self._skipping:
            return
        up = "" if not parts.gated else "rows of up" if _plain(maker) else "packed rows of up"
        down = "columns of down" if _plain(parts.down) else ""
        self.gate.skips = " and ".join(filter(None, (up, down))) or self.gate.skips
        if _plain(parts.down):
            transpose(parts.down)

    def _check(self, old: nn.Module, parts: FeedForward, where: str) -> None:
        first = next(self.parameters(), self.gate.threshold)
        if any(tensor.is_meta for tensor in (*self.parameters(), *self.buffers())):
            return
        channels = getattr(parts.first, "in_features", 0)
        probe = torch.linspace(-1, 1, 2 * channels, device=first.device).reshape(1, 2, channels)
        probe = probe.to(first.dtype if first.is_floating_point() else torch.float32)
        gate, factor = parts.parts(probe)
        if not torch.equal(parts.down(gate if factor is None else gate * factor), old(probe)):
            raise UnsupportedModel(
                f"{type(old).__name__} computes something else than an activated gate times an up projection",
                where=where,
                hint="leave out sparsity.gate",
            )


class SparseLinear(nn.Module):
    """``W x' + b`` where x' is x without its small numbers; W [R, C] and b keep their names."""

    def __init__(self, old: nn.Linear, site: SparseSite, switch: Switch) -> None:
        super().__init__()
        self.weight, self.bias = old.weight, old.bias
        self.in_features, self.out_features = old.in_features, old.out_features
        self.gate = Gate(self, site, switch)
        self._skipping = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` [..., C]."""
        way = self.gate.way(x)
        if way == "skipping" and self._skipping:
            flat = x.reshape(-1)
            kept = self.gate.choose(flat)
            return weighted_columns(self, kept, flat[kept]).reshape(*x.shape[:-1], -1)
        return functional.linear(x if way == "dense" else self.gate.mask(x), self.weight, self.bias)

    def start(self, stops: bool) -> None:
        """Put each column in one piece, unless the threshold stops nothing."""
        self._skipping = stops and not self.weight.is_meta
        if self._skipping:
            self.gate.skips = "columns"
            transpose(self)


def mask_input(module: nn.Module, site: SparseSite, switch: Switch) -> Gate:
    """Let a packed layer see only the large numbers of its input; its weight is decoded as a whole."""
    gate = Gate(module, site, switch)

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args if gate.way(args[0]) == "dense" else (gate.mask(args[0]), *args[1:])

    module.register_forward_pre_hook(hook)
    return gate


def transpose(linear: Any) -> None:
    """Lay a matrix [R, C] out column by column: same numbers, same shape, same memory."""
    linear.weight.data = linear.weight.data.t().contiguous().t()


def weighted_columns(linear: Any, columns: Tensor, factors: Tensor) -> Tensor:
    """What a layer gives for one token that is `factors` [n] in some columns and 0 elsewhere, [R]."""
    found = ops.skipping.weighted_rows(linear.weight.t(), columns, factors)
    return found if linear.bias is None else found + linear.bias


def _plain(linear: Any) -> bool:
    """Whether a layer's weight is a matrix in memory that nothing else looks after."""
    return type(linear) is nn.Linear and not linear.weight.is_meta and not hasattr(linear, "_hf_hook")


def _first_rows(linear: Any, x: Tensor, count: int) -> Tensor:
    """What the first `count` rows of a layer give."""
    if not _plain(linear) or linear.out_features == count:
        found: Tensor = linear(x)
        return found[..., :count]
    bias = None if linear.bias is None else linear.bias[:count]
    return functional.linear(x, linear.weight[:count], bias)


def _rows_of(linear: Any, rows: Tensor, x: Tensor) -> Tensor:
    """What chosen rows of a layer give for one token `x` [C]: [n]; no others are read."""
    if _plain(linear):
        found = ops.skipping.chosen_rows(linear.weight, rows, x)
    else:
        packed = linear.packed
        x = prepare_input(x, packed.online, packed.inputs)
        found = decode_rows(packed.codec, linear.stored, packed.shape, rows, x.dtype) @ x
    return found if linear.bias is None else found + linear.bias[rows]


def _columns_of(linear: Any, columns: Tensor, factors: Tensor, channels: int) -> Tensor:
    """`weighted_columns`, or with a whole vector where the layer's weight is not a matrix in memory."""
    if _plain(linear):
        return weighted_columns(linear, columns, factors)
    whole = factors.new_zeros(channels).index_copy(0, columns, factors)
    result: Tensor = linear(whole.reshape(1, 1, -1))
    return result.reshape(-1)
