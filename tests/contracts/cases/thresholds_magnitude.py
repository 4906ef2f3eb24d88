from kvpack.parts.thresholds.magnitude import Magnitude

CASES = (Magnitude(0.3), Magnitude(0.9), Magnitude(1.0))
