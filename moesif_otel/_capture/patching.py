"""The one way to put our functions around those of frameworks, servers and clients, and to take them away again.

A layer has exactly the name, module, signature, defaults and attributes of what it wraps, and is a coroutine function
where that is one: test clients and frameworks look at signatures, and callers pass any argument by name. Nothing is
imported for a patch: it is put on when its module is imported, or at once if it is.

Somebody may wrap the same attribute before or after us. Taking away restores what was there if our layer is outermost;
below another patch it stays, and whoever wrote it has it pass through while nobody captures.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from inspect import Parameter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import wrapt

from moesif_otel._guard import PROCESS_GUARD, ForkSafeLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


_PROXY: Final[type] = getattr(wrapt, "BaseObjectProxy", wrapt.ObjectProxy)  # the former since wrapt 2


class Patch(NamedTuple):
    """A method or function to be wrapped."""

    module: str
    attribute: str
    """`Class.method`, or the name of a function of the module."""
    around: Callable[..., Any]
    """Called in its place with the original (which takes the instance first) and the call's arguments.

    Its own parameters must be positional-only: the caller may use any name. Async where the original is.
    """


class _Layer(NamedTuple):
    """The function that a layer of ours replaced."""

    replaced: Any
    inherited: bool


_lock: Final = ForkSafeLock()


class PatchSet:
    """Patches that are put on at the first `hold` and taken away at the last `release`. Thread-safe."""

    __slots__ = ("__weakref__", "_holders", "_hooked", "_layers", "_patches")

    def __init__(self, patches: Iterable[Patch]) -> None:
        self._patches = tuple(patches)
        # Weak: a holder that was dropped without a word wants nothing any more.
        self._holders: weakref.WeakSet[Any] = weakref.WeakSet()
        # Kept in mind as long as the function lives: somebody may have saved it, and put it back when we are gone.
        self._layers: weakref.WeakKeyDictionary[types.FunctionType, _Layer] = weakref.WeakKeyDictionary()
        self._hooked: set[str] = set()

    def hold(self, holder: object) -> None:
        """Put the patches on for `holder`, each now or when its module is imported; twice is once.

        Raises:
            AttributeError: A module that is imported lacks what was to be patched; the other patches are on.
        """
        error: AttributeError | None = None
        with _lock.current:
            self._holders.add(holder)
            for patch in self._patches:
                if patch.module in sys.modules:
                    try:
                        self._put(patch)
                    except AttributeError as exc:
                        error = exc
        # Not under the lock: an import that is going on runs hooks in this thread.
        for module in {patch.module for patch in self._patches} - self._hooked:
            self._hooked.add(module)
            if module not in sys.modules:
                when_imported(module, functools.partial(_put_imported, weakref.ref(self), module))
        if error is not None:
            raise error

    def release(self, holder: object) -> None:
        """Want the patches no longer; the last one takes them away."""
        with _lock.current:
            self._holders.discard(holder)
            if not self._holders:
                self._take_away()

    def put_imported(self, module: str) -> None:
        """Put on what waits for a module, which is imported now, unless nobody holds the patches any more.

        Raises:
            AttributeError: The module lacks what was to be patched.
        """
        with _lock.current:
            if self._holders:
                for patch in self._patches:
                    if patch.module == module:
                        self._put(patch)

    def _put(self, patch: Patch) -> None:
        path, _, name = patch.attribute.rpartition(".")
        owner = getattr(sys.modules[patch.module], path) if path else sys.modules[patch.module]
        place = _Place(owner, name)
        if not any(self._layer_at(one) for one in _unwrapped(place.content)):
            place = place.below_proxies()
            place.fill(self._add_layer(place, place.content, patch.around))

    def _add_layer(self, place: _Place, replaced: Any, around: Callable[..., Any]) -> Any:
        layer = layer_around(replaced, around)
        below = getattr(replaced, "__wrapped__", None)
        if below is not None and isinstance(layer, types.FunctionType):
            # Somebody's patch is below, and whoever looks for it finds ours, which has its attributes: OpenTelemetry's
            # `uninstrument` puts `__wrapped__` back. So let that be ours around what the other patch wraps.
            layer.__wrapped__ = self._add_layer(place, below, around)  # type: ignore[attr-defined] # it takes any
        inherited = place.name != "__wrapped__" and place.name not in vars(place.owner)
        self._layers[_function_of(layer)] = _Layer(replaced, inherited)
        return layer

    def _layer_at(self, content: Any) -> _Layer | None:
        # A wrapper of another library (wrapt's) may be equal to the function that it wraps.
        function = _function_of(content)
        return self._layers.get(function) if type(function) is types.FunctionType else None

    def _take_away(self) -> None:
        for patch in self._patches:
            path, _, name = patch.attribute.rpartition(".")
            module = sys.modules.get(patch.module)
            owner = getattr(module, path, None) if path else module
            if owner is None or inspect.getattr_static(owner, name, None) is None:
                continue
            while (found := self._layer_at((place := _Place(owner, name).below_proxies()).content)) is not None:
                place.restore(found)


def _function_of(content: Any) -> Any:
    return content.__func__ if isinstance(content, (staticmethod, classmethod)) else content


class _Place(NamedTuple):
    """The place of a layer: an attribute of a class or module, or what a proxy of wrapt's wraps."""

    owner: Any
    name: str

    @property
    def content(self) -> Any:
        """The object there, not bound by any descriptor."""
        if self.name == "__wrapped__":
            return self.owner.__wrapped__
        return inspect.getattr_static(self.owner, self.name)

    def below_proxies(self) -> _Place:
        """Return the place inside of wrapt's proxies.

        Who takes such a proxy away puts back what it wraps (OpenTelemetry's `unwrap`), and finds it only outermost.
        """
        place = self
        while issubclass(type(content := place.content), _PROXY):
            place = _Place(content, "__wrapped__")
        return place

    def fill(self, function: Any) -> None:
        """Put something there."""
        setattr(self.owner, self.name, function)

    def restore(self, layer: _Layer) -> None:
        """Put back what a layer replaced."""
        if layer.inherited and self.name != "__wrapped__":
            delattr(self.owner, self.name)
        else:
            self.fill(layer.replaced)


def _put_imported(reference: weakref.ref[PatchSet], module: str) -> None:
    patches = reference()
    if patches is not None:
        patches.put_imported(module)


def _unwrapped(function: Any) -> Iterable[Any]:
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        yield function
        function = getattr(function, "__wrapped__", None)


def when_imported(module: str, run: Callable[[], None]) -> None:
    """Call `run` once a module is imported, at once if it is. What it raises is counted, never passed on."""

    def hook(_module: Any) -> None:
        PROCESS_GUARD.run(f"patching {module}", run)

    PROCESS_GUARD.run("registering an import hook", wrapt.register_post_import_hook, hook, module)


def layer_around(original: Any, around: Callable[..., Any]) -> Any:
    """Return what stands in the place of a function or method and calls `around(original, *arguments)`.

    Args:
        original: What stands in the class or module: a function, a static or class method, or any callable.
        around: See `Patch.around`; `original` takes what the layer was called with.
    """
    if isinstance(original, (staticmethod, classmethod)):
        return type(original)(layer_around(original.__func__, around))
    is_function = type(original) is types.FunctionType
    signature = _signature_of(original, takes_instance=not is_function)
    inner = original if is_function else functools.partial(_call_bound, original)
    layer = _compile(signature, is_async=inspect.iscoroutinefunction(original))(around, inner)
    functools.update_wrapper(layer, original)
    layer.__defaults__ = (
        tuple(
            p.default
            for p in signature.parameters.values()
            if p.default is not p.empty and p.kind is not Parameter.KEYWORD_ONLY
        )
        or None
    )
    layer.__kwdefaults__ = {
        p.name: p.default
        for p in signature.parameters.values()
        if p.default is not p.empty and p.kind is Parameter.KEYWORD_ONLY
    } or None
    return layer


def _call_bound(original: Any, instance: Any, /, *args: Any, **kwargs: Any) -> Any:
    # As attribute access would bind it: what stands there is somebody's wrapper, a mock, or compiled.
    if hasattr(original, "__get__"):
        original = original.__get__(instance, type(instance))
    return original(*args, **kwargs)


_ANYTHING: Final = inspect.Signature(
    [
        Parameter("self", Parameter.POSITIONAL_ONLY),
        Parameter("args", Parameter.VAR_POSITIONAL),
        Parameter("kwargs", Parameter.VAR_KEYWORD),
    ]
)


def _signature_of(original: Any, *, takes_instance: bool) -> inspect.Signature:
    try:
        signature = inspect.signature(original, follow_wrapped=False)
    except (TypeError, ValueError):
        return _ANYTHING
    if takes_instance and not hasattr(original, "__get__"):
        return _ANYTHING  # a mock: as an attribute of a class it is called without the instance
    return signature


# Functions of the same parameters share their code: a layer costs no compilation where one like it was made before.
@functools.lru_cache(maxsize=64)
def _factory(parameters: str, arguments: str, is_async: bool) -> Callable[..., Any]:
    source = (
        "def make(_moesif_otel_around, _moesif_otel_inner):\n"
        f"    {'async ' if is_async else ''}def layer({parameters}):\n"
        f"        return {'await ' if is_async else ''}_moesif_otel_around(_moesif_otel_inner, {arguments})\n"
        "    return layer\n"
    )
    namespace: dict[str, Any] = {}
    exec(compile(source, "<moesif_otel layer>", "exec"), namespace)  # noqa: S102 - made of parameter names alone
    made: Callable[..., Any] = namespace["make"]
    return made


def _compile(signature: inspect.Signature, *, is_async: bool) -> Callable[..., Any]:
    """Return what makes a function of exactly these parameters that passes its arguments on."""
    parameters: list[str] = []
    arguments: list[str] = []
    before: Any = None
    for parameter in signature.parameters.values():
        kind, name = parameter.kind, parameter.name
        if before is Parameter.POSITIONAL_ONLY and kind is not before:
            parameters.append("/")
        if kind is Parameter.KEYWORD_ONLY and before not in {Parameter.VAR_POSITIONAL, kind}:
            parameters.append("*")
        stars = "*" if kind is Parameter.VAR_POSITIONAL else "**" if kind is Parameter.VAR_KEYWORD else ""
        parameters.append(f"{stars}{name}{'' if parameter.default is Parameter.empty else '=None'}")
        arguments.append(f"{name}={name}" if kind is Parameter.KEYWORD_ONLY else f"{stars}{name}")
        before = kind
    if before is Parameter.POSITIONAL_ONLY:
        parameters.append("/")
    return _factory(", ".join(parameters), ", ".join(arguments), is_async)


class InstancePatches:
    """Functions put on single objects, in the way of their class's methods: no class and no other object is touched.

    Belongs to the thread or loop that works with the objects.
    """

    __slots__ = ("_put",)

    def __init__(self) -> None:
        self._put: list[tuple[Any, str, Any]] = []

    def put(self, owner: Any, name: str, function: Any) -> None:
        """Put a function on an object."""
        setattr(owner, name, function)
        self._put.append((owner, name, function))

    def take_away(self) -> None:
        """Take away what is still there, and forget the objects."""
        put, self._put = self._put, []
        for owner, name, function in put:
            if vars(owner).get(name) is function:
                delattr(owner, name)
