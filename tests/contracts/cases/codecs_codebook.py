from kvpack.parts.codecs.codebook import Codebook

CASES = (
    Codebook(bits=2, axis="token", q_norm=True),
    Codebook(bits=3, axis="channel", weight="fisher", keep_fraction=1.0, skip_tokens=0),
    Codebook(bits=5, axis="token", weight="none"),
    Codebook(bits=4, levels="even", q_norm=True),
    Codebook(bits=6, axis="token"),
)
