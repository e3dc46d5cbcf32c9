"""Whether processes can find each other on this host, and the limits that they run into."""

import os
import resource
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rpo_megatron.doctor.finding import Finding, note, ok, problem

GIB = 2**30


def processes(timeout: float) -> Iterator[Finding]:
    if not dist.is_available():
        yield problem("torch has no torch.distributed", "install a torch build that has it: every official wheel does")
        return
    yield ok("gloo is built in") if dist.is_gloo_available() else problem("no gloo", "install an official torch wheel")
    yield from _nccl()
    yield resolution(*timed(lambda: socket.gethostbyname(socket.gethostname()), timeout), timeout=timeout)
    yield start(*timed(lambda: _one_process(timeout), timeout), timeout=timeout)


def _nccl() -> Iterator[Finding]:
    if not dist.is_nccl_available():
        advice = (
            "install a CUDA build of torch" if torch.cuda.is_available() else "nothing to do on a CPU: gloo is used"
        )
        yield note("no NCCL in this torch", advice)
    elif torch.cuda.is_available():
        yield ok(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")
    else:
        yield ok("NCCL is built in, and not used without a GPU")


def _one_process(timeout: float) -> str:
    """A process group of one over a TCP store on this host, as torchrun makes it: init, all-reduce, end."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=timeout))
    group = dist.ProcessGroupGloo(store, 0, 1, timedelta(seconds=timeout))
    group.allreduce([torch.ones(1)]).wait()
    return "started"


def timed(action: Callable[[], str], timeout: float) -> tuple[str | Exception | None, float]:
    """What an action returned or raised, None if it had not ended after `timeout` seconds, and the seconds it took. A
    name server that does not answer can hold it for minutes: its thread is then left behind."""
    box: list[str | Exception] = []

    def run() -> None:
        try:
            box.append(action())
        except Exception as error:
            box.append(error)

    thread, begin = threading.Thread(target=run, daemon=True), time.monotonic()
    thread.start()
    thread.join(timeout)
    return (box[0] if box else None), time.monotonic() - begin


def resolution(outcome: str | Exception | None, seconds: float, *, timeout: float) -> Finding:
    name = socket.gethostname()
    advice = (
        f"add a line `127.0.1.1 {name}` (or this host's address) to /etc/hosts, or set GLOO_SOCKET_IFNAME and "
        f"NCCL_SOCKET_IFNAME to the network interface that the nodes share"
    )
    if outcome is None:
        return problem(
            f"host name '{name}' was not resolved within {timeout:g} s: every start of a run waits for it", advice
        )
    if isinstance(outcome, Exception):
        return note(f"host name '{name}' has no address ({outcome}): gloo may not find its interface", advice)
    if seconds > timeout / 2:
        return note(f"host name '{name}' -> {outcome} took {seconds:.1f} s", advice)
    return ok(f"host name '{name}' -> {outcome}")


def start(outcome: str | Exception | None, seconds: float, *, timeout: float) -> Finding:
    advice = (
        "check that a process may listen on 127.0.0.1, and set GLOO_SOCKET_IFNAME=lo for runs on this machine alone"
    )
    if outcome is None:
        return problem(f"a process group of one process did not start within {timeout:g} s", advice)
    if isinstance(outcome, Exception):
        return problem(f"a process group of one process does not start: {outcome}", advice)
    return ok(f"torch.distributed starts (gloo, one process, {seconds:.2f} s)")


# ------------------------------------------------------------------------------------------------ machine


def machine(run_dir: Path, environment: Mapping[str, str]) -> Iterator[Finding]:
    yield shared_memory(Path("/dev/shm"))
    yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    yield disk(run_dir)
    yield from variables(environment)


def shared_memory(path: Path) -> Finding:
    if not path.is_dir():
        return note(f"{path} does not exist", "NCCL needs it between the GPUs of a node: mount a tmpfs there")
    size = shutil.disk_usage(path).total / GIB
    if size < 1:
        return note(
            f"{path} has {size:.2f} GiB",
            "enough for the CPU; NCCL needs 1 GiB for 8 GPUs: start the container with --shm-size=8g or --ipc=host",
        )
    return ok(f"{path} has {size:.1f} GiB")


def open_files(limit: int) -> Finding:
    if limit != resource.RLIM_INFINITY and limit < 4096:
        return note(f"at most {limit} open files", "ulimit -n 65536: checkpoints and many ranks open many files")
    return ok(f"at most {'unlimited' if limit == resource.RLIM_INFINITY else limit} open files")


def locked_memory(limit: int) -> Finding:
    if limit == resource.RLIM_INFINITY:
        return ok("locked memory is not limited")
    text = f"locked memory is limited to {limit / GIB:.3g} GiB"
    return note(text, "ulimit -l unlimited on nodes with InfiniBand (NCCL registers memory); of no matter elsewhere")


def disk(run_dir: Path) -> Finding:
    folder = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.is_dir())
    if not os.access(folder, os.W_OK):
        return problem(f"{folder} cannot be written to", "choose another run_dir, or change its permissions")
    free = shutil.disk_usage(folder).free / GIB
    text = f"{free:.0f} GiB free in {folder}"
    if free < 10:
        return note(text, "a checkpoint takes 14 bytes per parameter, and a new one is complete before an old one goes")
    return ok(text)


def variables(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Environment variables that commonly break things, where they are set."""
    found = [check(environment[name]) for name, check in VARIABLES.items() if name in environment]
    yield from (finding for finding in found if finding is not None)
    others = sorted(name for name in environment if name.startswith(("NCCL_", "GLOO_")) and name not in VARIABLES)
    if others:
        text = ", ".join(f"{name}={environment[name]}" for name in others)
        yield note(
            f"set for every run: {text}",
            "settings of another cluster are a common cause of hangs: unset what is not needed",
        )
    yield from _shadowed(environment.get("PYTHONPATH", ""))


def _connections(value: str) -> Finding | None:
    if value == "1":
        return ok("CUDA_DEVICE_MAX_CONNECTIONS=1")
    return note(
        f"CUDA_DEVICE_MAX_CONNECTIONS={value}",
        "set it to 1 up to Hopper: tensor parallel communication is otherwise not overlapped",
    )


def _hidden_gpus(value: str) -> Finding | None:
    return None if value else problem("CUDA_VISIBLE_DEVICES is empty: no GPU is visible", "unset CUDA_VISIBLE_DEVICES")


def _blocking(value: str) -> Finding | None:
    advice = "unset it: it is for debugging, and makes every kernel wait"
    return None if value in ("", "0") else note(f"CUDA_LAUNCH_BLOCKING={value}", advice)


def _no_peer_to_peer(value: str) -> Finding | None:
    advice = "unset it: without peer to peer the GPUs of a node talk through host memory, several times slower"
    return None if value in ("", "0") else note(f"NCCL_P2P_DISABLE={value}", advice)


def _no_infiniband(value: str) -> Finding | None:
    advice = "unset it where the nodes have InfiniBand or RoCE: NCCL then uses plain sockets"
    return None if value in ("", "0") else note(f"NCCL_IB_DISABLE={value}", advice)


VARIABLES: Mapping[str, Callable[[str], Finding | None]] = {
    "CUDA_DEVICE_MAX_CONNECTIONS": _connections,
    "CUDA_VISIBLE_DEVICES": _hidden_gpus,
    "CUDA_LAUNCH_BLOCKING": _blocking,
    "NCCL_P2P_DISABLE": _no_peer_to_peer,
    "NCCL_IB_DISABLE": _no_infiniband,
}


def _shadowed(path: str) -> Iterator[Finding]:
    """Directories of PYTHONPATH that hide an installed library."""
    for folder in filter(None, path.split(os.pathsep)):
        hidden = [name for name in ("torch", "megatron", "transformers", "numpy") if (Path(folder) / name).exists()]
        if hidden:
            yield problem(
                f"PYTHONPATH: '{folder}' has its own {', '.join(hidden)}, which hides the installed one",
                "remove it from PYTHONPATH, or start from another directory",
            )
