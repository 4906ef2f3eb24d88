from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.codecs.mirrored_levels import MirroredLevels
from kvpack.parts.codecs.nm_sparse import NmSparse

CASES = (
    NmSparse(Affine(bits=2, group=Group("channel", 16))),
    NmSparse(Affine(bits=3, group=Group("token", 4)), keep=4, of=8),
    NmSparse(MirroredLevels(size=8)),
    NmSparse(Identity(), keep=3, of=5),
)
