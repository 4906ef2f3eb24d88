"""Configurations of `byte_planes`: it has no default, and planes may each have their packer."""

from kvpack.parts.packers.byte_planes import BytePlanes
from kvpack.parts.packers.zstd import Zstd

CASES = (BytePlanes((Zstd(),)), BytePlanes((Zstd((0,)),)))
