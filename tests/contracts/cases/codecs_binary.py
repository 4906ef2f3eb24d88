from kvpack.core.types import Group
from kvpack.parts.codecs.binary import Binary

CASES = (
    Binary(),
    Binary(Group("token", 8)),
    Binary(Group("channel", 12)),
    Binary(Group("channel", 0)),
)
