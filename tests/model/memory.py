"""Peak memory of a piece of code, in a process of its own, whose peak is nothing else's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CALM = {**os.environ, "PYTHONWARNINGS": "ignore", "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Memory that is freed goes back to the system, so that the peak is of what was in use at once."""
HEAD = """
import sys
import torch
torch.set_num_threads(1)
from rpo_megatron import cpu
cpu.enable()
from tools.bench.processes import Peak
"""
needs_peaks = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)


def last_number(script: str, *arguments: str) -> float:
    """What `script` prints last, behind HEAD; the peak of a function f, in MiB, is Peak.start().of(f)."""
    command = [sys.executable, "-c", HEAD + script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=CALM)
    return float(done.stdout.split()[-1])
