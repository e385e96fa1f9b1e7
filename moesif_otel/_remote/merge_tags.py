"""Merge tags: `{{name}}` in a rule's headers and body, replaced by the values of a cohort entry.

Owns: finding tags and replacing them, at any depth, in keys and values.
Threads: any; pure.
Never: looks for tags in what it has put in; changes what it was given.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["UNKNOWN", "fill", "has_tags"]

UNKNOWN: Final = "UNKNOWN"
"""What a tag without a value becomes (Moesif's API documentation)."""

# No spaces around the name: `{{ name }}` is somebody else's template language.
_TAG: Final = re.compile(r"\{\{([^{}\s](?:[^{}]*[^{}\s])?)\}\}")


def has_tags(value: Any) -> bool:
    """Say whether there is a tag in a JSON value, keys included."""
    if isinstance(value, str):
        return "{{" in value
    if isinstance(value, dict):
        return any(has_tags(key) or has_tags(item) for key, item in value.items())
    if isinstance(value, list):
        return any(has_tags(item) for item in value)
    return False


def fill(value: Any, values: Mapping[str, str]) -> Any:
    """Give a JSON value with every tag replaced.

    Args:
        value: What a rule holds; nesting is bounded by the JSON parser that read it.
        values: Text by name; a name that is not there becomes `UNKNOWN`.
    """
    if isinstance(value, str):
        if "{{" not in value:
            return value
        return _TAG.sub(lambda tag: values.get(tag.group(1), UNKNOWN), value)
    if isinstance(value, dict):
        return {fill(key, values): fill(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, values) for item in value]
    return value
