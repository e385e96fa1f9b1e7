"""A captured body as Moesif takes it: JSON as JSON, everything else as base64.

Pure functions, for any thread. Nothing is embedded that is no valid JSON, nothing larger than the bounds is made, and
bad data raises nothing.
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson

from moesif_otel._capture.body import LeftOut
from moesif_otel._events.codings import decode_content
from moesif_otel._events.json_check import is_embeddable
from moesif_otel._events.serialize import parsed_json
from moesif_otel._guard import LATE_IMPORTS
from moesif_otel._redaction.budget import MAX_DECODED_BYTES
from moesif_otel._redaction.charsets import utf8_of
from moesif_otel._redaction.media import Format, media_of

if TYPE_CHECKING:
    from moesif_otel._redaction.media import Media
    from moesif_otel._redaction.rules import Rules

# 450,000 characters of base64, so that two bodies and the rest stay under the server's 1 MB an event.
_MAX_BASE64_INPUT_BYTES: Final = 337_500
# Whitespace, the zeros of UTF-16 and UTF-32, byte order marks, the record separator of RFC 7464.
_BEFORE_JSON: Final = b" \t\r\n\0\x1e\xef\xbb\xbf\xff\xfe"
_BLANKS: Final = b" \t\r\n"
_OPENINGS: Final = frozenset({b"{", b"["})
_SURROGATES: Final = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)"
)


@dataclass(slots=True, repr=False)  # no body is ever shown; frozen costs three times as much to make
class Body:
    """A body, ready for an event.

    Attributes:
        value: An `orjson.Fragment` of valid JSON, parsed JSON where a mask will look at it, or base64 text; None when
            there is none.
        transfer_encoding: `json` or `base64`; None when there is no value.
        left_out: Why there is no value although there was a body.
        shortened: Whether the value is only the first part of the body.
    """

    value: Any
    transfer_encoding: str | None
    left_out: LeftOut | None
    shortened: bool = False


NO_BODY: Final = Body(None, None, None)


def read_body(
    data: bytes,
    content_type: str | None,
    content_encoding: str | None,
    *,
    truncated: bool,
    parse: bool,
    unread: bool = False,
    concerned: bool = True,
    rules: Rules | None = None,
) -> Body:
    """Return captured bytes as Moesif takes a body.

    Valid JSON objects and arrays are JSON whatever the Content-Type says, as in `moesifwsgi`; JSON scalars are where
    it says JSON and no mask will look (`'password' in 5` is an error). What is no JSON, or only the first part of it,
    or nested too deeply to be embedded, is base64 of the bytes with their Content-Encoding undone.

    Args:
        truncated: Whether `data` is only the first part of the body.
        unread: Whether more was announced than was seen: JSON that is complete is taken, anything else is a first part.
        concerned: False where a quick scan of `data` by `rules` has found nothing.
        parse: Return JSON as Python values (a mask or a rule will look at it) rather than as a fragment of text.
        rules: What to hide; None hides nothing.

    Returns:
        The body. Never raises; bounded by `moesif_otel._redaction.budget`. Thread-safe.
    """
    if not data:
        return NO_BODY
    media = media_of(content_type)
    clear, whole, readable = data, not truncated, True
    if content_encoding:
        clear, whole, readable = decode_content(
            data, content_encoding, truncated=truncated, max_bytes=MAX_DECODED_BYTES
        )
    if readable and whole:
        found = _as_json(clear, media, parse=parse, rules=rules, concerned=concerned or clear is not data)
        if found is not None:
            return found
    if rules is not None:
        if readable:
            with LATE_IMPORTS:
                from moesif_otel._redaction.bodies import redact_body

            hidden = redact_body(rules, clear, media, whole=whole and not unread)
            if isinstance(hidden, LeftOut):
                return Body(None, None, hidden)
            if clear and not hidden:
                return Body(None, None, LeftOut.NOT_MASKABLE)
            clear = hidden
        elif not rules.opaque_allowed:
            return Body(None, None, LeftOut.UNREADABLE)
    if not clear:
        return NO_BODY
    shortened = unread or not whole or len(clear) > _MAX_BASE64_INPUT_BYTES
    text = b2a_base64(clear[:_MAX_BASE64_INPUT_BYTES], newline=False).decode("ascii")
    return Body(text, "base64", None, shortened)


def is_plain_json(data: bytes, media: Media) -> bool:
    """Tell whether a whole body is JSON by its type, in UTF-8, an object or array, and can be embedded as it is."""
    return (
        media.format is Format.JSON
        and (media.charset is None or media.charset == "utf-8")
        and data[:1] in _OPENINGS
        and is_embeddable(data)
    )


def _as_json(data: bytes, media: Media, *, parse: bool, rules: Rules | None, concerned: bool) -> Body | None:
    if data[:1] in _OPENINGS and data[1:2] != b"\0" and (media.charset is None or media.charset == "utf-8"):
        text = data
    elif media.format is Format.JSON or data.lstrip(_BEFORE_JSON)[:1] in _OPENINGS:
        text = utf8_of(data, media.charset)
    else:
        return None
    if not is_embeddable(text):
        # Lone surrogates, which the standard library's `json.dumps` writes, are what orjson refuses and others take.
        if b"\\ud" not in text and b"\\uD" not in text:
            return None
        text = _SURROGATES.sub(lambda match: b"\\ufffd" if match[1] else match[0], text)
        if not is_embeddable(text):
            return None
    if (parse or media.format is not Format.JSON) and text.lstrip(_BLANKS)[:1] not in _OPENINGS:
        return None
    if rules is not None and rules.active and (concerned or text is not data) and rules.may_concern(text):
        # Late, as below: most bodies need no closer look, and its expressions take time to compile.
        with LATE_IMPORTS:
            from moesif_otel._redaction.bodies import redact_json_body

        hidden = redact_json_body(rules, text)
        if isinstance(hidden, LeftOut):
            return Body(None, None, hidden)
        text = hidden
    return Body(parsed_json(text) if parse else orjson.Fragment(text), "json", None)
