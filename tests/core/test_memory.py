"""Freed tensors leave the process, whatever the order in which they come and go."""

import subprocess
import sys

import pytest

# Large and small blocks in turn: without a fixed threshold the small ones pin the freed large ones.
PROGRAM = """
import torch
from kvpack.core.memory import return_large_blocks

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024

if {fixed}:
    return_large_blocks()
kept = []
torch.empty(30 << 20, dtype=torch.uint8).fill_(1)
start = resident()
for _ in range(24):
    large = [torch.empty(size << 20, dtype=torch.uint8).fill_(1) for size in (6, 9, 14, 20)]
    kept.append(torch.empty(1 << 18, dtype=torch.uint8).fill_(1))
    large.append(torch.empty(25 << 20, dtype=torch.uint8).fill_(1))
    del large
print(resident() - start)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_large_blocks_are_returned() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(fixed=True)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 24, "6 MiB are kept on purpose"
