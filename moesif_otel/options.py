"""The kinds of value an option can have: how each is read from Python and from text.

Owns: reading and checking of single values, import paths of callbacks.
Threads: any; all values are immutable but `ImportedCallback`, whose one-time import is idempotent.
Never: quotes a value of an option that may hold a secret.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Callback", "Directory", "Flag", "ImportedCallback", "Integer", "Kind", "Names", "Seconds", "Text", "Uri"]

_TRUE: Final = frozenset({"1", "true", "yes", "on"})
_FALSE: Final = frozenset({"0", "false", "no", "off"})


class Kind(Protocol):
    """How one kind of option is read; both readers raise `ValueError` or `TypeError` for what they do not take."""

    @property
    def takes(self) -> str:
        """What the option takes, in words for an error message."""
        ...

    def read(self, value: Any) -> Any:
        """Check a Python value."""
        ...

    def read_text(self, text: str) -> Any:
        """Read the text of an environment variable."""
        ...


@dataclass(frozen=True)
class Text:
    """A string that is not empty."""

    takes: str = "a string that is not empty"

    def read(self, value: Any) -> str:
        """Check that it is a string with something in it."""
        if not isinstance(value, str):
            raise TypeError
        if not value.strip():
            raise ValueError
        return value.strip()

    def read_text(self, text: str) -> str:
        """Read it as it stands."""
        return self.read(text)


@dataclass(frozen=True)
class Flag:
    """True or false."""

    takes: str = "True or False"

    def read(self, value: Any) -> bool:
        """Check that it is a bool (0 and 1 are not: a typing error there is likelier than intent)."""
        if not isinstance(value, bool):
            raise TypeError
        return value

    def read_text(self, text: str) -> bool:
        """Read 1, true, yes, on, 0, false, no or off in any case."""
        word = text.strip().lower()
        if word in _TRUE:
            return True
        if word in _FALSE:
            return False
        raise ValueError


@dataclass(frozen=True)
class Integer:
    """A whole number in a range, both ends included."""

    low: int
    high: int
    unit: str = ""

    @property
    def takes(self) -> str:
        """The range in words."""
        return f"a whole number{' of ' + self.unit if self.unit else ''} from {self.low} to {self.high}"

    def read(self, value: Any) -> int:
        """Check type and range."""
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError
        if not self.low <= value <= self.high:
            raise ValueError
        return value

    def read_text(self, text: str) -> int:
        """Read decimal digits; underscores may group them."""
        return self.read(int(text))


@dataclass(frozen=True)
class Seconds:
    """A time in seconds."""

    low: float
    high: float

    @property
    def takes(self) -> str:
        """The range in words."""
        return f"a number of seconds from {self.low:g} to {self.high:g}"

    def read(self, value: Any) -> float:
        """Check type and range; NaN and infinities are out of range."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError
        if not math.isfinite(value) or not self.low <= value <= self.high:
            raise ValueError
        return float(value)

    def read_text(self, text: str) -> float:
        """Read a decimal number."""
        return self.read(float(text))


@dataclass(frozen=True)
class Names:
    """Names: a list of strings, or one string with commas between them; kept in order, empty ones left out."""

    takes: str = "a list of names, or a string of names with commas between them"
    required: bool = False

    def read(self, value: Any) -> tuple[str, ...]:
        """Check each name."""
        if isinstance(value, str):
            value = value.split(",")
        if not isinstance(value, (list, tuple, set, frozenset)):
            raise TypeError
        if not all(isinstance(name, str) for name in value):
            raise TypeError
        names = tuple(name.strip() for name in value if name.strip())
        if self.required and not names:
            raise ValueError
        return names

    def read_text(self, text: str) -> tuple[str, ...]:
        """Read names with commas between them."""
        return self.read(text)


@dataclass(frozen=True)
class Uri:
    """An http or https address; a trailing slash is taken off, a path prefix is kept."""

    takes: str = "an address that begins with http:// or https://, such as https://api.moesif.net"

    def read(self, value: Any) -> str:
        """Check scheme and host."""
        if not isinstance(value, str):
            raise TypeError
        text = value.strip()
        parts = urlsplit(text)
        if parts.scheme.lower() not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
            raise ValueError
        _ = parts.port  # raises ValueError when it is no number
        return text.rstrip("/")

    def read_text(self, text: str) -> str:
        """Read it as it stands."""
        return self.read(text)


@dataclass(frozen=True)
class Directory:
    """A folder; it need not exist yet."""

    takes: str = "the path of a folder"

    def read(self, value: Any) -> str:
        """Check the type and make the path absolute, so that a later chdir of the application changes nothing."""
        text = os.fspath(value)
        if not isinstance(text, str):
            raise TypeError
        if not text.strip() or "\0" in text:
            raise ValueError
        return os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111 - a string is what callers need

    def read_text(self, text: str) -> str:
        """Read it as it stands."""
        return self.read(text)


@dataclass(frozen=True)
class Callback:
    """A function of the user's; as text `package.module:function`."""

    takes: str = "a callable (no coroutine function), or as text an import path such as myapp.hooks:function"

    def read(self, value: Any) -> Callable[..., Any]:
        """Check that it can be called; text is taken as an import path."""
        if isinstance(value, str):
            return self.read_text(value)
        # A coroutine function would return an object that nobody awaits: an identity or a skip lost in silence.
        if not callable(value) or inspect.iscoroutinefunction(value):
            raise TypeError
        found: Callable[..., Any] = value
        return found

    def read_text(self, text: str) -> Callable[..., Any]:
        """Note the import path; its module is imported when the callback is first needed, not before the app."""
        return ImportedCallback(text.strip())


class ImportedCallback:
    """A callback named by its import path, imported at its first call.

    Args:
        path: `package.module:attribute`, absolute; the attribute may be dotted.

    Raises:
        ValueError: The path is relative or has another form.
    """

    __slots__ = ("_function", "path")

    def __init__(self, path: str) -> None:
        module, colon, attribute = path.partition(":")
        words = [*module.split("."), *attribute.split(".")]
        if not colon or not all(word.isidentifier() for word in words):
            raise ValueError
        self.path = path
        self._function: Callable[..., Any] | None = None

    def resolve(self) -> Callable[..., Any]:
        """Import the callback.

        Raises:
            ImportError: The module or the attribute is not there; the message names the path.
            TypeError: What is there cannot be called; the message names the path.
        """
        function = self._function
        if function is None:
            module, _, attribute = self.path.partition(":")
            found: Any = importlib.import_module(module)
            for name in attribute.split("."):
                try:
                    found = getattr(found, name)
                except AttributeError:
                    raise ImportError(f"callback {self.path!r}: {name!r} is not in it") from None
            if not callable(found):
                raise TypeError(f"callback {self.path!r} is not callable")
            function = self._function = found
        return function

    def __call__(self, *arguments: Any) -> Any:
        """Call the callback, importing it at the first call."""
        return self.resolve()(*arguments)

    def __repr__(self) -> str:
        return f"ImportedCallback({self.path!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImportedCallback) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)
