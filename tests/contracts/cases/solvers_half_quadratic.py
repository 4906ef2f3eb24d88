from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.solvers.half_quadratic import HalfQuadratic

CASES = (HalfQuadratic(relative=True), HalfQuadratic(p=1.0, rounds=3))
CODECS = (
    Affine(bits=4, group=Group("channel", 32)),
    Affine(bits=3, group=Group("channel", 0), scale_dtype="float8_e4m3fn"),
    Affine(bits=2, group=Group("channel", 50), scale_dtype="float32"),
)
