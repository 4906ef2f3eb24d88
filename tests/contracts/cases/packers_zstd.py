"""Further configurations of `zstd`."""

from kvpack.parts.packers.zstd import Zstd

CASES = (Zstd((3,)), Zstd((1, 9), margin=0.0))
