"""The sandbox: a local stand-in for Moesif, to try moesif_otel, and to assert in tests what Moesif receives."""

from __future__ import annotations

from moesif_otel.errors import install_command

__all__ = ["Sandbox", "missing_package"]

_PACKAGES = frozenset(
    {"anyio", "click", "flask", "h11", "jinja2", "markupsafe", "starlette", "uvicorn", "waitress", "werkzeug"}
)


def missing_package(error: ModuleNotFoundError) -> ImportError | None:
    """Explain a failed import by the extra that brings the package; None where it is not one of those."""
    package = (error.name or "").partition(".")[0]
    if package not in _PACKAGES:
        return None
    return ImportError(f"the sandbox needs the package {package!r}; {install_command('sandbox')}", name=error.name)


try:
    from moesif_otel.sandbox.server import Sandbox
except ModuleNotFoundError as error:
    explained = missing_package(error)
    if explained is None:
        raise
    raise explained from error
