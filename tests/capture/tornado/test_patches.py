"""Tests of putting wrappers on and taking them away."""

from __future__ import annotations

from moesif_otel._capture.tornado.patches import Patch, PatchSet


class Holder:
    """Somebody who wants the patches."""


A, B = Holder(), Holder()


def make() -> tuple[type, PatchSet]:
    """Make a class with an inherited and a static method, and patches for both."""

    class Base:
        def name(self) -> str:
            return "base"

    class Owner(Base):
        @staticmethod
        def still() -> str:
            return "static"

    def louder(function):
        return lambda *args: function(*args).upper()

    def louder_static(raw):
        return staticmethod(louder(raw.__func__))

    return Owner, PatchSet([Patch(Owner, "name", louder), Patch(Owner, "still", louder_static)])


def test_the_last_holder_takes_everything_away():
    """Twice is once for a holder; inherited attributes are inherited again afterwards."""
    owner, patches = make()
    before = dict(vars(owner))
    patches.hold(A)
    patches.hold(A)
    patches.hold(B)
    assert (owner().name(), owner.still()) == ("BASE", "STATIC")
    patches.release(A)
    assert owner().name() == "BASE"
    patches.release(B)
    patches.release(B)
    assert dict(vars(owner)) == before


def test_a_layer_under_somebody_elses_stays_and_is_used_again():
    """What was put on after us is neither removed nor doubled."""
    owner, patches = make()
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


def test_a_holder_that_is_gone_holds_nothing():
    """A middleware that was dropped without `stop` does not keep the wrappers when the last other one stops."""
    owner, patches = make()
    patches.hold(Holder())
    patches.hold(A)
    patches.release(A)
    assert "name" not in vars(owner)
