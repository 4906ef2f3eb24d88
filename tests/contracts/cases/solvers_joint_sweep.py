from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.identity import Identity
from kvpack.parts.codecs.mirrored_levels import MirroredLevels
from kvpack.parts.codecs.nm_sparse import NmSparse
from kvpack.parts.codecs.two_level import TwoLevel
from kvpack.parts.solvers.joint_sweep import JointSweep

CASES = (JointSweep(joint=False, score="energy"), JointSweep(block=10))
CODECS = (
    NmSparse(Affine(bits=2, group=Group("channel", 16), zero="integer")),
    NmSparse(MirroredLevels(size=0)),
    NmSparse(TwoLevel(bits=4, size=20), keep=5, of=7),
    NmSparse(Identity()),
)
