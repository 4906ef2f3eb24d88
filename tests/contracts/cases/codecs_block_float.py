from kvpack.parts.codecs.block_float import BlockFloat

CASES = (
    BlockFloat(mantissa=2, block=8),
    BlockFloat(mantissa=3, block=24),
    BlockFloat(mantissa=4, block=16),
    BlockFloat(mantissa=4, block=0),
    BlockFloat(mantissa=6, block=128),
    BlockFloat(mantissa=8, block=64),
)
