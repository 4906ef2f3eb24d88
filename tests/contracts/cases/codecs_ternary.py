from kvpack.core.types import Group
from kvpack.parts.codecs.ternary import Ternary

CASES = (
    Ternary(),
    Ternary(Group("token", 8), alpha="nonzero_mean"),
    Ternary(Group("channel", 12)),
    Ternary(Group("channel", 0), threshold=0.7, alpha="nonzero_mean"),
)
