"""A Moesif of your own on this machine: for trying moesif_otel, and for asserting in tests what reaches Moesif."""

from __future__ import annotations

__all__ = ["Sandbox", "missing_package"]

_PACKAGES = frozenset(
    {"anyio", "click", "flask", "h11", "jinja2", "markupsafe", "starlette", "uvicorn", "waitress", "werkzeug"}
)


def missing_package(error: ModuleNotFoundError) -> ImportError | None:
    """Explain a failed import by the extra that brings the package; None where it is not one of those."""
    package = (error.name or "").partition(".")[0]
    if package not in _PACKAGES:
        return None
    # However moesif-otel was installed, the extra is asked for in the same way with brackets behind it.
    return ImportError(
        f"the package {package!r} is missing: install moesif-otel as you did, with its extra [sandbox] "
        '(in a clone: pip install ".[sandbox]"; a wheel: pip install "FILE.whl[sandbox]"; '
        'from Git: pip install "moesif-otel[sandbox] @ git+ADDRESS")',
        name=error.name,
    )


try:
    from moesif_otel.sandbox.server import Sandbox
except ModuleNotFoundError as error:
    explained = missing_package(error)
    if explained is None:
        raise
    raise explained from error
