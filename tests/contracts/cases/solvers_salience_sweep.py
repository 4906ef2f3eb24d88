from kvpack.parts.solvers.salience_sweep import SalienceSweep

CASES = (
    SalienceSweep(clip_steps=4, clip_metric="factor"),
    SalienceSweep("inverse", clip_steps=1),
    SalienceSweep("factor"),
)
