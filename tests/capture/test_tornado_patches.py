"""Tests of putting wrappers on and taking them away."""

from __future__ import annotations

from moesif_otel.capture.tornado_patches import Patch, PatchSet


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
    patches.hold("a")
    patches.hold("a")
    patches.hold("b")
    assert (owner().name(), owner.still()) == ("BASE", "STATIC")
    patches.release("a")
    assert owner().name() == "BASE"
    patches.release("b")
    patches.release("b")
    assert dict(vars(owner)) == before


def test_a_layer_under_somebody_elses_stays_and_is_used_again():
    """What was put on after us is neither removed nor doubled."""
    owner, patches = make()
    patches.hold("a")
    ours = owner.name
    owner.name = lambda self: ours(self) + "!"
    theirs = owner.name
    patches.release("a")
    assert owner.name is theirs
    patches.hold("a")
    assert owner().name() == "BASE!"
    owner.name = ours
    patches.release("a")
    assert "name" not in vars(owner)
