"""The event as masks see it: `moesifapi`'s model with the fields that it lacks.

Made of the dict that `build` builds, and turned into such a dict again, only where there is a MASK_EVENT_MODEL.
"""

from __future__ import annotations

from typing import Any, Final

from moesifapi.models import EventModel, EventRequestModel, EventResponseModel

from moesif_otel._events.serialize import as_mapping, text_of

_IDS: Final = ("user_id", "company_id", "session_token", "transaction_id", "trace_id")
_FIELDS: Final = (
    *("tags", "subscription_id", "metadata", "direction", "weight", "blocked_by", "span", "action_name"),
    *_IDS,
)
_REQUEST_FIELDS: Final = ("time", "uri", "verb", "headers", "api_version", "ip_address", "body", "transfer_encoding")
_RESPONSE_FIELDS: Final = ("time", "status", "headers", "ip_address", "body", "transfer_encoding")


class MoesifEvent(EventModel):  # type: ignore[misc] # moesifapi has no type information
    """One API call as Moesif takes it (`POST /v1/events`), with the OpenTelemetry fields of its documentation.

    Attributes beyond `EventModel`'s:
        trace_id: Trace id, 32 hexadecimal digits.
        span: `{"id": …, "parent_id": …, "links": […], "status": …}`; absent ones left out.
        subscription_id: Moesif's id of the subscription.
        action_name: Name of a user action.
    """

    def __init__(self, event: dict[str, Any]) -> None:
        super().__init__(transaction_id="")  # the server deduplicates by it: never drawn at random
        for name in _FIELDS:
            setattr(self, name, event.get(name))
        request, response = event.get("request"), event.get("response")
        self.request = None if request is None else EventRequestModel(**request)
        self.response = None if response is None else EventResponseModel(**response)

    @classmethod
    def from_dictionary(cls, dictionary: dict[str, Any] | None) -> MoesifEvent | None:
        """Return the event that a dict describes, as `EventModel` does."""
        return None if dictionary is None else cls(dictionary)

    def to_dictionary(self) -> dict[str, Any]:
        """Return the event as Moesif takes it, with nothing that is None."""
        return as_dictionary(self)


def as_dictionary(event: EventModel) -> dict[str, Any]:
    """Return any `EventModel` (a mask may have made its own) as a dict with nothing that is None.

    Metadata becomes an object and ids become text, whatever the mask has put there.
    """
    found: dict[str, Any] = {}
    request, response = getattr(event, "request", None), getattr(event, "response", None)
    if request is not None:
        found["request"] = _part(request, _REQUEST_FIELDS)
    if response is not None:
        found["response"] = _part(response, _RESPONSE_FIELDS)
    values = event.__dict__
    for name in _FIELDS:
        value = values.get(name)
        if value is not None:
            found[name] = text_of(value) if name in _IDS else value
    if "metadata" in found and not isinstance(found["metadata"], dict):
        found["metadata"] = as_mapping(found["metadata"])
    return found


def _part(model: Any, names: tuple[str, ...]) -> Any:
    if isinstance(model, dict):
        return {name: value for name, value in model.items() if value is not None}
    values = model.__dict__
    return {name: value for name in names if (value := values.get(name)) is not None}


def show_absent_bodies(event: EventModel) -> None:
    """Put `{}` where there is no body, so that `'password' in event.response.body` works on every call.

    An event without a response gets an empty one for as long as the mask looks at it. Undone by `hide_absent_bodies`.
    """
    if event.response is None:
        event.response = EventResponseModel(headers={})
    for part in (event.request, event.response):
        if part is not None and part.body is None:
            part.body = {}
            # A real `{}` from the wire is marked "json"; without a mark it is ours.
            part.transfer_encoding = None
        if part is not None and part.headers is None:
            part.headers = {}


def hide_absent_bodies(event: EventModel) -> None:
    """Take away what `show_absent_bodies` put there, unless the mask filled it."""
    for part in (event.request, event.response):
        if part is not None and part.body == {} and part.transfer_encoding is None:
            part.body = None
    response = event.response
    if response is not None and response.status is None and response.body is None:
        event.response = None
