from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.channel_separable import ChannelSeparable

CASES = (
    ChannelSeparable(Affine(bits=4, group=Group("channel", 0))),
    ChannelSeparable(Affine(bits=4, group=Group("channel", 32)), merge_heads=False),
)
