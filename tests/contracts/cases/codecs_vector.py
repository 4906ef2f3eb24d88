from kvpack.parts.codecs.vector import Vector

CASES = (
    Vector(bits=4, sub_vectors=8, metric="euclidean"),
    Vector(bits=4, sub_vectors=8),
)
