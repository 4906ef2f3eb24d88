from kvpack.parts.policies.sink_recent import SinkRecent

CASES = (
    SinkRecent(sink_tokens=4, recent_tokens=0),
    SinkRecent(sink_tokens=1, recent_tokens=7),
    SinkRecent(recent_tokens=32),
)
