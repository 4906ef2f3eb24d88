from kvpack.core.types import Group
from kvpack.parts.codecs.affine import Affine
from kvpack.parts.codecs.column_classes import ColumnClasses

GROUPS = Affine(group=Group("channel", 24), zero="integer")

CASES = (
    ColumnClasses(GROUPS),
    ColumnClasses(GROUPS, bits=2, salient_fraction=0.25, other_fraction=0.5),
    ColumnClasses(Affine(group=Group("channel", 0)), bits=8, other_fraction=0.0),
)
