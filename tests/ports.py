"""Ports for servers that tests start as processes of their own and that cannot choose one themselves."""

from __future__ import annotations

import os
import random
import socket

# Below what the system gives away itself (32768 and up on Linux), so that no connection takes one before the server
# does; each pytest-xdist worker has ports of its own, and none is used twice.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_WORKERS = 16
_PORTS = list(range(20_000 + _WORKER % _WORKERS, 32_000, _WORKERS))
random.Random().shuffle(_PORTS)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port on which nobody listens.

    Raises:
        OSError: The host has no free port, or is no address of this machine.
    """
    while True:
        port = _PORTS.pop()
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, port))
            except OSError:
                if len(_PORTS) < _WORKERS:
                    raise
                continue
        return port
