"""The CPU in the place of CUDA, and only where it was asked for. Each case in a fresh process: enable() is for good."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="enable() does nothing where CUDA is available")


def check(code: str) -> None:
    code = "import sys, types, torch\nfrom rpo_megatron import cpu\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@no_cuda
def test_redirects() -> None:
    """Each line is something that megatron-core does in a training step, and that raises without CUDA."""
    check("""
cpu.enable()
cpu.enable()  # twice is once
cuda, host = torch.cuda, torch.device("cpu")
assert cuda.current_device() == host
assert torch.empty(2, device=cuda.current_device()).device == host
cuda.synchronize()
with cuda.stream(cuda.Stream()):
    event = cuda.Event()
    event.record(cuda.current_stream())
cuda.current_stream().wait_event(event)
cuda.current_stream().wait_stream(cuda.default_stream())
assert event.query()
for tensor in (
    torch.zeros(2, 3, device="cuda"),
    torch.tensor([1.0], device="cuda", dtype=torch.float64),
    torch.tensor([1], pin_memory=True).cuda(non_blocking=True),
):
    assert tensor.device == host, tensor.device
assert torch.tensor([1.0], device="cuda", dtype=torch.float64).dtype == torch.float64
assert torch.zeros(2, 3, device="meta").device.type == "meta"
assert sys.modules["transformer_engine"] is None
""")


@no_cuda
def test_random_state() -> None:
    """megatron forks "the GPU's" generator for dropout; were it not torch's own, a seed would decide nothing."""
    check("""
cpu.enable()
torch.cuda.manual_seed(5)
state = torch.cuda.get_rng_state()
first = torch.rand(3)
torch.manual_seed(5)
assert torch.equal(torch.rand(3), first)
torch.cuda.default_generators[0].set_state(state)
assert torch.equal(torch.rand(3), first)
assert torch.equal(torch.cuda.random.get_rng_state(), torch.get_rng_state())
""")


@no_cuda
def test_type_names_change_for_megatrons_optimizer_only() -> None:
    """The optimizer sorts parameters by "torch.cuda.FloatTensor"; everyone else must see the truth."""
    check("""
cpu.enable()
tensor = torch.zeros(1)
assert tensor.type() == "torch.FloatTensor"
assert tensor.type(torch.float64).dtype == torch.float64
names = {"__name__": "megatron.core.optimizer.distrib_optimizer", "tensor": tensor}
assert eval("tensor.type()", names) == "torch.cuda.FloatTensor"
assert eval("tensor.half().type()", names) == "torch.cuda.HalfTensor"
""")


@no_cuda
def test_device_contexts_keep_working() -> None:
    """torch knows its factories by identity: transformers, which loads models under a device context, would silently
    leave buffers where they are if our wrappers hid them."""
    check("""
cpu.enable()
with torch.device("meta"):
    assert torch.zeros(1).device.type == torch.tensor([1]).device.type == torch.ones(1).device.type == "meta"
""")


@no_cuda
def test_everything_else_stays_loud() -> None:
    """A broader redirect would let GPU-only code run on a CPU in silence, and differently on a GPU."""
    check("""
cpu.enable()
assert not torch.cuda.is_available()
for call in (
    "torch.empty(1, device='cuda')",
    "torch.ones(1, device='cuda')",
    "torch.zeros(1, device='cuda:0')",
    "torch.zeros(1).to('cuda')",
    "torch.nn.Linear(1, 1, device='cuda')",
    "torch.cuda.get_device_properties(0)",
    "torch.cuda.mem_get_info()",
    "torch.cuda.CUDAGraph()",
):
    try:
        eval(call)
    except Exception:
        continue
    sys.exit(f"{call} did not raise")
""")


@no_cuda
def test_too_late() -> None:
    """Modules that were imported before have taken their own copy of what enable() replaces."""
    check("""
for name in ("megatron.core", "transformer_engine"):
    sys.modules[name] = types.ModuleType(name)
    try:
        cpu.enable()
    except RuntimeError as error:
        assert str(error) == f"cpu.enable() must run before '{name}' is imported", error
    else:
        sys.exit(f"{name}: no error")
    del sys.modules[name]
""")


def test_no_op_where_cuda_is_available() -> None:
    """On a GPU machine nothing may be touched, not even when megatron was imported first."""
    check("""
torch.cuda.is_available = lambda: True
sys.modules["megatron.core"] = types.ModuleType("megatron.core")
before = dict(vars(torch.cuda)), torch.zeros, torch.tensor, torch.Tensor.cuda, torch.Tensor.type
cpu.enable()
assert (dict(vars(torch.cuda)), torch.zeros, torch.tensor, torch.Tensor.cuda, torch.Tensor.type) == before
assert "transformer_engine" not in sys.modules
""")
