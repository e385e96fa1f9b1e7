"""The configuration and the rules that the sandbox answers with, and the checks of an editor for them.

`PUT /v1/config` and `PUT /v1/rules` take whatever has the right type, so that a client can be tried against rules that
are wrong. The page's editor asks more: it names what would not work before it is in force.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import orjson

from moesif_otel.sandbox.check import Refusal
from moesif_otel.sandbox.jsontext import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moesif_otel.sandbox.store import Store

__all__ = ["DOCUMENTS", "DocumentKind", "check_document", "put_document"]


@dataclass(frozen=True, slots=True)
class DocumentKind:
    """The facts about one kind of document.

    Attributes:
        tag_header: The header of answers to events that tells its version.
        default: What is answered when nobody edited it.
    """

    tag_header: str
    default: bytes
    kind: type
    takes: str


# What the real server answers to an application without any setting of its own.
_DEFAULT_CONFIG: Final = orjson.dumps(
    {
        "org_id": "sandbox:1",
        "app_id": "sandbox:1",
        "sample_rate": 100,
        "block_bot_traffic": False,
        "user_sample_rate": {},
        "company_sample_rate": {},
        "user_rules": {},
        "company_rules": {},
        "ip_addresses_blocked_by_name": {},
        "regex_config": [],
        "billing_config_jsons": {},
    }
)
DOCUMENTS: Final[Mapping[str, DocumentKind]] = {
    "config": DocumentKind("X-Moesif-Config-ETag", _DEFAULT_CONFIG, dict, "an object"),
    "rules": DocumentKind("X-Moesif-Rules-Tag", b"[]", list, "an array"),
}

_RULE_TYPES: Final = ("regex", "user", "company")
_APPLIED_TO: Final = ("matching", "not_matching")
_CONFIG_PATHS: Final = ("request.verb", "request.route", "request.ip_address", "response.status")
_RULE_PATHS: Final = re.compile(r"request\.(verb|ip_address|ip|route|headers\..+|body\..+)")
_RULE_FIELDS: Final = frozenset(
    {"_id", "type", "state", "name", "block", "applied_to", "applied_to_unidentified", "variables", "regex_config"}
    | {"response", "org_id", "app_id", "created_at", "modified_at"}
)


def put_document(store: Store, application_id: str, name: str, text: bytes) -> None:
    """Put a document in force; an empty application id means every application that has none of its own.

    Raises:
        Refusal: Status 400 for what is no JSON or of the wrong type, 413 for what is too large.
    """
    value = read_json(text)
    kind = DOCUMENTS[name]
    if not isinstance(value, kind.kind):
        raise Refusal(400, "wrong_type", f"{name} must be {kind.takes}")
    store.put_document(application_id, name, write_json(value))


def check_document(name: str, value: Any) -> list[dict[str, str]]:
    """Return what is wrong with a document, each with `field` and `message`; empty when all is well."""
    faults = _rules_faults(value) if name == "rules" else _config_faults(value)
    return [{"field": field, "message": message} for field, message in faults]


def _config_faults(config: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(config, dict):
        yield "", "the configuration must be an object"
        return
    if "sample_rate" in config and not _is_rate(config["sample_rate"]):
        yield "sample_rate", "must be a number from 0 to 100"
    for field in ("user_sample_rate", "company_sample_rate"):
        rates = config.get(field, {})
        if not isinstance(rates, dict):
            yield field, "must be an object of ids and rates"
            continue
        for key, rate in rates.items():
            if not _is_rate(rate):
                yield f"{field}.{key}", "must be a number from 0 to 100"
    for field in ("user_rules", "company_rules"):
        yield from _cohort_faults(field, config.get(field, {}))
    groups = config.get("regex_config", [])
    yield from _groups_faults("regex_config", groups, lambda path: path in _CONFIG_PATHS, ", ".join(_CONFIG_PATHS))
    if isinstance(groups, list):
        for place, group in enumerate(groups):
            if isinstance(group, dict) and not _is_rate(group.get("sample_rate")):
                yield f"regex_config[{place}].sample_rate", "must be a number from 0 to 100"


def _cohort_faults(field: str, cohorts: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(cohorts, dict):
        yield field, "must be an object of ids and lists of rules"
        return
    for key, entries in cohorts.items():
        if not isinstance(entries, list):
            yield f"{field}.{key}", "must be a list"
            continue
        for place, entry in enumerate(entries):
            where = f"{field}.{key}[{place}]"
            if not isinstance(entry, dict) or not isinstance(entry.get("rules"), str):
                yield f"{where}.rules", "must be the _id of a rule"
            elif not isinstance(entry.get("values", {}), dict):
                yield f"{where}.values", "must be an object"


def _rules_faults(rules: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(rules, list):
        yield "", "the rules must be an array"
        return
    seen: set[str] = set()
    for place, rule in enumerate(rules):
        where = f"[{place}]"
        if not isinstance(rule, dict):
            yield where, "must be an object"
            continue
        identity = rule.get("_id")
        if not isinstance(identity, str) or not identity:
            yield f"{where}._id", "must be a string that is not empty"
        elif identity in seen:
            yield f"{where}._id", "is the _id of a rule above"
        else:
            seen.add(identity)
        yield from _rule_faults(where, rule)


def _rule_faults(where: str, rule: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for field in sorted(set(rule) - _RULE_FIELDS):
        yield f"{where}.{field}", "is not a field of a rule"
    if rule.get("type") not in _RULE_TYPES:
        yield f"{where}.type", f"must be one of {', '.join(_RULE_TYPES)}"
    for field in ("block", "applied_to_unidentified"):
        if not isinstance(rule.get(field, False), bool):
            yield f"{where}.{field}", "must be true or false"
    if rule.get("applied_to", "matching") not in _APPLIED_TO:
        yield f"{where}.applied_to", f"must be one of {', '.join(_APPLIED_TO)}"
    variables = rule.get("variables", [])
    if not isinstance(variables, list) or any(not isinstance(v, dict) or "name" not in v for v in variables):
        yield f"{where}.variables", "must be a list of objects with name and path"
    takes = "request.verb, .ip_address, .route, .headers.<name> or .body.<key>"
    yield from _groups_faults(
        f"{where}.regex_config", rule.get("regex_config", []), lambda path: bool(_RULE_PATHS.fullmatch(path)), takes
    )
    yield from _response_faults(f"{where}.response", rule.get("response"), needed=rule.get("block") is True)


def _response_faults(where: str, response: Any, *, needed: bool) -> Iterator[tuple[str, str]]:
    if response is None:
        if needed:
            yield where, "is needed by a rule that blocks: status, headers, body"
        return
    if not isinstance(response, dict):
        yield where, "must be an object with status, headers and body"
        return
    status: Any = response.get("status")
    is_whole = isinstance(status, int) and not isinstance(status, bool)
    if (needed or status is not None) and not (is_whole and 100 <= status <= 999):
        yield f"{where}.status", "must be a status of three digits"
    headers = response.get("headers", {})
    if not isinstance(headers, dict) or any(not isinstance(text, str) for text in headers.values()):
        yield f"{where}.headers", "must be an object of strings"


def _groups_faults(where: str, groups: Any, takes_path: Any, paths: str) -> Iterator[tuple[str, str]]:
    if not isinstance(groups, list):
        yield where, "must be a list of objects with conditions"
        return
    for place, group in enumerate(groups):
        conditions = group.get("conditions") if isinstance(group, dict) else None
        if not isinstance(conditions, list):
            yield f"{where}[{place}].conditions", "must be a list"
            continue
        for number, condition in enumerate(conditions):
            at = f"{where}[{place}].conditions[{number}]"
            path = condition.get("path") if isinstance(condition, dict) else None
            value = condition.get("value") if isinstance(condition, dict) else None
            if not isinstance(path, str) or not takes_path(path):
                yield f"{at}.path", f"must be one of {paths}"
            if not isinstance(value, str):
                yield f"{at}.value", "must be a regular expression in a string"
            elif fault := _expression_fault(value):
                yield f"{at}.value", f"is no regular expression: {fault}"


def _expression_fault(expression: str) -> str | None:
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_rate(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 100
