from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.transforms.entropy_scale import EntropyScale

INT8 = Affine(bits=8, group=Group("channel", 0), zero="none")
CASES = (EntropyScale(steps=3, codec=INT8), EntropyScale(steps=3, error=1.0, step="row", codec=INT8))
