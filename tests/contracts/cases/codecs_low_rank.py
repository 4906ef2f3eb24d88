from kvpack.parts.codecs.low_rank import LowRank

CASES = (
    LowRank(rank=32, short_rank=24),
    LowRank(rank=32, short_tokens=0, chunk_tokens=5, segment_tokens=40),
    LowRank(rank=500, short_tokens=0, iterations=1, chunk_tokens=1, seed=3),
)
