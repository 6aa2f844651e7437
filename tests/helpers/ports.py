"""Ports of loopback for the tests' servers."""

import random
import socket


def free_port() -> int:
    """A port of loopback that is not in use, below those that the system gives to outgoing connections."""
    for port in random.sample(range(20_000, 32_000), 100):
        if can_listen(port):
            return port
    raise RuntimeError("no free port")


def can_listen(port: int) -> bool:
    """Whether nobody has the port."""
    try:
        with socket.create_server(("127.0.0.1", port)):
            return True
    except OSError:
        return False
