"""The entry point that `opentelemetry-instrument` and configuration files start us by.

Owns: `MoesifInstrumentor` and the type of its options.
Threads: the one that starts the process.
Never: raises (an instrumentor that does ends all later ones); imports what delivers before it is needed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Final, get_type_hints

from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined] # the module is untyped
    BaseInstrumentor,
)
from opentelemetry.util._importlib_metadata import entry_points

from moesif_otel._autoinstrument.instrument import Instrumentation
from moesif_otel._autoinstrument.settings import is_switched_off, read_settings
from moesif_otel._guard import PROCESS_GUARD, get_logger
from moesif_otel.settings import OPTIONS, Settings, warn_of_unknown

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["MoesifInstrumentor", "MoesifOptions"]

_logger: Final = get_logger(__name__)


def _take_options(self: Any, **options: Any) -> None:
    """Take options of a configuration file; an unknown one must not keep the others from working."""
    for option in OPTIONS.values():
        setattr(self, option.field_name, options.pop(option.field_name, None))
    for name in options:
        warn_of_unknown(str(name))


_HINTS: Final = get_type_hints(Settings)

MoesifOptions: Final = dataclasses.make_dataclass(
    "MoesifOptions",
    [
        (option.field_name, _HINTS[option.field_name] | None, dataclasses.field(default=None))
        for option in OPTIONS.values()
    ],
    init=False,
    repr=False,  # it holds the application id
    namespace={
        "__doc__": "Every option by its name in lower case, as a configuration file gives it; None: the environment's.",
        "__init__": _take_options,
        "__module__": __name__,
    },
)


class MoesifInstrumentor(BaseInstrumentor):  # type: ignore[misc] # opentelemetry.instrumentation has partial types
    """Captures the calls of a process that knows nothing of Moesif.

    Started by `opentelemetry-instrument` (options from the environment), or by `instrumentation/development` of a
    declarative configuration file (options from there). From code, `moesif_otel.instrument(settings)` is the same and
    raises for wrong options; here they are logged, and the application starts.
    """

    configuration = MoesifOptions
    """The type of our options in a configuration file (package opentelemetry-configuration)."""

    _handle: Instrumentation | None = None

    def instrumentation_dependencies(self) -> Collection[str]:
        """Need nothing: rows wait for modules that may never be imported."""
        return ()

    def instrument(self, **kwargs: Any) -> None:
        """Begin to capture; never raises.

        Args:
            kwargs: Options in lower case; absent ones are read from the environment.
        """
        if self.is_instrumented_by_opentelemetry and self._handle is not None:
            return  # a configuration file has done it, and `opentelemetry-instrument` comes by once more
        start = functools.partial(super().instrument, **kwargs)
        PROCESS_GUARD.run("starting the zero-code capture", start)

    def _instrument(self, **kwargs: Any) -> None:
        if is_switched_off():
            _logger.debug("moesif_otel: OTEL_SDK_DISABLED is true; no calls are captured")
            return
        settings = read_settings(kwargs)
        if settings is None:
            return
        if not tuple(entry_points(group="opentelemetry_configurator")):
            _logger.info(
                "moesif_otel: no OpenTelemetry distro is installed: calls are captured, no spans are made "
                "(pip install opentelemetry-distro, for a pipeline beside Moesif)"
            )
        self._handle = Instrumentation(settings)
        self._handle.start()

    def _uninstrument(self, **kwargs: Any) -> None:
        del kwargs
        handle, self._handle = self._handle, None
        if handle is not None:
            PROCESS_GUARD.run("stopping the zero-code capture", handle.stop)
