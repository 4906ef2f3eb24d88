from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.transforms.searched_scale import SearchedScale

CASES = (
    SearchedScale(steps=4, codec=Affine(bits=3, group=Group("channel", 32))),
    SearchedScale(steps=4, weigh_weights=False, group=0, codec=Affine(bits=4)),
)
