from kvpack.parts.policies.top_fraction import TopFraction
from kvpack.parts.scorers.accumulated_attention import AccumulatedAttention
from kvpack.parts.scorers.normalized_attention import NormalizedAttention

CASES = (
    TopFraction(NormalizedAttention(), interval=32),
    TopFraction(AccumulatedAttention(), share=0.2, interval=1, recent_share=0.5, least_tokens=2, demote=True),
)
