"""A Moesif of your own on this machine: for trying moesif_otel, and for asserting in tests what reaches Moesif."""

from __future__ import annotations

try:
    from moesif_otel.sandbox.server import Sandbox
except ModuleNotFoundError as error:
    _package = (error.name or "").partition(".")[0]
    if _package not in {"starlette", "uvicorn", "anyio", "h11", "click"}:
        raise
    raise ImportError(
        f"moesif_otel.sandbox needs the package {_package!r}; pip install 'moesif-otel[sandbox]'", name=error.name
    ) from error

__all__ = ["Sandbox"]
