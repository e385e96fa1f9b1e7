"""Merge tags are replaced wherever a rule can have text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesif_otel._remote.merge_tags import fill, has_tags

VALUES = {"0": "gold", "plan name": "big", "x": "{{0}}"}


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{{0}}", "gold"),
        ("a {{0}}{{0}} b", "a goldgold b"),
        ("{{plan name}}", "big"),
        ("{{missing}}", "UNKNOWN"),
        ("{{ 0 }}", "{{ 0 }}"),
        ("{{}}", "{{}}"),
        ("{0}", "{0}"),
        ("{{{0}}}", "{{{0}}}".replace("{{0}}", "gold")),
        ("{{x}}", "{{0}}"),
        ({"{{0}}": [{"k": ("{{0}}", 1)[0]}, 5, None, True]}, {"gold": [{"k": "gold"}, 5, None, True]}),
        (5, 5),
        (None, None),
    ],
)
def test_tags_are_replaced_in_keys_values_and_lists(template: Any, filled: Any) -> None:
    """At any depth; what was put in is not looked at again; other template languages are left alone."""
    assert fill(template, VALUES) == filled


@given(st.text(alphabet="{}0 ax", max_size=20))
def test_text_without_tags_stays(text: str) -> None:
    """Only `{{name}}` changes a text."""
    if not has_tags(text):
        assert fill(text, VALUES) == text
    assert isinstance(fill(text, VALUES), str)
