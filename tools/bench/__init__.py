"""The benchmarks: each one command, each measuring ours and its peers in turns, in one run, on the same data.

    python -m tools.bench.step [OUTPUT.json] [--short | --tiny]           a training step against TRL and plain torch
    python -m tools.bench.head [OUTPUT.json] [--short | --tiny]           log-probabilities of the output layer alone
    python -m tools.bench.shared_prompt [OUTPUT.json] [--short | --tiny]  prompts computed once against K times
    python -m tools.bench.growth [OUTPUT.json] [--short | --tiny]         how time and memory grow

from the root of a checkout, in the environment that `make bench-env` makes; `make bench` runs them all. Time is CPU
time (all threads of a process), because it hardly changes when something else runs on the machine.
"""

import os
import warnings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits sleeps: CPU time is work. Before torch loads.

from rpo_megatron import cpu

warnings.filterwarnings("ignore")  # libraries tell each other about their deprecated names
cpu.enable()  # before anything imports megatron.core
