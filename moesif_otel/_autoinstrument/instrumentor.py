"""The entry point for `opentelemetry-instrument` and configuration files.

It runs on the thread that starts the process. It never raises, since that would keep OpenTelemetry from loading the
other instrumentors, and it does not import delivery before that is needed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Final, get_type_hints

from opentelemetry.instrumentation.instrumentor import (  # type: ignore[attr-defined] # the module is untyped
    BaseInstrumentor,
)
from opentelemetry.util._importlib_metadata import entry_points

from moesif_otel._autoinstrument.instrument import Instrumentation, is_switched_off, read_settings
from moesif_otel._guard import PROCESS_GUARD, get_logger
from moesif_otel.settings import OPTIONS, Settings, warn_of_unknown

if TYPE_CHECKING:
    from collections.abc import Collection

_logger: Final = get_logger(__name__)


def _take_options(self: Any, **options: Any) -> None:
    """Set the options of a configuration file; an unknown one must not prevent the others."""
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
        "__doc__": "Every option by its name in lower case, from a configuration file; None if it is not set there.",
        "__init__": _take_options,
        "__module__": __name__,
    },
)


class MoesifInstrumentor(BaseInstrumentor):  # type: ignore[misc] # opentelemetry.instrumentation has partial types
    """Captures the calls of a process without a change to its code.

    Started by `opentelemetry-instrument` (options from the environment), or by `instrumentation/development` of a
    declarative configuration file (options from that file). `moesif_otel.instrument(settings)` does the same from code.
    It raises for wrong options; here they are logged, and the application starts.
    """

    configuration = MoesifOptions
    """The type of our options in a configuration file (package opentelemetry-configuration)."""

    _handle: Instrumentation | None = None

    def instrumentation_dependencies(self) -> Collection[str]:
        """Return no dependencies: patches wait for modules that may never be imported."""
        return ()

    def instrument(self, **kwargs: Any) -> None:
        """Begin to capture; never raises.

        Args:
            kwargs: Options in lower case; absent ones are read from the environment.
        """
        if self.is_instrumented_by_opentelemetry and self._handle is not None:
            return  # a configuration file has started it, and `opentelemetry-instrument` calls it again
        start = functools.partial(super().instrument, **kwargs)
        PROCESS_GUARD.run("starting the capture", start)

    def _instrument(self, **kwargs: Any) -> None:
        if is_switched_off():
            _logger.debug("moesif_otel: OTEL_SDK_DISABLED is true; no calls are captured")
            return
        settings = read_settings(kwargs)
        if settings is None:
            return
        if not tuple(entry_points(group="opentelemetry_configurator")):
            _logger.info(
                "moesif_otel: calls are captured, but no spans are made, because no OpenTelemetry distro is installed "
                "(if you also want OpenTelemetry's own exporters: pip install opentelemetry-distro)"
            )
        self._handle = Instrumentation(settings)
        self._handle.start()

    def _uninstrument(self, **kwargs: Any) -> None:
        del kwargs
        handle, self._handle = self._handle, None
        if handle is not None:
            PROCESS_GUARD.run("stopping the capture", handle.stop)
