"""Sends users, companies, subscriptions and actions to Moesif.

`MoesifClient` raises if that fails. `ProfileCalls`, the same methods on every middleware, logs and counts failures.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from moesif_otel._delivery.client import MoesifTransport
from moesif_otel._delivery.profiles import ACTION, COMPANY, SUBSCRIPTION, USER, ProfileKind, Profiles, posts_of
from moesif_otel._guard import Guard, get_logger, show_debug_log
from moesif_otel.errors import MoesifDeliveryError
from moesif_otel.settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MoesifClient", "ProfileCalls"]

_logger: Final = get_logger(__name__)


class MoesifClient:
    """Sends users, companies, subscriptions and actions to Moesif, and raises if that fails.

    Each method checks its whole argument, makes one POST in the calling thread, and returns when it was accepted.

    Args:
        application_id: Your Moesif application id; `MOESIF_APPLICATION_ID` by default.
        **options: Other options in lower case, such as `base_uri` and `export_timeout`; each absent one is read from
            its environment variable.

    Raises:
        MoesifConfigError: An option is wrong, or there is no application id.

    Thread-safe and fork-safe. A context manager; `close` releases idle connections.
    """

    def __init__(self, application_id: str | None = None, **options: Any) -> None:
        settings = Settings.of({"application_id": application_id, **options})
        if settings.debug:
            show_debug_log()
        self._profiles = Profiles(settings, MoesifTransport(settings), Guard())

    def update_user(self, user: Any) -> None:
        """Create or update a user.

        Args:
            user: A dict, a `moesifapi` `UserModel`, or JSON text, with `user_id`; optional `company_id`,
                `session_token`, `modified_time`, `ip_address`, `user_agent_string`, `campaign`, `metadata`.

        Raises:
            ValueError: The argument is wrong; the message says where. Nothing was sent.
            MoesifDeliveryError: Moesif did not accept it.
        """
        self._send("update_user", USER, user)

    def update_users_batch(self, users: Any) -> None:
        """Create or update a list of users, as `update_user` does. Large lists are sent in several POSTs.

        Raises:
            ValueError: A user is wrong; the message has its index. Nothing was sent.
            MoesifDeliveryError: Moesif did not accept some of them; their indexes are in its `undelivered`.
        """
        self._send("update_users_batch", USER, users, batch=True)

    def update_company(self, company: Any) -> None:
        """Create or update a company, with `company_id`; optional `company_domain` and the fields of a user.

        Raises:
            ValueError: As `update_user`.
            MoesifDeliveryError: As `update_user`.
        """
        self._send("update_company", COMPANY, company)

    def update_companies_batch(self, companies: Any) -> None:
        """Create or update companies; errors as `update_users_batch`."""
        self._send("update_companies_batch", COMPANY, companies, batch=True)

    def update_subscription(self, subscription: Any) -> None:
        """Create or update a subscription, with `subscription_id`, `company_id` and `status`.

        Optional `current_period_start`, `current_period_end`, `items`, `metadata`. Errors as `update_user`.
        """
        self._send("update_subscription", SUBSCRIPTION, subscription)

    def update_subscriptions_batch(self, subscriptions: Any) -> None:
        """Create or update subscriptions; errors as `update_users_batch`."""
        self._send("update_subscriptions_batch", SUBSCRIPTION, subscriptions, batch=True)

    def send_action(self, action: Any) -> None:
        """Send an action of a user, with `action_name` and `request`; `time` is now by default.

        Optional `transaction_id`, `user_id`, `company_id`, `subscription_id`, `session_token`, `metadata`. Errors as
        `update_user`.
        """
        self._send("send_action", ACTION, action)

    def send_actions_batch(self, actions: Any) -> None:
        """Send actions; errors as `update_users_batch`."""
        self._send("send_actions_batch", ACTION, actions, batch=True)

    def close(self) -> None:
        """Close idle connections; a later call opens new ones."""
        self._profiles.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, call: str, kind: ProfileKind, argument: Any, *, batch: bool = False) -> None:
        self._profiles.send(call, kind, posts_of(kind, argument, batch=batch))


class ProfileCalls:
    """The profile methods of the middlewares; see `MoesifClient` for their arguments.

    A wrong argument raises `ValueError`. A delivery failure is logged and counted, and the method returns False.

    With `wait=False`, and always if an event loop runs in the calling thread, the profiles are queued, and retried as
    events are. The method then returns whether there was room for them.

    Subclasses set `_profiles` and `_profile_guard`. Thread-safe.
    """

    _profiles: Profiles
    _profile_guard: Guard
    _profile_failures: frozenset[tuple[str, int | None]] = frozenset()

    def update_user(self, user: Any, *, wait: bool = True) -> bool:
        """Create or update a user; see `MoesifClient.update_user`."""
        return self._send("update_user", USER, user, wait=wait)

    def update_users_batch(self, users: Any, *, wait: bool = True) -> bool:
        """Create or update users; see `MoesifClient.update_users_batch`."""
        return self._send("update_users_batch", USER, users, wait=wait, batch=True)

    def update_company(self, company: Any, *, wait: bool = True) -> bool:
        """Create or update a company; see `MoesifClient.update_company`."""
        return self._send("update_company", COMPANY, company, wait=wait)

    def update_companies_batch(self, companies: Any, *, wait: bool = True) -> bool:
        """Create or update companies; see `MoesifClient.update_companies_batch`."""
        return self._send("update_companies_batch", COMPANY, companies, wait=wait, batch=True)

    def update_subscription(self, subscription: Any, *, wait: bool = True) -> bool:
        """Create or update a subscription; see `MoesifClient.update_subscription`."""
        return self._send("update_subscription", SUBSCRIPTION, subscription, wait=wait)

    def update_subscriptions_batch(self, subscriptions: Any, *, wait: bool = True) -> bool:
        """Create or update subscriptions; see `MoesifClient.update_subscriptions_batch`."""
        return self._send("update_subscriptions_batch", SUBSCRIPTION, subscriptions, wait=wait, batch=True)

    def send_action(self, action: Any, *, wait: bool = True) -> bool:
        """Send an action; see `MoesifClient.send_action`."""
        return self._send("send_action", ACTION, action, wait=wait)

    def send_actions_batch(self, actions: Any, *, wait: bool = True) -> bool:
        """Send actions; see `MoesifClient.send_actions_batch`."""
        return self._send("send_actions_batch", ACTION, actions, wait=wait, batch=True)

    def _send(self, call: str, kind: ProfileKind, argument: Any, *, wait: bool, batch: bool = False) -> bool:
        posts = posts_of(kind, argument, batch=batch)
        failures = self._profile_failures
        try:
            if not wait or _on_event_loop():
                return self._profiles.queue(kind, posts)
            self._profiles.send(call, kind, posts)
        except MoesifDeliveryError as exc:
            self._profile_guard.count(f"sending {kind.plural}")
            if (call, exc.status) not in failures:  # once, until it works again
                self._profile_failures = failures | {(call, exc.status)}
                _logger.warning("moesif_otel: %s. Further ones are only counted, in stats()", exc)
            return False
        except Exception as exc:
            self._profile_guard.caught(f"sending {kind.plural}", exc)
            return False
        if failures:
            self._profile_failures = frozenset(failure for failure in failures if failure[0] != call)
        return True


def _on_event_loop() -> bool:
    asyncio, trio = sys.modules.get("asyncio"), sys.modules.get("trio")  # only an imported one can run a loop
    if asyncio is not None and asyncio._get_running_loop() is not None:
        return True
    in_trio_run = getattr(getattr(trio, "lowlevel", None), "in_trio_run", None)  # older versions do not have it
    return in_trio_run is not None and bool(in_trio_run())
