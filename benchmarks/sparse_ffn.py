"""Time of one FFN for one token, dense and with activations skipped, on this machine's CPU.

    python benchmarks/sparse_ffn.py --widths 2048,4096,8192 --keep 0.5,0.3,0.1 --runs 21

Dense is the module as transformers has it; sparse is `SparseFeedForward` around the same weights with
a threshold that keeps the given share. Both are timed in turn and the ratio is the median over pairs,
so that a machine whose speed drifts does not decide. The model is random: only the shapes matter.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kvpack.parts.thresholds.magnitude import Magnitude
from kvpack.recipe.sparsity import SparseSite
from kvpack.runtime.sparse_modules import SparseFeedForward
from kvpack.runtime.sparsity import Switch


class Dense(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, channels: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = {
            "gate_proj": (channels, width),
            "up_proj": (channels, width),
            "down_proj": (width, channels),
        }
        for name, shape in shapes.items():
            linear = nn.utils.skip_init(nn.Linear, *shape, bias=False, dtype=dtype)
            nn.init.normal_(linear.weight, std=shape[0] ** -0.5)
            self.add_module(name, linear)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the FFN."""
        result: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return result


def sparse(dense: Dense, x: Tensor, keep: float) -> SparseFeedForward:
    """An FFN of its own, with equal weights, that keeps the share `keep` of `x`'s gate."""
    channels, width = dense.gate_proj.in_features, dense.gate_proj.out_features
    copy = Dense(channels, width, x.dtype)
    copy.load_state_dict(dense.state_dict())
    gate = copy.act_fn(copy.gate_proj(x)).abs().float()
    module = SparseFeedForward(
        copy, SparseSite("feed_forward", 0, width, Magnitude(keep)), Switch("dense"), ""
    )
    module.threshold = torch.quantile(gate, 1 - keep)[None].bfloat16()
    module.start(True)
    return module


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Time of one call."""
    start = clock()
    work()
    return clock() - start


def compare(
    channels: int, width: int, dtype: torch.dtype, keep: float, runs: int, clock: Callable[[], float]
) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    dense, x = Dense(channels, width, dtype), torch.randn(1, 1, channels, dtype=dtype)
    module = sparse(dense, x, keep)
    exact, found = dense(x).float(), module(x).float()
    error = float((found - exact).norm() / exact.norm())
    pairs = [(seconds(lambda: dense(x), clock), seconds(lambda: module(x), clock)) for _ in range(runs + 2)][
        2:
    ]
    times = [1000 * statistics.median(side) for side in zip(*pairs, strict=True)]
    ratios = sorted(b / a for a, b in pairs)
    active = module.gate.kept / module.gate.seen
    return (
        f"| {channels} x {width} | {str(dtype).removeprefix('torch.')} | {torch.get_num_threads()} "
        f"| {active:.2f} | {times[0]:.2f} | {times[1]:.2f} | {statistics.median(ratios):.2f} "
        f"| {ratios[len(ratios) // 4]:.2f} to {ratios[3 * len(ratios) // 4]:.2f} | {error:.2f} |"
    )


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", default="2048,4096,8192", help="channels C; the FFN is 2.6875 C wide")
    parser.add_argument("--keep", default="0.5,0.3", help="shares that are kept")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: others use it, too")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    clock = time.perf_counter if chosen.clock == "wall" else time.process_time
    print("| C x I | dtype | threads | kept | dense ms | sparse ms | sparse / dense | middle half | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for name in chosen.dtypes.split(","):
            for channels in map(int, chosen.widths.split(",")):
                for keep in map(float, chosen.keep.split(",")):
                    width = channels * 43 // 16
                    print(
                        compare(channels, width, getattr(torch, name), keep, chosen.runs, clock), flush=True
                    )


if __name__ == "__main__":
    main()
