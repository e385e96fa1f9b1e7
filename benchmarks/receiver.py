"""A Moesif that answers at once, late, never, or with a refusal; a process of its own: `python -m benchmarks.receiver MODE`.

It prints its port. Bodies are read and thrown away, so that it takes as little of the machine as a server can.
"""

from __future__ import annotations

import asyncio
import sys

_CREATED = b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n"
_EMPTY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n%s"
_REFUSED = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
_LATE_S = 1.0


async def _serve(mode: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = 0
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        length = int(line[15:])
                while length:
                    length -= len(await reader.readexactly(min(length, 1 << 16)))  # raises where the client has left
                if mode == "silent":
                    await asyncio.sleep(3600)
                if mode == "slow":
                    await asyncio.sleep(_LATE_S)
                if mode == "refusing":
                    writer.write(_REFUSED)
                elif head.startswith(b"GET"):
                    writer.write(_EMPTY % (b"[]" if b"rules" in head[:40] else b"{}"))
                else:
                    writer.write(_CREATED)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1] if len(sys.argv) > 1 else "healthy"))
