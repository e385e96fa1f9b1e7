"""The Django middleware: `MoesifMiddleware`, for WSGI and ASGI, a drop-in for the one of moesifdjango."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction, sync_to_async
from django.conf import settings as django_settings
from django.http import HttpResponse

from moesif_otel._capture.callbacks import check_signatures, ends_the_task, run_steps
from moesif_otel._capture.django import DjangoCall, DjangoCapture
from moesif_otel._capture.wsgi.capture import TRANSACTION_ID_HEADER
from moesif_otel._pipeline.middleware import Middleware
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moesif_otel._capture.exchange import Steps
    from moesif_otel._pipeline.pipeline import Pipeline

__all__ = ["MoesifMiddleware"]

_shared: dict[Settings, Pipeline] = {}
"""Django makes a middleware for each handler, test clients one each: those of equal settings share a pipeline."""


class MoesifMiddleware(Middleware):
    """Django middleware that records API calls in Moesif, under WSGI and ASGI.

    Drop-in for `moesifdjango.middleware.moesif_middleware`:

    ```python
    MIDDLEWARE = [..., "moesif_otel.django.MoesifMiddleware"]  # after session and authentication middlewares
    MOESIF_MIDDLEWARE = {"APPLICATION_ID": "…"}
    ```

    Callbacks take `(request, response)`, Django's own, and may be coroutine functions under ASGI. They run when the
    view has answered, so models, `request.user` and `response.content` work in them as in a view.

    Where nobody says otherwise the user is the name of `request.user`, if the application has looked the user up.

    Args:
        get_response: What Django gives a middleware; without one only the profile calls are of use.

    Raises:
        MoesifConfigError: An option in `settings.MOESIF_MIDDLEWARE`, or in the environment, is wrong.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[Any], Any] | None = None) -> None:
        self._is_async = iscoroutinefunction(get_response)
        options = getattr(django_settings, "MOESIF_MIDDLEWARE", None)
        settings = Settings.of(options, async_callbacks=True)
        check_signatures(settings, ("request", "response"))
        super().__init__(settings, None)
        self.get_response: Any = get_response
        self._guard = self._pipeline.guard
        self.capture = DjangoCapture(self._pipeline)  # handlers look for it
        self._has_provider = False
        if get_response is not None:
            self.capture.meet_handlers()
        if self._is_async:
            markcoroutinefunction(self)

    def _find_pipeline(self) -> Pipeline:
        found = _shared.get(self.settings)
        if found is None or not found.is_live:
            found = _shared[self.settings] = super()._find_pipeline()
        return found

    def __call__(self, request: Any) -> Any:
        """Answer a request as the view and the middlewares further inside do."""
        if self._is_async:
            return self._answer_async(request)
        call = self._guard.run("capture of a Django request", self._begin, request)
        if call is None:
            return self.get_response(request)
        with call:
            self._guard.run("governance rules", _run_all, self._governing(call))
            response = call.refusal
            if response is None:
                response = self.get_response(request)
            self._guard.run("callbacks of a Django request", _run_all, self._calling_back(call, response))
            return self._guard.run("headers of a Django response", self._add_headers, call, response) or response

    async def _answer_async(self, request: Any) -> Any:
        call = self._guard.run("capture of a Django request", self._begin, request)
        if call is None:
            return await self.get_response(request)
        with call:
            await self._run_all_async("governance rules", self._governing(call))
            response = call.refusal
            if response is None:
                response = await self.get_response(request)
            await self._run_all_async("callbacks of a Django request", self._calling_back(call, response))
            return self._guard.run("headers of a Django response", self._add_headers, call, response) or response

    async def _run_all_async(self, kind: str, several: Iterator[Steps]) -> None:
        try:
            for steps in several:
                await _run_steps_async(steps)
        except Exception as exc:
            self._guard.caught(kind, exc)

    def _begin(self, request: Any) -> DjangoCall | None:
        if not self._pipeline.is_live:
            return None
        if not self._has_provider:
            self._has_provider = True
            self._provider_to_watch()
        return DjangoCall(request, self._pipeline)

    def _governing(self, call: DjangoCall) -> Iterator[Steps]:
        """Ask the governance rules before the view; yields callbacks that are to run first."""
        governed = call.governed()
        if governed is None:
            return
        if governed.needs_identity:
            yield self._pipeline.identifying(call.exchange)
        if governed.needs_body:
            data, whole = call.body()
            governed.give_body(data, whole=whole)
        decision = governed.verdict()
        if decision is None or not decision.blocked:
            call.decision = decision
            return
        call.refusal = response = HttpResponse(decision.body or b"", status=decision.status, reason=decision.phrase)
        del response["Content-Type"]
        for name, value in decision.headers:
            response[name] = value

    def _calling_back(self, call: DjangoCall, response: Any) -> Iterator[Steps]:
        """Note the view's answer; yields the callbacks."""
        if not call.exchange.is_open:  # the client left before our turn came
            return
        call.answered(response)
        if self._pipeline.has_callbacks(call.exchange):
            yield self._pipeline.calling_back(call.exchange)
        call.called_back()

    def _add_headers(self, call: DjangoCall, response: Any) -> Any:
        if call.decision is not None:
            own = list(response.items())
            for name, value in call.decision.added_to(own)[len(own) :]:
                response[name] = value
        if not self.settings.disabled_transaction_id and TRANSACTION_ID_HEADER not in response:
            incoming = call.request.META.get("HTTP_X_MOESIF_TRANSACTION_ID")
            response[TRANSACTION_ID_HEADER] = self._transaction_id_of(call.exchange, incoming)
        return response


def _run_all(several: Iterator[Steps]) -> None:
    for steps in several:
        run_steps(steps)


async def _run_steps_async(steps: Steps) -> None:
    """Run steps whose plain callbacks may use the ORM, which refuses to run on an event loop."""
    advance = sync_to_async(_advance, thread_sensitive=True)
    step = functools.partial(steps.send, None)
    while (awaitable := await advance(step)) is not None:
        try:
            step = functools.partial(steps.send, await awaitable)
        except BaseException as exc:
            if ends_the_task(exc):
                raise
            step = functools.partial(steps.throw, exc)


def _advance(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except StopIteration:
        return None
