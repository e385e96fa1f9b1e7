"""Tests of putting layers on and taking them away, and of how a layer looks to everybody else."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import pickle
import sys
import types
from typing import Any
from unittest import mock

import pytest
import wrapt
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.instrumentation.utils import unwrap

from moesif_otel._capture.patching import InstancePatches, Patch, PatchSet, layer_around, when_imported

_DEFAULT = object()


def same(inner, /, *args, **kwargs):
    return inner(*args, **kwargs)


async def same_later(inner, /, *args, **kwargs):
    return await inner(*args, **kwargs)


class Holder:
    """Somebody who wants the patches."""


A, B = Holder(), Holder()


@pytest.fixture
def made(monkeypatch):
    """Make a module with a class that has an inherited and a static method, and patches for both."""

    class Base:
        def name(self) -> str:
            return "base"

    class Owner(Base):
        @staticmethod
        def still() -> str:
            return "static"

    def louder(inner, *args):
        return inner(*args).upper()

    module = types.ModuleType("moesif_test_module")
    module.Owner = Owner
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Owner, PatchSet([Patch(module.__name__, "Owner.name", louder), Patch(module.__name__, "Owner.still", louder)])


def test_the_last_holder_takes_everything_away(made):
    """Twice is once for a holder; inherited attributes are inherited again afterwards."""
    owner, patches = made
    before = dict(vars(owner))
    patches.hold(A)
    patches.hold(A)
    patches.hold(B)
    assert (owner().name(), owner.still(), owner().still()) == ("BASE", "STATIC", "STATIC")
    patches.release(A)
    assert owner().name() == "BASE"
    patches.release(B)
    patches.release(B)
    assert dict(vars(owner)) == before
    gc.collect()
    assert not patches._layers


def test_a_layer_under_somebody_elses_stays_and_is_used_again(made):
    """What was put on after us is not removed; ours works again below it, and goes when it is outermost again."""
    owner, patches = made
    patches.hold(A)
    ours = owner.name
    owner.name = lambda self: ours(self) + "!"
    theirs = owner.name
    patches.release(A)
    assert owner.name is theirs
    patches.hold(A)
    assert owner().name() == "BASE!"
    owner.name = ours
    patches.release(A)
    assert "name" not in vars(owner)


def test_a_layer_that_somebody_took_away_is_put_on_again(made):
    """A test that puts the original back, over us, does not end the capture for good."""
    owner, patches = made
    patches.hold(A)
    del owner.name
    patches.hold(A)
    assert owner().name() == "BASE"
    patches.release(A)
    assert "name" not in vars(owner)


def test_a_holder_that_is_gone_holds_nothing(made):
    """A middleware that was dropped without `stop` does not keep the layers when the last other one stops."""
    owner, patches = made
    patches.hold(Holder())
    gc.collect()
    patches.hold(A)
    patches.release(A)
    assert "name" not in vars(owner)


def test_who_undoes_a_patch_below_ours_leaves_ours(made):
    """OpenTelemetry's `uninstrument` looks for its flag and puts `__wrapped__` back; both are found on our layer."""
    owner, patches = made
    original = owner.name

    def theirs(self):
        return original(self) + " theirs"

    functools.update_wrapper(theirs, original).flag = True
    owner.name = theirs
    patches.hold(A)
    assert (owner().name(), owner.name.flag) == ("BASE THEIRS", True)
    owner.name = owner.name.__wrapped__
    assert owner().name() == "BASE"
    assert not hasattr(owner.name, "flag")
    patches.release(A)
    assert owner.name is original


@pytest.mark.parametrize("undone_first", ["theirs", "ours"])
def test_a_proxy_of_wrapts_stays_outermost(made, undone_first):
    """OpenTelemetry's `unwrap` takes away its proxy only where that is outermost; ours stands inside and stays."""
    owner, patches = made
    original = owner.name
    wrapt.wrap_function_wrapper(owner, "name", lambda wrapped, _, args, kwargs: wrapped(*args, **kwargs) + " theirs")
    theirs = vars(owner)["name"]
    patches.hold(A)
    assert (owner().name(), vars(owner)["name"]) == ("BASE theirs", theirs)
    if undone_first == "theirs":
        unwrap(owner, "name")
        assert owner().name() == "BASE"
        patches.release(A)
    else:
        patches.release(A)
        assert owner().name() == "base theirs"
        unwrap(owner, "name")
    assert owner.name is original


def test_nothing_is_imported_for_a_patch(monkeypatch):
    """It is put on when its module is imported, if somebody still wants it then."""
    name = "colorsys"
    monkeypatch.delitem(sys.modules, name, raising=False)
    seen = []

    def noted(inner, *args, **kwargs):
        seen.append(args)
        return inner(*args, **kwargs)

    patches = PatchSet([Patch(name, "rgb_to_yiq", noted)])
    patches.hold(A)
    assert name not in sys.modules
    import colorsys

    layer = colorsys.rgb_to_yiq
    colorsys.rgb_to_yiq(0, 0, 0)
    patches.release(A)
    assert seen == [(0, 0, 0)]
    assert colorsys.rgb_to_yiq is layer.__wrapped__
    monkeypatch.delitem(sys.modules, name)
    import colorsys as again

    assert not hasattr(again.rgb_to_yiq, "__wrapped__")


def test_a_place_that_is_gone_is_named_and_the_others_are_patched(made):
    """The caller's guard takes the error."""
    owner, _ = made
    patches = PatchSet([Patch("moesif_test_module", "Gone.name", same), Patch("moesif_test_module", "Owner.name", same)])
    with pytest.raises(AttributeError, match="Gone"):
        patches.hold(A)
    assert hasattr(owner.name, "__wrapped__")
    patches.release(A)
    assert "name" not in vars(owner)


def test_an_error_in_an_import_hook_reaches_nobody(caplog):
    """It is logged; the import goes on."""
    when_imported("json", lambda: 1 / 0)
    assert "patching json" in caplog.text


# How a layer looks.


def plain(a, b=_DEFAULT, *, c: int = 3) -> str:
    """Say something."""
    return f"{a} {b is _DEFAULT} {c}"


def mixed(a, /, b, *args, c, d=_DEFAULT, **kwargs):
    return (a, b, args, c, d, kwargs)


def _only_keywords(*, session=None, self=None, inner=None, around=None):
    return (session, self, inner, around)


async def coroutine(a, b=1):
    return (a, b)


plain.attribute = "kept"


@pytest.mark.parametrize("function", [plain, mixed, _only_keywords, coroutine, lambda environ, start_response: None])
def test_a_layer_looks_as_what_it_wraps(function):
    """To `inspect`, `getfullargspec`, `functools.wraps` users, and to those who read `__code__`."""
    layer = layer_around(function, same_later if inspect.iscoroutinefunction(function) else same)
    assert inspect.signature(layer) == inspect.signature(layer, follow_wrapped=False) == inspect.signature(function)
    assert inspect.getfullargspec(layer) == inspect.getfullargspec(function)
    assert inspect.iscoroutinefunction(layer) == inspect.iscoroutinefunction(function)
    for name in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__", "__defaults__", "__kwdefaults__"):
        assert getattr(layer, name) == getattr(function, name)
    for name in ("co_argcount", "co_posonlyargcount", "co_kwonlyargcount"):
        assert getattr(layer.__code__, name) == getattr(function.__code__, name)
    assert {**vars(layer)} == {**vars(function), "__wrapped__": function}

    @functools.wraps(layer)
    def somebodys():
        """Wrap."""

    assert inspect.signature(somebodys) == inspect.signature(function)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((1,), {}), ((1, 2), {"c": 3}), ((), {"a": 1, "b": 2}), ((), {}), ((1, 2, 3), {}), ((1,), {"inner": 2})],
)
@pytest.mark.parametrize("function", [plain, mixed, _only_keywords])
def test_a_call_does_what_it_did(function, args, kwargs):
    """The same result, or the same `TypeError` word for word."""

    def outcome(call):
        try:
            return call(*args, **kwargs)
        except TypeError as exc:
            return str(exc)

    assert outcome(layer_around(function, same)) == outcome(function)


@given(st.lists(st.sampled_from(["session", "self", "inner", "around", "original", "args", "request"]), unique=True))
def test_any_name_may_be_passed(names):
    """No parameter of ours is in the way of the caller's keywords."""

    def send(*args: Any, **kwargs: Any):
        return args, kwargs

    given_names = dict.fromkeys(names, 1)

    def around(inner, /, *args, **kwargs):
        return inner(*args, **kwargs)

    assert layer_around(send, around)(2, **given_names) == ((2,), given_names)


def test_coroutines_are_awaited_in_the_layer():
    """An async function stays one, and its layer ends when it does."""
    assert asyncio.run(layer_around(coroutine, same_later)(1, b=2)) == (1, 2)


def test_what_stands_there_need_not_be_a_function():
    """A wrapper of wrapt's is bound as attribute access would bind it; a mock is called without the instance."""
    instances = []

    class Owner:
        def method(self, a):
            return (self, a)

    def noted(wrapped, instance, args, kwargs):
        instances.append(instance)
        return wrapped(*args, **kwargs)

    Owner.method = wrapt.FunctionWrapper(Owner.__dict__["method"], noted)
    Owner.mocked = mock.Mock(return_value=5)
    method, mocked = (layer_around(inspect.getattr_static(Owner, name), same) for name in ("method", "mocked"))
    theirs = Owner.mocked
    Owner.method, Owner.mocked = method, mocked
    owner = Owner()
    assert owner.method(a=1) == (owner, 1)
    assert instances == [owner]
    assert owner.mocked(1, self=2) == 5
    theirs.assert_called_once_with(1, self=2)
    assert inspect.getfullargspec(Owner.method).args == ["self", "a"]


class Pickled:
    def method(self):
        return "pickled"


def test_a_method_is_pickled_by_its_name():
    """As before: bound methods go to other processes."""
    original = Pickled.method
    Pickled.method = layer_around(original, same)
    try:
        assert pickle.loads(pickle.dumps(Pickled().method))() == "pickled"
    finally:
        Pickled.method = original


def test_functions_on_one_object():
    """They go when nobody has replaced them, and no other object is touched."""
    one, other = Holder(), Holder()
    patches = InstancePatches()
    patches.put(one, "name", lambda: "ours")
    patches.put(other, "name", lambda: "ours")
    other.name = "theirs"
    patches.take_away()
    patches.take_away()
    assert (vars(one), vars(other)) == ({}, {"name": "theirs"})
