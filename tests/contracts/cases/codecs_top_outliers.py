from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.codebook import Codebook
from kvpack.parts.codecs.top_outliers import TopOutliers

CASES = (
    TopOutliers(Affine(bits=3, group=Group("channel", 0))),
    TopOutliers(Affine(bits=2, group=Group("token", 4)), keep=0.1, fill="mean"),
    TopOutliers(Affine(bits=4, group=Group("token", 8)), keep=0.02, axis="token", fill="mean"),
    TopOutliers(Affine(bits=4, group=Group("channel", 16)), keep=0.3, axis="token", dtype="bfloat16"),
    TopOutliers(Codebook(bits=3), select="threshold"),
    TopOutliers(Codebook(bits=2, axis="token", q_norm=True), dtype="float32"),
    TopOutliers(Codebook(bits=4), keep=0.0, select="threshold"),
    TopOutliers(TopOutliers(Affine(), keep=0.1), keep=1.0),
)
