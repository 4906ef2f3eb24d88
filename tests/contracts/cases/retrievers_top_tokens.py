from kvpack.parts.retrievers.top_tokens import TopTokens

CASES = (
    TopTokens(fraction=0.3, sink_tokens=2, recent_tokens=3),
    TopTokens(fraction=0.0, minimum=0, sink_tokens=0, recent_tokens=1),
    TopTokens(fraction=1.0),
    TopTokens(fraction=0.5, minimum=4, sink_tokens=0, recent_tokens=2),
)
