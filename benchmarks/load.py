"""Load: `wrk` where it is installed, else a generator of our own; and a steady rate, which wrk has not.

`python -m benchmarks.load URL CONNECTIONS SECONDS RATE BODY_FILE HEADERS` prints JSON; rate 0 means as fast as the server
answers. At a steady rate the latency counts from the moment a request was due, not from when it could be sent.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

_MULTIPLES = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}


@dataclass
class Load:
    """What the clients saw."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


def saturate(url: str, body: bytes, *, connections: int = 4, seconds: float = 5.0, headers: int = 0) -> Load:
    """Send as fast as the server answers, on that many connections."""
    if shutil.which("wrk") is None:
        return _generate(url, body, connections, seconds, 0.0, headers)
    extra = "".join(f'wrk.headers["X-Extra-{n}"] = "value {n} of some ordinary length"\n' for n in range(headers))
    script = (
        f'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n{extra}'
        f"local f = io.open(os.getenv('BODY'), 'rb')\nwrk.body = f:read('*a')\nf:close()\n"
        if body
        else extra
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "body").write_bytes(body)
        Path(folder, "load.lua").write_text(script)
        command = [
            "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{max(1, round(seconds))}s",
            "--latency",
            "-s",
            f"{folder}/load.lua",
            url,
        ]
        told = subprocess.run(
            command, env={"BODY": f"{folder}/body", "PATH": "/usr/bin:/bin"}, check=True, capture_output=True, text=True
        ).stdout
    count, lasted, unit = re.search(r"(\d+) requests in ([\d.]+)(m?s|m)", told).groups()

    def percentile(name: str) -> float:
        value, unit = re.search(rf"{name}%\s+([\d.]+)(us|ms|s|m)\b", told).groups()
        return float(value) * _MULTIPLES[unit]

    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", told)
    socket_errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", told)
    errors = (int(failed[1]) if failed else 0) + (sum(map(int, socket_errors.groups())) if socket_errors else 0)
    return Load(int(count), float(lasted) * _MULTIPLES[unit] / 1e3, percentile("50"), percentile("99"), errors)


def steady(url: str, body: bytes, rate: float, *, connections: int = 4, seconds: float = 5.0) -> Load:
    """Send at a steady rate."""
    return _generate(url, body, connections, seconds, rate, 0)


def _generate(url: str, body: bytes, connections: int, seconds: float, rate: float, headers: int) -> Load:
    with tempfile.NamedTemporaryFile() as file:
        file.write(body)
        file.flush()
        command = [
            sys.executable,
            "-m",
            "benchmarks.load",
            url,
            str(connections),
            str(seconds),
            str(rate),
            file.name,
            str(headers),
        ]
        told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout
    return Load(**json.loads(told))


async def _run(url: str, connections: int, seconds: float, rate: float, body: bytes, headers: int) -> Load:
    target = urlsplit(url)
    extra = "".join(f"X-Extra-{n}: value {n} of some ordinary length\r\n" for n in range(headers))
    head = (
        f"POST {target.path} HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Type: application/json\r\n{extra}"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    message = head.encode() + body
    latencies: list[float] = []
    errors = 0
    started_s = time.perf_counter()
    until_s = started_s + seconds

    async def client(number: int) -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection(target.hostname, target.port)
        turn = 0
        while (now_s := time.perf_counter()) < until_s:
            due_s = now_s
            if rate:
                due_s = started_s + (number + turn * connections) / rate
                if due_s > now_s:
                    await asyncio.sleep(due_s - now_s)
            turn += 1
            try:
                writer.write(message)
                answer = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = re.search(rb"content-length: *(\d+)", answer)
                await reader.readexactly(int(length[1]))
                errors += not answer.startswith(b"http/1.1 2")
                latencies.append(time.perf_counter() - due_s)
                if b"connection: close" in answer:
                    raise ConnectionError
            except (ConnectionError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection(target.hostname, target.port)

    await asyncio.gather(*(client(number) for number in range(connections)))
    latencies.sort()
    lasted_s = time.perf_counter() - started_s

    def percentile(part: float) -> float:
        return latencies[min(len(latencies) - 1, int(len(latencies) * part))] * 1e3

    return Load(len(latencies), lasted_s, percentile(0.5), percentile(0.99), errors)


if __name__ == "__main__":
    url_, connections_, seconds_, rate_, path_, headers_ = sys.argv[1:]
    found = asyncio.run(
        _run(url_, int(connections_), float(seconds_), float(rate_), Path(path_).read_bytes(), int(headers_))
    )
    print(json.dumps(found.__dict__))
