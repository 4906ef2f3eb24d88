from kvpack.parts.policies.sink_detect import SinkDetect

CASES = (SinkDetect(top_values=1), SinkDetect(top_values=5, recent_tokens=16))
