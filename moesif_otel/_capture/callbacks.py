"""Running the callbacks that users give: SKIP, IDENTIFY_*, GET_*.

Owns: `Callbacks`, one set for each direction; their order, their arities, what becomes of what they raise.
Threads: the one that served the call; our own thread for calls that garbage collection ended.
Never: lets a callback's exception out, calls one twice for a call, keeps its arguments.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from moesif_otel._guard import place_of
from moesif_otel.settings import ImportedCallback

if TYPE_CHECKING:
    from collections.abc import Callable

    from moesif_otel._capture.exchange import Direction, Exchange
    from moesif_otel._guard import Guard
    from moesif_otel.settings import Settings

__all__ = ["Callbacks"]

_logger: Final = logging.getLogger(__name__)


class Callbacks:
    """The callbacks of one direction.

    Args:
        settings: Where they are named.
        direction: `Incoming` or `Outgoing` (the `*_OUTGOING` options).
        guard: Takes what they raise.

    Thread-safe as far as the callbacks are.
    """

    __slots__ = ("_guard", "_metadata", "_session_token", "_skip", "_suffix", "_who", "any")

    def __init__(self, settings: Settings, direction: Direction, guard: Guard) -> None:
        outgoing = direction == "Outgoing"
        self._guard = guard
        self._suffix = "_OUTGOING" if outgoing else ""
        self._skip = _Callback(settings.skip_outgoing if outgoing else settings.skip)
        user = _Callback(settings.identify_user_outgoing if outgoing else settings.identify_user)
        company = _Callback(settings.identify_company_outgoing if outgoing else settings.identify_company)
        self._who = (("user_id", "IDENTIFY_USER", user), ("company_id", "IDENTIFY_COMPANY", company))
        self._metadata = _Callback(settings.get_metadata_outgoing if outgoing else settings.get_metadata)
        self._session_token = _Callback(settings.get_session_token_outgoing if outgoing else settings.get_session_token)
        everything = (self._skip, self._metadata, self._session_token, *(callback for _, _, callback in self._who))
        self.any = any(callback.given for callback in everything)

    def run(self, exchange: Exchange) -> None:
        """Run what has not run yet and note the answers on the Exchange.

        A SKIP that raises does not skip. What `identify` said stands; GET_METADATA's mapping is merged under it.
        """
        arguments = exchange.callback_arguments
        if self._skip.given and self._call(self._skip, "SKIP", arguments):
            exchange.skipped = True
            return
        self.identify(exchange)
        if self._session_token.given and exchange.session_token is None:
            exchange.session_token = self._call(self._session_token, "GET_SESSION_TOKEN", arguments)
        if self._metadata.given:
            said = self._call(self._metadata, "GET_METADATA", arguments)
            if isinstance(said, Mapping) and exchange.metadata:
                exchange.metadata = {**said, **exchange.metadata}
            elif said is not None and not exchange.metadata:
                exchange.metadata = said

    def identify(self, exchange: Exchange) -> None:
        """Run IDENTIFY_USER and IDENTIFY_COMPANY unless they have run (a governance rule may need them early)."""
        if exchange.identified:
            return
        exchange.identified = True
        for field, name, callback in self._who:
            if callback.given and getattr(exchange, field) is None:
                arguments = exchange.callback_arguments
                more = exchange.identify_arguments
                if len(more) > len(arguments) and callback.accepts(len(more)):
                    arguments = more
                setattr(exchange, field, self._call(callback, name, arguments))

    def _call(self, callback: _Callback, name: str, arguments: tuple[Any, ...]) -> Any:
        try:
            return _not_a_coroutine(callback(*arguments))
        except _NotImportedError:
            self._guard.count(f"callback {name}{self._suffix}")  # it has been named in the log
            return None
        except Exception as exc:
            self._guard.caught(f"callback {name}{self._suffix}", exc)
            return None


class _NotImportedError(Exception):
    """A callback's import path leads nowhere."""


class _Callback:
    """One callback, or none; knows how many positional arguments it takes."""

    __slots__ = ("_function", "_positional", "_told", "given")

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self._function = function
        self._positional: float | None = None
        self._told = False
        self.given = function is not None

    def __call__(self, *arguments: Any) -> Any:
        if self._function is None:
            return None
        return self._resolved()(*arguments)

    def accepts(self, count: int) -> bool:
        """Whether it can be called with `count` positional arguments."""
        if self._positional is None:
            try:
                self._positional = _positional_limit(self._resolved())
            except (_NotImportedError, TypeError, ValueError):
                # No import, or a signature that cannot be read: the call itself will tell.
                return True
        return count <= self._positional

    def _resolved(self) -> Any:
        function = self._function
        if not isinstance(function, ImportedCallback):
            return function
        try:
            return function.resolve()
        except Exception as exc:
            if not self._told:
                self._told = True
                _logger.error(
                    "moesif_otel: callback %r cannot be imported (%s); calls are recorded without it",
                    function.path,
                    _words_of(exc),
                )
            raise _NotImportedError from exc


def _words_of(exc: Exception) -> str:
    """Say why an import failed: in the import system's words, or ours; a module of the user's may quote anything."""
    place = place_of(exc)
    if isinstance(exc, ModuleNotFoundError) and exc.name is not None:
        return f"no module named {exc.name!r}"
    return str(exc) if place.startswith("settings.py:") else f"{type(exc).__qualname__} at {place}"


def _not_a_coroutine(said: Any) -> Any:
    if inspect.iscoroutine(said):
        # Of a callback named by its import path, or of a lambda around a coroutine function: nobody awaits it.
        said.close()
        raise TypeError("a coroutine")
    return said


def _positional_limit(function: Any) -> float:
    count = 0
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            return math.inf
        if parameter.kind in {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD}:
            count += 1
    return count
