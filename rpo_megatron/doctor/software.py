"""Versions, devices, and which implementations a run will take."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.version import Version

from rpo_megatron.doctor.finding import Finding, note, ok, problem

GIB = 2**30
SUPPORTED_PYTHON = ((3, 11), (3, 12))
SUPPORTED_MEGATRON = ((0, 16, 1), (0, 20))
"""At least the first, less than the second; as in setup.py."""
OPTIONAL = {
    "triton": "kernels of the output layer on GPUs",
    "flash-attn": "nothing here calls it",
    "gigatoken": "faster tokenizing",
}


def versions() -> Iterator[Finding]:
    yield python(sys.version_info[:2])
    yield ok(f"torch {torch.__version__}, built for CUDA {torch.version.cuda or 'none (CPU only)'}")
    yield megatron(_version("megatron-core"))
    yield _transformer_engine()
    yield apex(contents("apex"), fused=_importable("amp_C"))
    for package, use in OPTIONAL.items():
        found = _version(package)
        yield ok(f"{package} {found}" if found else f"{package}: not installed ({use}; optional)")


def python(version: tuple[int, ...]) -> Finding:
    text = f"Python {platform.python_version()}, {sys.executable}"
    if version in SUPPORTED_PYTHON:
        return ok(text)
    return problem(
        text, "use Python 3.11 or 3.12: megatron-core has no wheels for others that this project was tested on"
    )


def megatron(version: str | None) -> Finding:
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED_MEGATRON)
    if version is None:
        return problem("megatron-core: not installed", f"pip install 'megatron-core>={low},<{high}'")
    parsed = Version(version)
    if SUPPORTED_MEGATRON[0] <= parsed.release and not parsed.is_prerelease and parsed.release < SUPPORTED_MEGATRON[1]:
        return ok(f"megatron-core {version}")
    return problem(
        f"megatron-core {version}", f"this project runs on >={low},<{high}: pip install 'megatron-core>={low},<{high}'"
    )


def _transformer_engine() -> Finding:
    found = _version("transformer-engine") or _version("transformer-engine-torch")
    if found is None:
        return ok("transformer-engine: not installed (optional)")
    if not torch.cuda.is_available():
        return note(f"transformer-engine {found}, but no GPU", "nothing to do: it is masked where there is no CUDA")
    return ok(f"transformer-engine {found}")


def apex(contents: frozenset[str] | None, *, fused: bool) -> Finding:
    """NVIDIA's apex by what it contains: PyPI has an unrelated project (a web toolkit) under the name."""
    if contents is None:
        return ok("apex: not installed (optional)")
    if not {"optimizers", "multi_tensor_apply"} <= contents:
        return problem(
            "apex: what has this name is not NVIDIA's (no apex.optimizers), but megatron-core takes it for that",
            "pip uninstall apex; NVIDIA's is only built from source, and nothing here needs it",
        )
    if not fused:
        return note(
            "apex: NVIDIA's, but without its CUDA kernels (no amp_C)",
            "build it with --cuda_ext, or uninstall it: without kernels megatron-core only falls back",
        )
    return ok("apex: NVIDIA's, with fused kernels")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def contents(package: str) -> frozenset[str] | None:
    """Names of a package's modules, without importing it; None if there is no such package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        return None
    return frozenset(entry.stem for folder in spec.submodule_search_locations for entry in Path(folder).glob("*"))


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# ------------------------------------------------------------------------------------------------ devices, choices


def devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        why = "torch is built for CUDA but finds no GPU" if built else "torch is a CPU build"
        yield note(
            f"no GPU: {why}; {os.cpu_count()} CPU cores", "nothing to do for a run on the CPU (gloo, fp32 or bf16)"
        )
        return
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        text = f"GPU {i}: {gpu.name}, {gpu.total_memory / GIB:.1f} GiB, compute capability {gpu.major}.{gpu.minor}"
        if gpu.major < 8:
            yield problem(
                text, "bf16 needs compute capability 8.0 (Ampere) or newer: use another GPU, or precision=fp32"
            )
        else:
            yield ok(text)
    yield ok(f"driver {_driver()}, cuDNN {torch.backends.cudnn.version()}")


def _driver() -> str:
    """As nvidia-smi says: torch does not."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True)
    except (OSError, subprocess.SubprocessError):
        return "of unknown version (nvidia-smi does not answer)"
    return done.stdout.split("\n", 1)[0].strip()


def choices() -> Iterator[Finding]:
    """As model/attention.py, model/layers.py and training/optimizer.py choose; without importing megatron, which takes
    longer than everything else here."""
    cuda = torch.cuda.is_available()
    yield ok(f"attention: {attention(cuda=cuda)}")
    yield ok("linear layers: megatron's own" + ", Transformer Engine's with fp8.recipe" * cuda)
    yield ok("output layer: tiles of rows x words, logits never whole")
    yield ok("norm: torch's rms_norm" + ", fused" * cuda)
    yield ok(f"optimizer: {optimizer(cuda=cuda)}")


def attention(*, cuda: bool) -> str:
    return "sdpa" if cuda else "merged"


def optimizer(*, cuda: bool) -> str:
    """Which Adam megatron will build, in the words of a run's header; it asks for Transformer Engine first, then for
    apex."""
    if cuda and _importable("transformer_engine"):
        return "Transformer Engine's fused Adam"
    if _importable("amp_C") and _importable("apex"):
        return "apex's fused Adam"
    return "torch's fused Adam"
