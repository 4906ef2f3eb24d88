"""What `quality.py` measures: which recipes stand in which table, with which columns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One artifact to make: a recipe with overrides, and what to call it in the table."""

    recipe: str
    overrides: tuple[str, ...] = ()
    note: str = ""

    def at(self, group: int) -> Entry:
        """With ``{group}`` filled in."""
        overrides = tuple(o.replace("{group}", str(group)) for o in self.overrides)
        return Entry(self.recipe, overrides, self.note.replace("{group}", str(group)))

    @property
    def label(self) -> str:
        """The recipe, with the note that explains its overrides."""
        return f"{self.recipe}, {self.note}" if self.note else self.recipe


def _old(**values: object) -> tuple[str, ...]:
    """Overrides of the codec of encoded tokens; ``__`` in a name is a dot."""
    return tuple(f"kv_cache.tiers.old.{name.replace('__', '.')}={value}" for name, value in values.items())


THREE_BITS = ("weights.0.codec.bits=3",)
SECTIONS: dict[str, tuple[Entry, ...]] = {
    "weights": (
        Entry("w8"),
        Entry("w4"),
        Entry("w4@rtn"),
        Entry("w4", THREE_BITS, "3 bits"),
        Entry("w4@rtn", THREE_BITS, "3 bits"),
    ),
    "cache": (
        Entry("kivi@4bit"),
        Entry("kivi@4bit-per-token"),
        Entry("kivi"),
        Entry("kivi@2bit-per-token"),
        Entry("rotatekv@4bit"),
        Entry("rotatekv@3bit"),
        Entry("rotatekv"),
        Entry("rotatekv-w4@4bit"),
    ),
    "ablation": (
        Entry("rotatekv@2bit-rtn"),
        Entry("rotatekv@2bit-hadamard"),
        Entry("rotatekv@2bit-prerope"),
        Entry("rotatekv@2bit-reorder"),
        Entry("rotatekv"),
    ),
    # The same steps with groups of one size, so that no step has more scales than another.
    "groups": tuple(
        Entry(recipe, _old(codec__group__size="{group}"), "groups of {group}")
        for recipe in (
            *(f"rotatekv@2bit-{step}" for step in ("rtn", "hadamard", "prerope", "reorder")),
            "rotatekv",
        )
    ),
    "causes": (
        Entry("kivi"),
        Entry("kivi@2bit-per-token"),
        Entry("kivi", _old(key__group__size=8), "groups of 8 tokens"),
        Entry("kivi", _old(value="{kind: identity}"), "values exact"),
        Entry("kivi@2bit-per-token", _old(value="{kind: identity}"), "values exact"),
        *(
            Entry(f"rotatekv@2bit-{step}", _old(value="{kind: identity}"), "values exact")
            for step in ("rtn", "hadamard", "prerope")
        ),
        *(
            Entry(f"rotatekv@2bit-{step}", _old(codec__clip=1.0), "clip 1.0")
            for step in ("rtn", "hadamard", "prerope")
        ),
        Entry("rotatekv", _old(codec__clip=1.0), "clip 1.0"),
        Entry("rotatekv", _old(codec__scale_dtype="float16"), "fp16 scales"),
    ),
}
TITLES = {
    "weights": "Weights",
    "cache": "KV cache, whole chunk quantised (protocol A)",
    "decode": "KV cache, decoding through the real cache (protocol B)",
    "ablation": "RotateKV in steps, 2 bits (protocol A)",
    "groups": "RotateKV in steps, 2 bits, equal groups (protocol A)",
    "causes": "Separating causes (protocol A)",
}


_SCORES = ("perplexity", "KL", "top-1")
_CACHE = ("KV bits", "KV bytes/token")
COLUMNS: dict[str, tuple[str, ...]] = {
    "weights": (*_SCORES, "weight bits"),
    "cache": (*_SCORES, *_CACHE, "weight bits"),
    "decode": (*_SCORES, *_CACHE, "weight bits"),
    "ablation": (*_SCORES, "key error", *_CACHE),
    "groups": (*_SCORES, "key error", *_CACHE),
    "causes": (*_SCORES, "key error", *_CACHE),
}
