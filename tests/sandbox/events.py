"""Events as a client of Moesif sends them, and refusals as values, for the sandbox's tests."""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta, timezone

from moesif_otel.sandbox.check import Refusal


def make_event(*, took_ms=5, **fields):
    """Make an event that the server takes."""
    began = datetime.now(timezone.utc)
    began, ended = (
        (began + timedelta(milliseconds=later)).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] for later in (0, took_ms)
    )
    request = {"time": began, "uri": "http://shop.test/orders?page=1", "verb": "GET", "headers": {"Host": "shop.test"}}
    response = {"time": ended, "status": 200, "headers": {}}
    return {"request": request, "response": response, "transaction_id": str(uuid.uuid4()), **fields}


def refusal_of(function, *arguments, **keywords):
    """Call `function` and give the refusal that it raises, or None; anything else it raises passes."""
    try:
        function(*arguments, **keywords)
    except Refusal as refusal:
        return refusal
    return None
