from kvpack.parts.solvers.gptq import Gptq

CASES = (Gptq(act_order=True), Gptq(damp=0.1, block=20))
