from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine

CASES = (
    Affine(bits=2, group=Group("token", 32)),
    Affine(bits=2, group=Group("channel", 32)),
    Affine(bits=2, group=Group("channel", 128), zero="integer", scale_dtype="float8_e4m3fn", clip=0.8),
    Affine(bits=3, group=Group("token", 8), zero="integer"),
    Affine(bits=3, group=Group("channel", 24), zero="none"),
    Affine(bits=5, group=Group("token", 4), zero="none", scale_dtype="bfloat16"),
    Affine(bits=4, group=Group("channel", 0), zero="float", scale_dtype="float8_e4m3fn"),
    Affine(bits=8, group=Group("channel", 16), zero="integer", scale_dtype="float32"),
    Affine(bits=8, group=Group("channel", 64), zero="float", scale_dtype="float32"),
    Affine(bits=1, group=Group("channel", 16)),
    Affine(bits=4, group=Group("token", 0)),
    Affine(bits=2, group=Group("token", 0), zero="integer"),
)
