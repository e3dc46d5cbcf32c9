"""Ports for processes that meet."""

import random
import socket
from contextlib import suppress


def free_port(address: str = "127.0.0.1") -> int:
    """One below those that the system gives to connections (from 32768 on Linux): the process that is told of it binds
    it only seconds later, and a connection of another test, running meanwhile, must not have taken it."""
    for port in random.SystemRandom().sample(range(10_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((address, port))
            return port
    raise RuntimeError(f"none of a hundred ports of {address} is free")
