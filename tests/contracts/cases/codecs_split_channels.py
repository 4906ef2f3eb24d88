from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.binary import Binary
from kvpack.parts.codecs.in_basis import InBasis
from kvpack.parts.codecs.split_channels import SplitChannels

WIDE = Affine(bits=2, group=Group("token", 32))

CASES = (
    SplitChannels(WIDE, InBasis(Binary())),
    SplitChannels(WIDE, InBasis(Binary()), share=0.25, per_head=True),
    SplitChannels(Affine(bits=8, group=Group("channel", 16)), Affine(bits=2, group=Group("channel", 4))),
    SplitChannels(Affine(bits=4, group=Group("token", 0)), Binary(Group("token", 8)), share=0.01),
)
