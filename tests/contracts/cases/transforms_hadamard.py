from kvpack.parts.transforms.hadamard import Hadamard

CASES = (Hadamard(heads=2), Hadamard(heads=4), Hadamard(heads=3))
