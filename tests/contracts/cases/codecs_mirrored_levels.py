from kvpack.parts.codecs.mirrored_levels import MirroredLevels

CASES = (MirroredLevels(size=0), MirroredLevels(size=12))
