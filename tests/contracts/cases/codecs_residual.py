from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.low_rank import LowRank
from kvpack.parts.codecs.residual import Residual
from kvpack.parts.codecs.top_outliers import TopOutliers

BACKBONE = Affine(bits=2, group=Group("token", 8))

CASES = (
    Residual(BACKBONE, Affine(bits=2, group=Group("token", 4))),
    Residual(Affine(bits=2, group=Group("channel", 8)), LowRank(rank=4, chunk_tokens=16)),
    Residual(TopOutliers(BACKBONE, keep=0.02, axis="token", fill="mean"), LowRank(rank=4, chunk_tokens=16)),
    Residual(Affine(bits=4, group=Group("token", 0)), LowRank(rank=4, chunk_tokens=20, segment_tokens=100)),
)
