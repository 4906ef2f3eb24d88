from kvpack.parts.thresholds.channelwise import Channelwise

CASES = (Channelwise(0.3), Channelwise(0.5, column_norms=True), Channelwise(0.05), Channelwise(1.0))
