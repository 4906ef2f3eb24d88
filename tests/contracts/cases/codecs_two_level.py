from kvpack.parts.codecs.two_level import TwoLevel

CASES = (TwoLevel(bits=2, size=16), TwoLevel(bits=7, size=24), TwoLevel(bits=3, size=1))
