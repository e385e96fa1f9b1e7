"""Wrapped attributes of Tornado's classes and of single objects, put on and taken away as a whole.

Owns: `Patch` and `PatchSet` for classes, `Hooks` for the objects of one request.
Threads: any; a set is put on and taken away under its lock. Hooks are the event loop's.
Never: takes away what somebody else put on after us.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Hooks", "Patch", "PatchSet"]


class Patch:
    """One wrapped attribute of a class.

    Args:
        owner: The class.
        name: The attribute's name.
        wrap: Makes the wrapper of what is there; the wrapper passes through when nobody wants it.
    """

    __slots__ = ("_inherited", "_layer", "_name", "_owner", "_raw", "_wrap")

    def __init__(self, owner: type, name: str, wrap: Callable[[Any], Any]) -> None:
        self._owner = owner
        self._name = name
        self._wrap = wrap
        self._layer: Any = None
        self._raw: Any = None
        self._inherited = False

    def put(self) -> None:
        """Wrap the attribute, unless our layer is still there under somebody else's."""
        if self._layer is not None:
            return
        self._raw = inspect.getattr_static(self._owner, self._name)
        self._inherited = self._name not in vars(self._owner)
        self._layer = self._wrap(self._raw)
        setattr(self._owner, self._name, self._layer)

    def take_away(self) -> None:
        """Restore the attribute; where somebody wrapped it after us, our layer stays and passes through."""
        if self._layer is None or vars(self._owner).get(self._name) is not self._layer:
            return
        if self._inherited:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._raw)
        self._layer = self._raw = None


class PatchSet:
    """Patches that are there as long as somebody holds them.

    Args:
        patches: What to put on at the first `hold` and take away at the last `release`.
    """

    __slots__ = ("_holders", "_lock", "_patches")

    def __init__(self, patches: Sequence[Patch]) -> None:
        self._patches = tuple(patches)
        # Weak: a holder that is gone without a word wants nothing any more.
        self._holders: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()

    def hold(self, holder: object) -> None:
        """Put the patches on for `holder`; twice is once."""
        with self._lock:
            for patch in self._patches:
                patch.put()
            self._holders.add(holder)

    def release(self, holder: object) -> None:
        """Let go; the last one takes the patches away."""
        with self._lock:
            self._holders.discard(holder)
            if not self._holders:
                for patch in self._patches:
                    patch.take_away()


class Hooks:
    """Functions put on single objects, in the way of their class's methods: no other object and no class is touched."""

    __slots__ = ("_put",)

    def __init__(self) -> None:
        self._put: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, function: Any) -> None:
        """Put a function on an object."""
        setattr(owner, name, function)
        self._put.append((owner, name, function))

    def take_away(self) -> None:
        """Take away what is still there, and let go of the objects."""
        hooks, self._put = self._put, []
        for owner, name, function in hooks:
            if vars(owner).get(name) is function:
                delattr(owner, name)
