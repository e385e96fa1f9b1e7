"""The names under which secrets travel: what `AUTO_HIDE_SENSITIVE` hides, as exact lists.

Owns: the documented lists, how names are compared, and what a card number is.
Threads: any; constants and pure functions.
Never: guesses from a value, but for card numbers in fields that are named like cards.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final

__all__ = [
    "CARD_WORDS",
    "CREDENTIAL_HEADERS",
    "CREDENTIAL_SCHEMES",
    "HIDDEN",
    "SENSITIVE_COOKIES",
    "SENSITIVE_NAMES",
    "SKELETONS",
    "SKELETON_LETTERS",
    "Verdict",
    "fold",
    "has_card_number",
]


class Verdict(Enum):
    """What becomes of the value of a name."""

    KEEP = "keep"
    REMOVE = "remove"  # a mask names it: null, or nothing
    HIDE = "hide"  # a well-known secret: `HIDDEN`
    CARD = "card"  # hidden where it is a card number


HIDDEN: Final = "(hidden)"
"""What stands in the place of a hidden value; it needs no escaping in URLs, cookies, JSON and headers."""

SENSITIVE_NAMES: Final = (
    "password",
    "passwd",
    "pwd",
    "passphrase",
    "passcode",
    "pass_word",
    "user_password",
    "admin_password",
    "db_password",
    "current_password",
    "old_password",
    "new_password",
    "confirm_password",
    "password_confirm",
    "password_confirmation",
    "password1",
    "password2",
    "password_hash",
    "hashed_password",
    "one_time_password",
    "temporary_password",
    "secret",
    "secrets",
    "client_secret",
    "app_secret",
    "api_secret",
    "api_key_secret",
    "consumer_secret",
    "shared_secret",
    "signing_secret",
    "webhook_secret",
    "totp_secret",
    "otp_secret",
    "mfa_secret",
    "token_secret",
    "oauth_token_secret",
    "secret_key",
    "secret_access_key",
    "aws_secret_access_key",
    "secret_token",
    "token",
    "access_token",
    "refresh_token",
    "id_token",
    "api_token",
    "auth_token",
    "authentication_token",
    "authorization_token",
    "bearer_token",
    "jwt_token",
    "oauth_token",
    "session_token",
    "aws_session_token",
    "security_token",
    "x_amz_security_token",
    "private_token",
    "personal_access_token",
    "reset_token",
    "password_reset_token",
    "remember_token",
    "csrf_token",
    "xsrf_token",
    "csrfmiddlewaretoken",
    "authenticity_token",
    "api_key",
    "x_api_key",
    "access_key",
    "private_key",
    "private_key_pem",
    "rsa_private_key",
    "ssh_private_key",
    "encryption_key",
    "signing_key",
    "subscription_key",
    "ocp_apim_subscription_key",
    "account_key",
    "storage_account_key",
    "credential",
    "credentials",
    "authorization",
    "proxy_authorization",
    "x_amz_signature",
    "x_goog_signature",
    "security_code",
    "card_security_code",
    "card_pin",
    "card_cvv",
    "card_cvc",
    "cvv",
    "cvv2",
    "cvc",
    "cvc2",
)
"""Names of fields whose values are hidden: case, `_`, `-` and spaces do not count, everything else must be the same.

They are looked for in JSON at any depth, in forms, multipart fields, query strings, cookies and as header names (there
also behind `X-`). `max_tokens`, `token_count` and `next_page_token` are other names, and stay.
"""

SENSITIVE_COOKIES: Final = (
    "session",
    "sessionid",
    "session_id",
    "sid",
    "connect.sid",
    "jsessionid",
    "phpsessid",
    "asp.net_sessionid",
    "aspsessionid",
    ".aspnetcore.session",
    ".aspnetcore.cookies",
    ".aspnetcore.identity.application",
    "laravel_session",
    "_session_id",
    "user_session",
    "auth",
    "csrftoken",
    "csrf",
    "xsrf_token",
    "jwt",
    "remember_me",
)
"""Names of cookies whose values are hidden, besides `SENSITIVE_NAMES`: whoever has them is the user."""

CREDENTIAL_HEADERS: Final = ("authorization", "proxy-authorization")
"""Headers whose credentials are hidden and whose scheme stays; `AUTHORIZATION_HEADER_NAME`'s are treated the same."""

CREDENTIAL_SCHEMES: Final = frozenset(
    {
        *("basic", "bearer", "digest", "dpop", "gnap", "hoba", "mutual", "negotiate", "ntlm", "oauth", "privatetoken"),
        *("scram-sha-1", "scram-sha-256", "vapid", "token", "apikey", "api-key", "key", "jwt", "hawk", "signature"),
        *("aws4-hmac-sha256", "aws", "sharedkey", "sharedkeylite", "sharedaccesssignature", "googlelogin", "kerberos"),
    }
)
"""Schemes that are shown; the first word of anything else may be the secret itself."""

CARD_WORDS: Final = ("card", "ccnumber")
"""A field whose name has one of these in it, and what lies below it, has its card numbers hidden."""

SKELETON_LETTERS: Final = b'pswdcrtknvy"&='
"""What the quick scan looks at: some consonants, and the marks that stand around names. All else is taken out first,
which leaves a third of a text."""

SKELETONS: Final = (
    rb"pss[wpc]",
    rb"pwd",
    rb"scrt",
    rb"k(?:n(?<=tkn)|y(?<=[pstn]ky))",
    rb"crd",
    rb"cv[vc]",
    rb"ccnr",
    rb"trtn",
    rb"sntr",
)
"""Every name of `SENSITIVE_NAMES` and `CARD_WORDS`, so reduced, matches one of these (a test says so): a text that
matches none needs no closer look. Each begins with a letter of its own, since `re` then looks for that letter first;
one expression of all of them takes ten times as long (4 KB: 12 µs instead of 1 µs each)."""


def fold(name: str) -> str:
    """Give a name in the form in which names are compared."""
    return name.lower().replace("_", "").replace("-", "").replace(" ", "").replace("\0", "")


_DIGIT_GROUPS: Final = re.compile(r"[0-9]+(?:[ \-][0-9]+)*", re.ASCII)
_SEPARATOR: Final = re.compile(r"[ \-]")


def has_card_number(text: str) -> bool:
    """Whether 12 to 19 digits (ISO/IEC 7812), maybe in groups, whose Luhn check digit is right stand in `text`."""
    for match in _DIGIT_GROUPS.finditer(text):
        if len(match[0]) >= 12 and _groups_hold_card(_SEPARATOR.split(match[0])):
            return True
    return False


def _groups_hold_card(groups: list[str]) -> bool:
    for first in range(len(groups)):
        digits = ""
        for group in groups[first : first + 19]:
            digits += group
            if len(digits) > 19:
                break
            if len(digits) >= 12 and _luhn(digits):
                return True
    return False


def _luhn(digits: str) -> bool:
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0
