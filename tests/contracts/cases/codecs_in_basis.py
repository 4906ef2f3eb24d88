from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.binary import Binary
from kvpack.parts.codecs.in_basis import InBasis
from kvpack.parts.codecs.low_rank import LowRank

CASES = (
    InBasis(Binary(Group("token", 8))),
    InBasis(Affine(bits=4, group=Group("channel", 16))),
    InBasis(LowRank(rank=40, short_tokens=0, chunk_tokens=8)),
)
