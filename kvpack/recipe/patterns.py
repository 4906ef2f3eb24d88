"""Which linear layers a weight rule means, the token embedding among them."""

from __future__ import annotations

import difflib
import functools
import re
from collections import Counter
from collections.abc import Sequence

from kvpack.core.errors import RecipeError
from kvpack.core.model_spec import LinearSpec

_ATTENTION = frozenset({"q", "k", "v", "qkv", "o"})
_MLP = frozenset({"gate", "up", "gate_up", "down"})
_VOCABULARY = frozenset({"embedding", "lm_head"})
_ROLES: dict[str, frozenset[str]] = {
    "linear": _ATTENTION | _MLP,
    "attention": _ATTENTION,
    "mlp": _MLP,
    "vocabulary": _VOCABULARY,
    "all": _ATTENTION | _MLP | _VOCABULARY,
    **{role: frozenset({role}) for role in sorted(_ATTENTION | _MLP | _VOCABULARY)},
}
"""What stands after @ -> roles of `LinearSpec`."""

_PIECES = re.compile(r"\*\*\.|\*\*|\*|\{[^{}]*\}|[^*{}]+|[{}]")


def match(pattern: str, linears: Sequence[LinearSpec]) -> list[LinearSpec]:
    """The linear layers that a pattern selects, in the order given.

    Args:
        pattern: glob, "re:..." or "@role"; see `WeightRule`.
        linears: candidates.

    Raises:
        RecipeError: the pattern itself is malformed.
    """
    if pattern.startswith("@"):
        roles = _roles(pattern)
        inside = pattern == "@linear"
        return [s for s in linears if s.role in roles or (inside and s.layer is not None)]
    expression = _expression(pattern)
    return [s for s in linears if expression.fullmatch(s.name)]


def outside(pattern: str) -> bool:
    """Whether a pattern names a role that no layer of a decoder block has."""
    return pattern.startswith("@") and _roles(pattern) <= _VOCABULARY


def closest(pattern: str, linears: Sequence[LinearSpec]) -> list[str]:
    """What would have matched, nearest first, with counts: ``model.layers.*.mlp.up_proj (36)``.

    Layer numbers are folded into ``*``; for a role, the roles that the model has.
    """
    if pattern.startswith("@"):
        return [f"@{role}" for role in sorted({spec.role for spec in linears})]
    counts = Counter(re.sub(r"\.[0-9]+\.", ".*.", spec.name) for spec in linears)
    names = sorted(counts, key=lambda name: -difflib.SequenceMatcher(None, pattern, name).ratio())
    return [f"{name} ({counts[name]})" for name in names[:3]]


def _roles(pattern: str) -> frozenset[str]:
    name = pattern[1:]
    if name not in _ROLES:
        close = difflib.get_close_matches(name, _ROLES, n=1)
        guess = f" (did you mean '@{close[0]}'?)" if close else ""
        known = ", ".join(f"@{role}" for role in _ROLES)
        raise RecipeError(f"no role is called {pattern!r}{guess}", hint=f"roles: {known}")
    return _ROLES[name]


@functools.lru_cache(maxsize=256)
def _expression(pattern: str) -> re.Pattern[str]:
    if not pattern:
        raise RecipeError("the pattern is empty", hint='"*" selects everything')
    try:
        if pattern.startswith("re:"):
            return re.compile(pattern[3:])
        return re.compile(r"(?:.*\.)?" + "".join(_translate(p, pattern) for p in _PIECES.findall(pattern)))
    except re.error as error:
        raise RecipeError(f"{pattern!r} is not a valid expression: {error}") from None


def _translate(piece: str, pattern: str) -> str:
    if piece == "**.":
        return r"(?:.*\.)?"
    if piece == "**":
        return r".+"
    if piece == "*":
        return r"[^.]*"
    if piece in "{}":
        raise RecipeError(
            f"{pattern!r} has an unmatched brace", hint="alternatives look like {q,k}_proj, unnested"
        )
    if piece.startswith("{"):
        return f"(?:{'|'.join(re.escape(word.strip()) for word in piece[1:-1].split(','))})"
    return re.escape(piece)
