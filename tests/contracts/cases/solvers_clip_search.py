from kvpack.parts.solvers.clip_search import ClipSearch

CASES = (ClipSearch(steps=1), ClipSearch(steps=5, ends="alone"), ClipSearch(metric="energy"))
