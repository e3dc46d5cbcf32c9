"""`rpo doctor`: what is installed, what will be used, and what on this machine would make a run fail.

1. versions     Python, torch, CUDA, NCCL, megatron-core and the libraries that are optional
2. devices      GPUs with memory and compute capability, or the CPU
3. choices      which implementation of attention, output layer, norm and optimizer a run will take here
4. processes    whether torch.distributed starts on this host, and what name resolution does to it
5. machine      shared memory, limits, disk, environment variables that commonly break things

The exit code is 1 if there is a problem. Nothing is changed, no weight is loaded, and no GPU is needed.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from rpo_megatron.config_verbs import DoctorConfig
from rpo_megatron.doctor.finding import Finding
from rpo_megatron.doctor.host import machine, processes
from rpo_megatron.doctor.software import choices, devices, versions


def examine(config: DoctorConfig) -> int:
    """Print the findings by section; 1 if there is a problem among them, else 0."""
    sections: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": versions,
        "devices": devices,
        "what will be used": choices,
        "processes": lambda: processes(config.timeout),
        "machine": lambda: machine(Path(config.run_dir), os.environ),
    }
    counts = {"OK": 0, "note": 0, "problem": 0}
    for name, section in sections.items():
        print(f"{name}")
        for finding in section():
            counts[finding.level] += 1
            print(f"  {finding}".replace("\n", "\n  "))
    print(f"\n{counts['problem']} problems, {counts['note']} notes, {counts['OK']} OK")
    return 1 if counts["problem"] else 0
