"""Governance of Tornado requests: asking the rules, and answering in place of the handler.

A blocked request is answered where Tornado calls `prepare`, which is replaced on the instance: everything around it
(the future that a streamed upload waits for, `on_finish`, the access log, errors, spans and metrics) is Tornado's own
and the instrumentor's, as for any handler that finishes in `prepare`. What Tornado itself refuses before that stays
refused: 405, 400 for a malformed body, 403 for a missing XSRF token. No error of ours keeps a request from its handler.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

from tornado.web import RequestHandler
from wrapt import FunctionWrapper

from moesif_otel._capture.callbacks import decide

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._capture.exchange import Decision, Exchange
    from moesif_otel._capture.tornado.call import TornadoCall


def govern(call: TornadoCall) -> None:
    """Ask the rules about a request; note headers to add, or arrange the answer of a blocked one. Never raises."""
    exchange, handler = call.exchange, call.handler
    if exchange is None or handler is None:
        return
    try:
        max_bytes = exchange.pipeline.settings.request_max_body_size
        decision = decide(exchange, partial(_body_of, handler, max_bytes))
        if decision is None:
            return
        if decision.blocked:
            _block(handler, exchange, decision)
        else:
            call.decision = decision
    except Exception as exc:
        call.guard.caught("governance of a Tornado request", exc)


def _body_of(handler: RequestHandler, max_bytes: int) -> bytes | None:
    """Return the request's body, which Tornado has read; None for one that is longer, or streamed and yet to come."""
    body = handler.request.body
    return body if isinstance(body, bytes) and 0 < len(body) <= max_bytes else None


def _block(handler: RequestHandler, exchange: Exchange, decision: Decision) -> None:
    # Until the answer is really given: Tornado may refuse the request before.
    blocked_by, exchange.blocked_by = exchange.blocked_by, None
    guard = exchange.pipeline.guard
    prepare = handler.prepare

    def answer() -> Any:
        vars(handler).pop("prepare", None)
        exchange.blocked_by = blocked_by
        try:
            _write(handler, decision)
        except Exception as exc:
            # Traffic flows on: the handler serves the request after all.
            guard.caught("the response to a blocked request", exc)
            exchange.blocked_by = None
            handler.clear()
            return prepare()
        RequestHandler.finish(handler)
        return None

    vars(handler)["prepare"] = _inside_instrumentation(handler, answer)


def _write(handler: RequestHandler, decision: Decision) -> None:
    # The methods of `RequestHandler` itself: an application's own may count on what its `prepare` would have done.
    RequestHandler.clear(handler)
    RequestHandler.clear_header(handler, "Content-Type")
    RequestHandler.set_status(handler, decision.status, decision.phrase)
    for name, value in decision.headers:
        RequestHandler.set_header(handler, name, value)
    if decision.body:
        RequestHandler.write(handler, decision.body)


def _inside_instrumentation(handler: RequestHandler, answer: Callable[[], Any]) -> Callable[[], Any]:
    """Return `answer` as OpenTelemetry's instrumentor would have it called: its wrapper is around the class's method.

    Without it the request would have no span, and the instrumentor's count of active requests would go below zero.
    """
    wrapped = inspect.getattr_static(type(handler), "prepare", None)
    around = getattr(wrapped, "_self_wrapper", None) if isinstance(wrapped, FunctionWrapper) else None
    if not callable(around):
        return answer
    return lambda: around(answer, handler, (), {})
