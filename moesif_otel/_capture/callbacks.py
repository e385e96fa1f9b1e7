"""Running the callbacks that users give: SKIP, IDENTIFY_*, GET_*.

They run in the thread or task that served the call, or on our own thread for calls that garbage collection ended. What
one raises is counted and goes no further, and none is called twice for a call.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from moesif_otel._capture.exchange import snapshot
from moesif_otel._guard import get_logger, place_of
from moesif_otel.errors import MoesifConfigError
from moesif_otel.settings import ImportedCallback

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from moesif_otel._capture.exchange import Decision, Direction, Exchange, Steps
    from moesif_otel._guard import Guard
    from moesif_otel.settings import Settings

_logger: Final = get_logger(__name__)

_NAMES: Final = ("SKIP", "IDENTIFY_USER", "IDENTIFY_COMPANY", "GET_METADATA", "GET_SESSION_TOKEN")


class Callbacks:
    """The callbacks of one direction; thread-safe as far as they are."""

    __slots__ = ("_guard", "_metadata", "_session_token", "_skip", "_who", "any", "may_skip")

    def __init__(self, settings: Settings, direction: Direction, guard: Guard) -> None:
        suffix = "_OUTGOING" if direction == "Outgoing" else ""
        self._guard = guard
        self._skip, user, company, self._metadata, self._session_token = everything = [
            _Callback(name + suffix, getattr(settings, (name + suffix).lower())) for name in _NAMES
        ]
        self._who = (("user_id", user), ("company_id", company))
        self.may_skip = self._skip.given
        self.any = any(callback.given for callback in everything)

    def steps(self, exchange: Exchange) -> Steps:
        """Run them all and note the answers on the Exchange, with a stop at each awaitable that a callback returns.

        A SKIP that raises does not skip. What `identify` said stands; GET_METADATA's mapping is merged under it.
        """
        arguments = exchange.callback_arguments
        if self._skip.given:
            skipped = yield from self._ask(self._skip, arguments)
            exchange.skipped = self._guard.run("callback SKIP", bool, skipped) or self._skip.is_missing
            if exchange.skipped:
                return
        yield from self.identifying(exchange)
        if self._session_token.given and exchange.session_token is None:
            said = yield from self._ask(self._session_token, arguments)
            exchange.note_identity("session_token", said, self._session_token.name)
        if self._metadata.given:
            said = yield from self._ask(self._metadata, arguments)
            said = self._guard.run("callback GET_METADATA", snapshot, said)
            if isinstance(said, Mapping) and exchange.metadata:
                exchange.metadata = {**said, **exchange.metadata}
            elif said is not None and not exchange.metadata:
                exchange.metadata = said

    def identifying(self, exchange: Exchange) -> Steps:
        """Run IDENTIFY_USER and IDENTIFY_COMPANY unless they have run (a governance rule may need them early)."""
        if exchange.identified:
            return
        exchange.identified = True
        for field, callback in self._who:
            if callback.given and getattr(exchange, field) is None:
                arguments = exchange.callback_arguments
                more = exchange.identify_arguments
                if len(more) > len(arguments) and callback.accepts(len(more)):
                    arguments = more
                said = yield from self._ask(callback, arguments)
                exchange.note_identity(field, said, callback.name)

    def _ask(self, callback: _Callback, arguments: tuple[Any, ...]) -> Generator[Any, Any, Any]:
        is_suspended = False
        try:
            said = callback(*arguments)
            if hasattr(type(said), "__await__"):
                is_suspended = True
                said = yield said
        except (KeyboardInterrupt, SystemExit):
            raise
        except _NotImportedError:
            self._guard.count(f"callback {callback.name}")  # it has been named in the log
        except _NobodyAwaitsError:
            self._guard.note(
                f"callback {callback.name}",
                f"callback {callback.name} returned a coroutine, and nothing can await it here, so calls are recorded "
                "without it. Make it a plain function, or await in your own code and call moesif_otel.identify()",
            )
        except BaseException as exc:  # asyncio's CancelledError and gevent's Timeout are no Exceptions
            if is_suspended and isinstance(exc, GeneratorExit):
                raise  # these steps are closed
            self._guard.caught(f"callback {callback.name}", exc)
        else:
            return said
        return None


def run_steps(steps: Steps) -> None:
    """Run to the end what may be done in steps, where nobody can await: an awaitable is an error of its callback."""
    try:
        awaitable = next(steps)
        while True:
            if inspect.iscoroutine(awaitable):  # nothing else: `close` of the user's own objects does what it says
                awaitable.close()  # it warns otherwise
            awaitable = steps.throw(_NobodyAwaitsError())
    except StopIteration:
        return


def decide(exchange: Exchange, read_ahead: Callable[[], bytes | None]) -> Decision | None:
    """Ask the governance rules about a request, where nothing is to be awaited. Never raises.

    Args:
        exchange: With method, URL, headers, peer address and callback arguments.
        read_ahead: Returns the raw request body, or None; called only where a rule depends on it.
    """
    pipeline = exchange.pipeline
    try:
        governed = pipeline.governed(exchange)
        if governed is None:
            return None
        if governed.needs_identity:
            run_steps(pipeline.identifying(exchange))
        if governed.needs_body:
            # It fails where the client left; the application gets the same error when it reads.
            governed.give_body(pipeline.guard.run("reading a request body for governance", read_ahead))
        return governed.verdict()
    except Exception as exc:
        pipeline.guard.caught("governance rules", exc)
        return None


async def await_steps(steps: Steps, awaitable: Any = None) -> None:
    """Run to the end what may be done in steps, and await what is awaitable; `awaitable` where they have begun."""
    try:
        if awaitable is None:
            awaitable = next(steps)
        while True:
            try:
                result = await awaitable
            except BaseException as exc:
                if ends_the_task(exc):
                    raise
                awaitable = steps.throw(exc)
            else:
                awaitable = steps.send(result)
    except StopIteration:
        return
    finally:
        steps.close()  # cancelled


def ends_the_task(exc: BaseException) -> bool:
    """Return whether what awaiting a callback raised is for the task that awaits, and no error of the callback's own.

    A callback that awaits a cancelled task of its own raises CancelledError. Before Python 3.11 nobody can tell that
    from a cancellation of the call's task.
    """
    if isinstance(exc, (Exception, SystemExit, KeyboardInterrupt, GeneratorExit)):
        return not isinstance(exc, Exception)
    asyncio = sys.modules.get("asyncio")  # a WSGI application need not import it
    is_cancelled = asyncio is not None and isinstance(exc, asyncio.CancelledError)
    if asyncio is None or asyncio._get_running_loop() is None:
        return not is_cancelled  # trio, which has a cancellation of its own
    cancelling = getattr(asyncio.current_task(), "cancelling", None)
    return is_cancelled and (cancelling is None or cancelling() > 0)


class _NobodyAwaitsError(Exception):
    """A callback returned an awaitable where nobody can await."""


class _NotImportedError(Exception):
    """A callback's import path leads nowhere."""


class _Callback:
    """One callback, or none; knows how many positional arguments it takes."""

    __slots__ = ("_accepted", "_function", "given", "is_missing", "name")

    def __init__(self, name: str, function: Callable[..., Any] | None) -> None:
        self.name = name
        self._function = function
        self._accepted: dict[int, bool] = {}
        self.given = function is not None
        self.is_missing = False
        """True once its import path is known to lead nowhere."""

    def __call__(self, *arguments: Any) -> Any:
        return self._resolved()(*arguments)

    def accepts(self, count: int) -> bool:
        """Tell whether it can be called with `count` positional arguments."""
        if count not in self._accepted:
            try:
                self._accepted[count] = takes(self._resolved(), count)
            except _NotImportedError:
                return True  # the call itself will tell
        return self._accepted[count]

    def _resolved(self) -> Any:
        function = self._function
        if not isinstance(function, ImportedCallback):
            return function
        try:
            found = function.resolve()
        except Exception as exc:
            if not self.is_missing:
                self.is_missing = True
                _logger.error(
                    "moesif_otel: callback %r cannot be imported (%s); calls are %s. Check %s",
                    function.path,
                    _words_of(exc),
                    "not sent" if self.name.startswith("SKIP") else "recorded without it",
                    self.name,
                )
            raise _NotImportedError from exc
        self.is_missing = False
        return found


def _words_of(exc: Exception) -> str:
    """Say why an import failed: in the import system's words, or ours; a module of the user's may quote anything."""
    place = place_of(exc)
    if isinstance(exc, ModuleNotFoundError) and exc.name is not None:
        return f"no module named {exc.name!r}"
    return str(exc) if place.startswith("settings.py:") else f"{type(exc).__qualname__} at {place}"


def check_signatures(
    settings: Settings, arguments: Sequence[str], *, identify: Sequence[str] = (), suffix: str = ""
) -> None:
    """Refuse callbacks that cannot take what they will be called with, before the first call.

    Args:
        settings: Where the callbacks are named; those named by an import path are not imported here.
        arguments: Names of the arguments that each callback gets.
        identify: Those that IDENTIFY_* may take instead.
        suffix: `_OUTGOING` for the callbacks of outgoing calls.

    Raises:
        MoesifConfigError: One cannot be called like that; the message shows the signatures that are expected.
    """
    for name in _NAMES:
        shapes = [arguments, identify] if identify and name.startswith("IDENTIFY") else [arguments]
        check_signature(name + suffix, getattr(settings, (name + suffix).lower()), *shapes)


def check_signature(name: str, function: Any, *shapes: Sequence[str]) -> None:
    """Refuse one callback, as `check_signatures` does, unless it takes the arguments of one of the shapes."""
    if function is None or isinstance(function, ImportedCallback):
        return
    if not any(takes(function, len(shape)) for shape in shapes):
        raise MoesifConfigError(
            f"{name}: got {_shown(function)}, takes "
            + " or ".join(f"a function ({', '.join(shape)})" for shape in shapes),
            option=name,
        )


def takes(function: Any, count: int) -> bool:
    """Tell whether a function can be called with `count` positional arguments, as far as can be known."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a callable of C without a signature: the call itself will tell
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _shown(function: Any) -> str:
    # Names of parameters only: their defaults, or what a `partial` holds, may be anything.
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{name}({', '.join(inspect.signature(function).parameters)})"
