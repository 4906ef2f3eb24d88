from kvpack.parts.codecs.shared_vectors import SharedVectors
from kvpack.parts.solvers.vector_sweep import VectorSweep

CASES = (VectorSweep(rounds=2, steps=3, block=10), VectorSweep(damp=0.1, steps=0))
CODECS = (
    SharedVectors(bits=4),
    SharedVectors(size=2, bits=4, columns=32),
    SharedVectors(size=8, bits=3, codebook_dtype="float8_e4m3fn"),
)
