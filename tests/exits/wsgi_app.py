"""A WSGI app whose requests are events: each one is handed to a delivery that was made at import, before any fork."""

from __future__ import annotations

import itertools
import os
import threading
import time

from tests.exits.driver import make

rig = make(os.environ["EVENTS_URL"])
numbers = itertools.count()

if os.environ.get("SEND_AT_IMPORT"):
    # Before the fork of `--preload`: threads, a connection and a lock each have been in use.
    rig.delivery.ensure_started()
    rig.submit(0)
    assert rig.delivery.force_flush(30)


def application(environ, start_response):
    """Submit the event that the query names; `hang` never returns."""
    rig.delivery.ensure_started()
    query = environ["QUERY_STRING"]
    rig.submit(int(query.partition("&")[0]))
    if query.endswith("hang"):
        time.sleep(60)
    # Locks from before a monkey patch would stop every greenlet of the process whenever one of ours waits.
    patched = type(rig.delivery._state.wake_intake._lock) is type(threading.Lock())
    body = f"{os.getpid()} {'ok' if patched else 'locks from before the patch'}".encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
