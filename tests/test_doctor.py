"""`rpo doctor`: every finding in its good and its bad form, without needing either on this machine."""

import resource
import socket
import time
from pathlib import Path

import pytest
import torch

from rpo_megatron import cli
from rpo_megatron.config import OptimizerConfig
from rpo_megatron.doctor import host, software
from rpo_megatron.doctor.finding import Finding
from rpo_megatron.model.attention import choose_attention
from rpo_megatron.training.optimizer import describe_optimizer


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def test_this_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The machine that runs the tests can run the program; catches a section that raises or is not printed, an advice
    that is missing, and name resolution or a process start that never ends."""
    begin = time.monotonic()
    assert cli.main(["doctor", f"run_dir={tmp_path}", "timeout=20"]) == 0
    assert time.monotonic() - begin < 60
    text = capsys.readouterr().out
    for section in ("versions", "devices", "what will be used", "processes", "machine"):
        assert f"\n{section}\n" in f"\n{text}"
    assert "0 problems" in text
    assert f"torch {torch.__version__}" in text
    lines = text.splitlines()
    assert all("->" in lines[i + 1] for i, line in enumerate(lines) if line.startswith("  note"))


def test_exit_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A problem makes a script stop: exit code 1, not 0 and not that of a usage error."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli.main(["doctor", f"run_dir={tmp_path}", "timeout=20"]) == 1
    text = capsys.readouterr().out
    assert "problem  CUDA_VISIBLE_DEVICES is empty" in text
    assert "\n1 problems" in text


@pytest.mark.parametrize(
    ("version", "level"), [((3, 10), "problem"), ((3, 11), "OK"), ((3, 12), "OK"), ((3, 13), "problem")]
)
def test_python(version: tuple[int, int], level: str) -> None:
    """Catches bounds that differ from setup.py's."""
    assert software.python(version).level == level


@pytest.mark.parametrize(
    ("version", "level"),
    [
        (None, "problem"),
        ("0.15.3", "problem"),
        ("0.16.1", "OK"),
        ("0.16.1rc0", "problem"),
        ("0.19.2", "OK"),
        ("0.20.0", "problem"),
    ],
)
def test_megatron(version: str | None, level: str) -> None:
    """Not installed, too old, too new; a release candidate is older than its release."""
    found = software.megatron(version)
    assert found.level == level
    assert bool(found.advice) == (level != "OK")


def test_bounds_are_those_of_the_package() -> None:
    """setup.py says the same."""
    text = (Path(__file__).resolve().parents[1] / "setup.py").read_text(encoding="utf-8")
    low, high = (".".join(map(str, bound)) for bound in software.SUPPORTED_MEGATRON)
    assert f"megatron-core>={low},<{high}" in text


def test_apex_is_told_by_its_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's apex is another project, which megatron-core takes for NVIDIA's; NVIDIA's without kernels is no use."""
    nvidia = frozenset({"__init__", "optimizers", "multi_tensor_apply", "normalization"})
    assert software.apex(None, fused=False).level == "OK"
    assert software.apex(nvidia, fused=True).level == "OK"
    assert software.apex(nvidia, fused=False).level == "note"
    package = tmp_path / "apex"
    package.mkdir()
    for name in ("__init__.py", "views.py", "forms.py"):
        (package / name).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    wrong = software.apex(software.contents("apex"), fused=False)
    assert wrong.level == "problem"
    assert "pip uninstall apex" in wrong.advice


def test_attention_is_what_the_model_chooses() -> None:
    """Catches an answer that the model's own choice has left behind."""
    assert software.attention(cuda=False) == choose_attention("auto", torch.device("cpu"))
    assert software.attention(cuda=True) == choose_attention("auto", torch.device("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformer_engine is masked on CPUs only")
def test_optimizer_is_what_the_header_calls_it() -> None:
    """Catches two names for one Adam, of which a reader takes the other for another."""
    assert software.optimizer(cuda=False) == describe_optimizer(OptimizerConfig(lr=1.0))


def test_name_that_never_resolves() -> None:
    """A name server that does not answer holds gethostbyname for minutes: the report must not wait for it."""
    outcome, seconds = host.timed(lambda: time.sleep(30) or "", 0.1)
    assert outcome is None
    assert seconds < 5
    found = host.resolution(outcome, seconds, timeout=0.1)
    assert found.level == "problem"
    assert "/etc/hosts" in found.advice


def test_name_resolution() -> None:
    """Unknown (a note: gloo may still find an interface), slow, and right."""
    error = socket.gaierror(-2, "Name or service not known")
    assert host.resolution(error, 0.0, timeout=2.0).level == "note"
    assert host.resolution("10.0.0.1", 1.5, timeout=2.0).level == "note"
    assert host.resolution("10.0.0.1", 0.1, timeout=2.0).level == "OK"


def test_process_group_that_does_not_start() -> None:
    """Hangs and errors are problems; an error's text is kept."""
    assert host.start(None, 2.0, timeout=2.0).level == "problem"
    found = host.start(RuntimeError("no interface"), 0.0, timeout=2.0)
    assert found.level == "problem"
    assert "no interface" in found.what
    assert host.start("started", 0.1, timeout=2.0).level == "OK"


def test_limits(tmp_path: Path) -> None:
    """Few open files, little locked memory, no shared memory."""
    assert host.open_files(1024).level == "note"
    assert host.open_files(65536).level == host.open_files(resource.RLIM_INFINITY).level == "OK"
    assert host.locked_memory(65536).level == "note"
    assert host.locked_memory(resource.RLIM_INFINITY).level == "OK"
    assert host.shared_memory(tmp_path / "none").level == "note"


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run_dir that is not there yet is judged by the nearest directory above it."""
    free = host.disk(tmp_path / "runs" / "first")
    assert str(tmp_path) in free.what
    monkeypatch.setattr(host.os, "access", lambda *_: False)
    assert host.disk(tmp_path).level == "problem"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, []),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, ["OK"]),
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, ["note"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["problem"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, []),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, ["note"]),
        ({"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "0"}, ["note"]),
        ({"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth9"}, ["note"]),
    ],
)
def test_variables(environment: dict[str, str], expected: list[str]) -> None:
    """What is set and breaks things; what is not set says nothing."""
    assert levels(list(host.variables(environment))) == expected


def test_shadowed_libraries(tmp_path: Path) -> None:
    """A folder called torch/ or megatron/ on PYTHONPATH hides the installed library."""
    (tmp_path / "megatron").mkdir()
    findings = list(host.variables({"PYTHONPATH": f"{tmp_path}:/nowhere"}))
    assert levels(findings) == ["problem"]
    assert "megatron" in findings[0].what
