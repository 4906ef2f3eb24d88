from kvpack.parts.codecs.shared_vectors import SharedVectors

CASES = (
    SharedVectors(bits=5),
    SharedVectors(size=2, bits=6, columns=16),
    SharedVectors(size=8, bits=6, codebook_dtype="float8_e4m3fn"),
    SharedVectors(size=1, bits=3),
)
