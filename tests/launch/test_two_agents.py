"""Two torchrun agents on one machine, as on two nodes. The second has a network of its own (a namespace, behind a pair
of virtual interfaces) where the machine lets us make one: an address that only works on the same host, such as
localhost, then fails as it would on a cluster."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rpo_megatron.model.source import newest_checkpoint, read_state
from rpo_megatron.training.signals import STOPPED
from tests.launch.shell import LAUNCH, finish, kill_all, lines_of, shell_environment, start, wait_until, write_config
from tests.ports import free_port


@dataclass(frozen=True, kw_only=True)
class Node:
    address: str
    interface: str
    inside: tuple[str, ...] = ()
    """What runs a command there."""


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """The second in a network namespace, or plainly, with a printed reason."""
    name, net = f"rpo{os.getpid()}", f"10.213.{os.getpid() % 250}"
    ours, theirs = Node(address=f"{net}.1", interface=f"{name}a"), Node(address=f"{net}.2", interface=f"{name}b")
    commands = [
        f"ip netns add {name}",
        f"ip link add {ours.interface} type veth peer name {theirs.interface} netns {name}",
        f"ip addr add {ours.address}/30 dev {ours.interface}",
        f"ip link set {ours.interface} up",
        f"ip -n {name} addr add {theirs.address}/30 dev {theirs.interface}",
        f"ip -n {name} link set {theirs.interface} up",
        f"ip -n {name} link set lo up",
    ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        if isinstance(error, subprocess.CalledProcessError):
            _remove(name)
        print(f"both agents in one network: {error} {getattr(error, 'stderr', '')}")
        yield Node(address="127.0.0.1", interface="lo"), Node(address="127.0.0.1", interface="lo")
        return
    try:
        print(f"the second agent is in the network namespace {name}")
        yield ours, Node(address=theirs.address, interface=theirs.interface, inside=("ip", "netns", "exec", name))
    finally:
        _remove(name)


@contextmanager
def both_agents(nodes: tuple[Node, Node], logs: tuple[Path, Path], *words: str) -> Iterator[list[Any]]:
    """launch/node.sh on both nodes, one process each, ended at the end."""
    rendezvous = f"{nodes[0].address}:{free_port(nodes[0].address)}"
    started = []
    for rank, (node, log) in enumerate(zip(nodes, logs, strict=True)):
        place = {"NODES": "2", "NODE_RANK": str(rank), "NODE_ADDRESS": node.address, "RENDEZVOUS": rendezvous}
        extra = {"PROCESSES_PER_NODE": "1", "GLOO_SOCKET_IFNAME": node.interface, **place}
        started.append(start([*node.inside, str(LAUNCH / "node.sh"), *words], log, **shell_environment(**extra)))
    try:
        yield started
    finally:
        for agent in started:
            kill_all(agent)


@pytest.mark.parallel
def test_two_agents_train_as_one(tmp_path: Path) -> None:
    """Catches nodes that do not find each other, ranks counted per node, and a signal to one node that the other does
    not hear of. The run is stopped by that signal, started again, and equals that of a single agent bit for bit."""
    yaml, run_dir, logs = write_config(tmp_path), tmp_path / "run", (tmp_path / "log0", tmp_path / "log1")
    with two_nodes() as nodes:
        with both_agents(nodes, logs, "train", yaml) as agents:
            wait_until(lambda: len(lines_of(run_dir)) >= 3, process=agents[0], log=logs[0], timeout=180)
            agents[1].send_signal(signal.SIGTERM)
            codes = [finish(agent, log, timeout=90)[0] for agent, log in zip(agents, logs, strict=True)]
        assert codes == [1, STOPPED], logs[0].read_text()[-4000:] + logs[1].read_text()[-4000:]
        newest = newest_checkpoint(run_dir)
        assert newest is not None
        until = f"train.stop_at={read_state(newest)['step'] + 3}"
        with both_agents(nodes, logs, "train", yaml, until) as agents:
            ends = [finish(agent, log, timeout=240) for agent, log in zip(agents, logs, strict=True)]
        assert [code for code, _ in ends] == [0, 0], ends
    assert "2 processes = tensor 1 x pipeline 1" in logs[0].read_text()
    assert [path.parent.name for path in sorted((run_dir / "logs").glob("node*/*"))] == ["node0"] * 2 + ["node1"] * 2
    log = tmp_path / "log"
    alone = start(
        [str(LAUNCH / "local.sh"), "2", "train", yaml, until, f"run_dir={tmp_path / 'alone'}"],
        log,
        **shell_environment(),
    )
    code, output = finish(alone, log, timeout=240)
    assert code == 0, output[-4000:]
    assert lines_of(run_dir) == lines_of(tmp_path / "alone")


def _remove(name: str) -> None:
    for command in (["ip", "netns", "del", name], ["ip", "link", "del", f"{name}a"]):
        subprocess.run(command, capture_output=True, check=False)  # either may be gone already
