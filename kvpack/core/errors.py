"""Every failure a user can cause, with its exit code.

An error says where it happened, what is wrong, why it matters and what to do. The command line
prints exactly that; a library caller gets the same text as an exception.
"""

from __future__ import annotations


class KvpackError(Exception):
    """Base of all expected failures.

    Args:
        what: the fact that is wrong, one sentence, naming file, tensor or key.
        hint: what the user can do about it.
        where: place of the problem, e.g. ``recipe.yaml:14:7`` or a tensor name.
        why: why it is refused, when that is not evident.
    """

    code = "E_INTERNAL"
    exit_code = 70

    def __init__(self, what: str, *, hint: str = "", where: str = "", why: str = "") -> None:
        self.what, self.hint, self.where, self.why = what, hint, where, why
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """Where, what and why in one line; the hint stands apart."""
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} ({self.why})" if self.why else text

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class CheckFailed(KvpackError):
    """A check ran and its answer is no: verify, a gate, a comparison."""

    code, exit_code = "E_CHECK", 1


class UsageError(KvpackError):
    """The command line is wrong, or would overwrite something."""

    code, exit_code = "E_USAGE", 2


class RecipeError(KvpackError):
    """A recipe is wrong, or asks for something that its model cannot do."""

    code, exit_code = "E_RECIPE", 2


class RecipeErrors(RecipeError):
    """Several recipe errors found in one pass."""

    def __init__(self, errors: list[RecipeError]) -> None:
        self.errors = errors
        super().__init__(
            "\n".join(e.message for e in errors),
            hint="\n        ".join(dict.fromkeys(e.hint for e in errors if e.hint)),
        )


class CalibrationMismatch(KvpackError):
    """A calibration was made for another model, recipe or text."""

    code, exit_code = "E_CALIBRATION", 2


class ResourceError(KvpackError):
    """Memory or disk does not suffice. Nothing was changed."""

    code, exit_code = "E_RESOURCE", 3


class SourceError(KvpackError):
    """The input model is unusable: truncated, NaN, missing or unknown."""

    code, exit_code = "E_SOURCE", 4


class UnsupportedModel(SourceError):
    """The model is sound, but a recipe or kvpack cannot handle its architecture."""

    code = "E_UNSUPPORTED"


class ArtifactError(KvpackError):
    """An artifact is incomplete, damaged, tampered with or too new."""

    code, exit_code = "E_ARTIFACT", 4


class Interrupted(KvpackError):
    """The user or the system asked to stop; nothing half-written remains."""

    code, exit_code = "E_INTERRUPTED", 75
