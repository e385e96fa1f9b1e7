"""The names of secrets that `AUTO_HIDE_SENSITIVE` hides, and how names are compared.

Constants and pure functions. Only names are judged here, never values.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final


class Verdict(Enum):
    """Says what becomes of the value of a name."""

    KEEP = "keep"
    REMOVE = "remove"  # a mask names it: null, or nothing
    HIDE = "hide"  # a well-known secret: `HIDDEN`
    CARD = "card"  # hidden where it is a card number


HIDDEN: Final = "(hidden)"
"""Replaces a hidden value; it needs no escaping in URLs, cookies, JSON and headers."""

SENSITIVE_NAMES: Final = (
    *("password", "passwd", "pwd", "passphrase", "passcode", "pass_word", "password1", "password2"),
    *("user_password", "admin_password", "db_password", "current_password", "old_password", "new_password"),
    *("confirm_password", "password_confirm", "password_confirmation", "one_time_password", "temporary_password"),
    *("password_hash", "hashed_password"),
    *("secret", "secrets", "client_secret", "app_secret", "api_secret", "api_key_secret", "consumer_secret"),
    *("shared_secret", "signing_secret", "webhook_secret", "totp_secret", "otp_secret", "mfa_secret", "token_secret"),
    *("oauth_token_secret", "secret_key", "secret_access_key", "aws_secret_access_key", "secret_token"),
    *("token", "access_token", "refresh_token", "id_token", "api_token", "auth_token", "authentication_token"),
    *("authorization_token", "bearer_token", "jwt_token", "oauth_token", "session_token", "aws_session_token"),
    *("security_token", "x_amz_security_token", "private_token", "personal_access_token", "reset_token"),
    *("password_reset_token", "remember_token", "csrf_token", "xsrf_token", "csrfmiddlewaretoken"),
    *("authenticity_token",),
    *("api_key", "x_api_key", "access_key", "private_key", "private_key_pem", "rsa_private_key", "ssh_private_key"),
    *("encryption_key", "signing_key", "subscription_key", "ocp_apim_subscription_key", "account_key"),
    *("storage_account_key",),
    *("credential", "credentials", "authorization", "proxy_authorization", "x_amz_signature", "x_goog_signature"),
    *("security_code", "card_security_code", "card_pin", "card_cvv", "card_cvc", "cvv", "cvv2", "cvc", "cvc2"),
)
"""Names of fields whose values are hidden: case, `_`, `-` and spaces do not count, everything else must be the same.

So do names that end in `password`, `passwd` or `passphrase`, and any of these with a number behind it (`token2`). They
are looked for in JSON at any depth, in forms, multipart fields, query strings, cookies and as header names (there
also behind `X-`). `max_tokens`, `token_count` and `next_page_token` are other names, and stay.
"""

SENSITIVE_COOKIES: Final = (
    *("session", "sessionid", "session_id", "_session_id", "user_session", "laravel_session", "sid", "connect.sid"),
    *("jsessionid", "phpsessid", "aspsessionid", "asp.net_sessionid", ".aspnetcore.session", ".aspnetcore.cookies"),
    *(".aspnetcore.identity.application", "auth", "jwt", "remember_me", "csrf", "csrftoken", "xsrf_token"),
    *("_oauth2_proxy", "cf_authorization", "keycloak_identity"),
)
"""Names of cookies whose values are hidden, besides `SENSITIVE_NAMES`: they log their owner in."""

CREDENTIAL_HEADERS: Final = ("authorization", "proxy-authorization")
"""Headers whose credentials are hidden and whose scheme stays; `AUTHORIZATION_HEADER_NAME`'s are treated the same."""

COOKIE_HEADERS: Final = frozenset({"cookie", "set-cookie"})

CREDENTIAL_SCHEMES: Final = frozenset(
    {
        *("basic", "bearer", "digest", "dpop", "gnap", "hoba", "mutual", "negotiate", "ntlm", "oauth", "privatetoken"),
        *("scram-sha-1", "scram-sha-256", "vapid", "token", "apikey", "api-key", "key", "jwt", "hawk", "signature"),
        *("aws4-hmac-sha256", "aws", "sharedkey", "sharedkeylite", "sharedaccesssignature", "googlelogin", "kerberos"),
    }
)
"""Schemes that are shown; the first word of anything else may be the secret itself."""

QUERY_NAMES: Final = ("sig", "signature", "code", "assertion", "client_assertion", "code_verifier", "saml_response")
"""Names that are hidden in query strings and fragments besides `SENSITIVE_NAMES`."""

CARD_NAMES: Final = ("card", "cards", "card_number", "card_no", "card_num", "credit_card", "debit_card", "ccnumber")
"""Fields in which, and below which, card numbers are hidden: `card` as a word of its own, or one of these names."""

_HIDE: Final = frozenset(name.lower().replace("_", "").replace("-", "").replace(" ", "") for name in SENSITIVE_NAMES)
_COOKIES: Final = frozenset(name.lower().replace("_", "").replace("-", "") for name in SENSITIVE_COOKIES)
_QUERY: Final = frozenset(name.replace("_", "") for name in QUERY_NAMES)
_SECRET_ENDS: Final = ("password", "passwd", "passphrase")
_COOKIE_ENDS: Final = ("session", "sessionid", "sessid", "token")
_COOKIE_STARTS: Final = ("aspsessionid", "wordpressloggedin", "wordpresssec")
_CHUNK: Final = re.compile(r"c?[0-9]+\Z")  # `.AspNetCore.CookiesC1`, `AWSELBAuthSessionCookie-0`
_HEADER_ENDS: Final = (
    *("-token", "-authorization", "-secret", "-password", "api-key", "apikey", "-access-key", "-private-key"),
    *("-auth-key", "-master-key", "-functions-key", "-application-key"),
    *("-credentials", "-assertion", "-accesstoken", "-oidc-data", "-jwt"),
)
_HARMLESS_HEADER_ENDS: Final = ("page-token", "continuation-token", "sync-token", "next-token", "cursor-token")
_WORDS: Final = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_CARD_WORD: Final = re.compile(
    r"(?:credit|debit|payment|bank|charge|pay|visa|master|prepaid|virtual|my|new|old)?cards?(?:numbers?|nos?|nums?|nr|pan|data|info|details?)?"
    r"|cc(?:number|num|no|nr)"
)
_NO_CARDS: Final = frozenset(
    {
        *("score", "wild", "post", "flash", "report", "time", "punch", "business", "sim", "sd", "memory", "graphics"),
        *("video", "sound", "network", "library", "place", "index", "race", "dash", "key", "id", "v"),
    }
)


def fold(name: str) -> str:
    """Return a name in the form in which names are compared: case, `_`, `-` and blanks do not count."""
    return name.lower().translate(_SEPARATORS)


_SEPARATORS: Final = dict.fromkeys(map(ord, "_- \u00a0"))


def is_secret_name(folded: str) -> bool:
    """Tell whether a field's folded name is a well-known secret's; numbers at its end (`password2`) do not count."""
    return folded in _HIDE or folded.endswith(_SECRET_ENDS) or folded.rstrip("0123456789") in _HIDE


def is_card_name(name: str) -> bool:
    """Tell whether card numbers are looked for below a name: `card` is a word of its own in it (not in `scorecard`)."""
    before = ""
    for word in _WORDS.findall(name):
        word = word.lower()  # noqa: PLW2901 - the same word
        if _CARD_WORD.fullmatch(word) is not None and before not in _NO_CARDS:
            return True
        if before == "cc" and word in {"number", "num", "no", "nr"}:
            return True
        before = word
    return False


def is_secret_query(folded: str) -> bool:
    """Tell whether a query parameter's folded name is hidden besides the fields' names."""
    return folded in _QUERY


def is_secret_cookie(name: str) -> bool:
    """Tell whether a cookie of this name identifies its owner; `__Host-` and `__Secure-` do not count."""
    folded = fold(name)
    for prefix in ("host", "secure"):
        if name.startswith("__"):
            folded = folded.removeprefix(prefix)
    folded = _CHUNK.sub("", folded).removesuffix("cookie").rstrip("0123456789")
    if folded in _COOKIES or folded.replace(".", "").endswith(_COOKIE_ENDS) or folded.startswith(_COOKIE_STARTS):
        return True
    return is_secret_name(folded)


def is_secret_header(name: str) -> bool:
    """Tell whether a header's lower-case name is a well-known secret's, also behind `x-` or a vendor's name."""
    folded = fold(name)
    if is_secret_name(folded) or is_secret_name(folded.removeprefix("x")):
        return True
    return name.replace("_", "-").endswith(_HEADER_ENDS) and not name.endswith(_HARMLESS_HEADER_ENDS)
