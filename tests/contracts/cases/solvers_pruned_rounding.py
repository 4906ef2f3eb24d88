from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.solvers.pruned_rounding import PrunedRounding

CASES = (PrunedRounding(step="row"), PrunedRounding(widths=(1.0,), pruned=(0.0,), step="row"))
CODECS = (Affine(bits=8, group=Group("channel", 0), zero="none"),)
ALLOWED = 2e-3
"""Squared output error, relative to the outputs, that it may spend: twice `error`."""
