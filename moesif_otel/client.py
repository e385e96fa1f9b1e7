"""Users, companies, subscriptions and actions: what an application tells Moesif besides its calls.

Owns: `MoesifClient` (synchronous, raises) and `ProfileCalls` (the same calls on the middlewares: failures are logged
and counted); splitting of batches and what becomes of a batch that was taken in part.
Threads: any; the caller's own thread makes the POST, but with `wait=False`.
Never: sends anything before all of it has been checked; raises a delivery failure into a middleware's user.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from moesif_otel._delivery.client import MoesifTransport
from moesif_otel._delivery.outcome import Answer, Outcome
from moesif_otel._delivery.profile_fields import (
    ACTION,
    COMPANY,
    SUBSCRIPTION,
    USER,
    ProfileKind,
    encode_batch,
    encode_one,
    pieces,
)
from moesif_otel.errors import MoesifDeliveryError
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

    from moesif_otel._guard import Guard

__all__ = ["MoesifClient", "ProfileCalls", "ProfileSender"]

_logger: Final = logging.getLogger(__name__)

_MAX_BATCH_ITEMS: Final = 1_000
# Moesif takes 50 MB; proxies on the way, and clients' own documentation, say far less.
_MAX_BATCH_BYTES: Final = 5 * 1024 * 1024
_MAX_LEFT_OVER_NAMED: Final = 20


class _Transport(Protocol):
    def post_json(self, path: str, body: bytes, timeout_s: float) -> Answer: ...

    def close(self) -> None: ...


class _Post(NamedTuple):
    """One POST to make: `indexes` are those of its items in the user's batch."""

    path: str
    payloads: Sequence[bytes]
    indexes: range

    @property
    def body(self) -> bytes:
        """The JSON to send: one object, or an array of them on a batch's path."""
        if self.path.endswith("/batch"):
            return b"[%s]" % b",".join(self.payloads)
        return self.payloads[0]


def _posts(kind: ProfileKind, argument: Any, *, batch: bool) -> list[_Post]:
    """Check everything and plan the POSTs. Raises ValueError."""
    payloads = encode_batch(kind, argument) if batch else [encode_one(kind, argument)]
    for index, payload in enumerate(payloads):
        if len(payload) + 2 > _MAX_BATCH_BYTES:
            place = f"{kind.plural}[{index}]" if batch else kind.singular
            raise ValueError(f"{place}: {len(payload):,} bytes of JSON, takes at most {_MAX_BATCH_BYTES - 2:,}")
    path = kind.path + "/batch" if batch else kind.path
    return [
        _Post(path, payloads[piece.start : piece.stop], piece)
        for piece in pieces(payloads, _MAX_BATCH_ITEMS, _MAX_BATCH_BYTES)
    ]


class ProfileSender:
    """Makes the POSTs of one call, in order.

    Args:
        transport: Makes one POST.
        timeout_s: Seconds that one POST may take.

    Thread-safe.
    """

    __slots__ = ("_timeout_s", "_transport")

    def __init__(self, transport: _Transport, timeout_s: float) -> None:
        self._transport = transport
        self._timeout_s = timeout_s

    def send(self, kind: ProfileKind, posts: Sequence[_Post]) -> None:
        """Send everything, once.

        A piece that Moesif refuses does not keep the others from being sent; when Moesif cannot be reached or refuses
        the application id, the rest is not tried. Everything here is an upsert that merges (actions excepted), so the
        whole call can be made again.

        Raises:
            MoesifDeliveryError: Something was not taken; `undelivered` has the indexes.
        """
        waiting = list(reversed(posts))
        undelivered: list[int] = []
        first: Answer | None = None
        while waiting:
            post = waiting.pop()
            answer = self._transport.post_json(post.path, post.body, self._timeout_s)
            if answer.outcome is Outcome.DELIVERED:
                continue
            if answer.outcome is Outcome.SPLIT and len(post.payloads) > 1:
                waiting.extend(_halves(post))
                continue
            first = first or answer
            undelivered.extend(post.indexes)
            if answer.status is None or answer.outcome is Outcome.SUSPENDED:
                undelivered.extend(index for rest in reversed(waiting) for index in rest.indexes)
                break
        if first is not None:
            raise _failure(kind, first, sorted(undelivered), sum(len(post.payloads) for post in posts))


def _halves(post: _Post) -> list[_Post]:
    middle = len(post.payloads) // 2
    # Reversed: the first half is taken from the end of the stack first.
    return [
        _Post(post.path, post.payloads[middle:], post.indexes[middle:]),
        _Post(post.path, post.payloads[:middle], post.indexes[:middle]),
    ]


def _failure(kind: ProfileKind, answer: Answer, undelivered: list[int], total: int) -> MoesifDeliveryError:
    why = f"Moesif answered {answer.status}" if answer.status is not None else "no answer came from Moesif"
    if total == 1:
        what = f"the {kind.singular} was not taken"
    else:
        some = ", ".join(map(str, undelivered[:_MAX_LEFT_OVER_NAMED]))
        more = ", …" if len(undelivered) > _MAX_LEFT_OVER_NAMED else ""
        what = f"{len(undelivered)} of {total} {kind.plural} were not taken (indexes {some}{more})"
    return MoesifDeliveryError(f"{what}: {why}", status=answer.status, undelivered=tuple(undelivered))


class MoesifClient:
    """Tells Moesif about users, companies, subscriptions and actions, and raises when that fails.

    Each call checks its whole argument, makes its POST in the calling thread, once, and returns when it was taken.

    Args:
        application_id: Your Moesif application id; `MOESIF_APPLICATION_ID` by default.
        options: Other options in lower case, `base_uri` and `export_timeout` among them; each absent one is taken from
            its environment variable.

    Raises:
        MoesifConfigError: An option is wrong, or there is no application id.

    Thread-safe. A context manager; `close` lets go of idle connections.
    """

    def __init__(self, application_id: str | None = None, **options: Any) -> None:
        settings = Settings.from_keywords({"application_id": application_id, **options})
        self._transport: _Transport = MoesifTransport(settings)
        self._sender = ProfileSender(self._transport, settings.export_timeout)

    def update_user(self, user: Any) -> None:
        """Create or update a user.

        Args:
            user: A dict, a `moesifapi` `UserModel`, or JSON text, with `user_id`; optional `company_id`,
                `session_token`, `modified_time`, `ip_address`, `user_agent_string`, `campaign`, `metadata`.

        Raises:
            ValueError: The argument is wrong; the message names the place. Nothing was sent.
            MoesifDeliveryError: Moesif did not take it.
        """
        self._send(USER, user, batch=False)

    def update_users_batch(self, users: Any) -> None:
        """Create or update users; as `update_user` with a list. Large lists go in several POSTs.

        Raises:
            ValueError: One is wrong; the message has its index. Nothing was sent.
            MoesifDeliveryError: Moesif did not take some; its `undelivered` has their indexes, the others were taken.
        """
        self._send(USER, users, batch=True)

    def update_company(self, company: Any) -> None:
        """Create or update a company, with `company_id`; optional `company_domain` and the fields of a user.

        Raises:
            ValueError: As `update_user`.
            MoesifDeliveryError: As `update_user`.
        """
        self._send(COMPANY, company, batch=False)

    def update_companies_batch(self, companies: Any) -> None:
        """Create or update companies; errors as `update_users_batch`."""
        self._send(COMPANY, companies, batch=True)

    def update_subscription(self, subscription: Any) -> None:
        """Create or update a subscription, with `subscription_id`, `company_id` and `status`.

        Optional `current_period_start`, `current_period_end`, `items`, `metadata`. Errors as `update_user`.
        """
        self._send(SUBSCRIPTION, subscription, batch=False)

    def update_subscriptions_batch(self, subscriptions: Any) -> None:
        """Create or update subscriptions; errors as `update_users_batch`."""
        self._send(SUBSCRIPTION, subscriptions, batch=True)

    def send_action(self, action: Any) -> None:
        """Send an action of a user, with `action_name` and `request` (`time` is now where absent).

        Optional `transaction_id`, `user_id`, `company_id`, `subscription_id`, `session_token`, `metadata`. Errors as
        `update_user`.
        """
        self._send(ACTION, action, batch=False)

    def send_actions_batch(self, actions: Any) -> None:
        """Send actions; errors as `update_users_batch`."""
        self._send(ACTION, actions, batch=True)

    def close(self) -> None:
        """Let go of idle connections; a later call opens new ones."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, kind: ProfileKind, argument: Any, *, batch: bool) -> None:
        self._sender.send(kind, _posts(kind, argument, batch=batch))


class ProfileCalls:
    """The profile calls of the middlewares; `MoesifClient` says what each takes.

    A wrong argument raises `ValueError`. A delivery failure is logged and counted, and the call gives False.

    With `wait=False` nothing is sent here: the JSON is queued as an event is, with the same bounds, retries and
    counters, and the call gives whether there was room.

    A class that inherits it calls `_set_up_profiles`. Thread-safe.
    """

    _profile_sender: ProfileSender
    _submit_profile: Callable[[str, bytes], bool]
    _profile_guard: Guard

    def _set_up_profiles(self, sender: ProfileSender, submit: Callable[[str, bytes], bool], guard: Guard) -> None:
        """Plug in the pipeline.

        Args:
            sender: For calls that wait.
            submit: Queues one POST of `(path, JSON)`; False when there is no room (it has counted that).
            guard: Where delivery failures are counted and logged.
        """
        self._profile_sender = sender
        self._submit_profile = submit
        self._profile_guard = guard

    def update_user(self, user: Any, *, wait: bool = True) -> bool:
        """Create or update a user; see `MoesifClient.update_user`."""
        return self._tell(USER, user, wait=wait, batch=False)

    def update_users_batch(self, users: Any, *, wait: bool = True) -> bool:
        """Create or update users; see `MoesifClient.update_users_batch`."""
        return self._tell(USER, users, wait=wait, batch=True)

    def update_company(self, company: Any, *, wait: bool = True) -> bool:
        """Create or update a company; see `MoesifClient.update_company`."""
        return self._tell(COMPANY, company, wait=wait, batch=False)

    def update_companies_batch(self, companies: Any, *, wait: bool = True) -> bool:
        """Create or update companies; see `MoesifClient.update_companies_batch`."""
        return self._tell(COMPANY, companies, wait=wait, batch=True)

    def update_subscription(self, subscription: Any, *, wait: bool = True) -> bool:
        """Create or update a subscription; see `MoesifClient.update_subscription`."""
        return self._tell(SUBSCRIPTION, subscription, wait=wait, batch=False)

    def update_subscriptions_batch(self, subscriptions: Any, *, wait: bool = True) -> bool:
        """Create or update subscriptions; see `MoesifClient.update_subscriptions_batch`."""
        return self._tell(SUBSCRIPTION, subscriptions, wait=wait, batch=True)

    def send_action(self, action: Any, *, wait: bool = True) -> bool:
        """Send an action; see `MoesifClient.send_action`."""
        return self._tell(ACTION, action, wait=wait, batch=False)

    def send_actions_batch(self, actions: Any, *, wait: bool = True) -> bool:
        """Send actions; see `MoesifClient.send_actions_batch`."""
        return self._tell(ACTION, actions, wait=wait, batch=True)

    def _tell(self, kind: ProfileKind, argument: Any, *, wait: bool, batch: bool) -> bool:
        posts = _posts(kind, argument, batch=batch)
        try:
            if wait:
                self._profile_sender.send(kind, posts)
                return True
            # Every piece is offered, also after one was refused: what fits is kept.
            taken = [self._submit_profile(post.path, post.body) for post in posts]
            return all(taken)
        except MoesifDeliveryError as exc:
            _logger.warning("moesif_otel: %s", exc)  # statuses and indexes only
            self._profile_guard.caught(f"sending {kind.plural}", exc)
            return False
        except Exception as exc:
            self._profile_guard.caught(f"sending {kind.plural}", exc)
            return False
