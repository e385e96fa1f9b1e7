"""Expressions: the same answers as `re.search`, in bounded time."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesif_otel._remote import expressions
from moesif_otel._remote.expressions import (
    LEAST_LIMIT_S,
    MAX_EXPRESSION_CHARS,
    REQUEST_LIMIT_S,
    SEARCH_LIMIT_S,
    SLOW_LIMIT_S,
    Allowance,
    OutOfTimeError,
    Pattern,
    RuleError,
)

REAL_EXPRESSIONS = [
    "GET",
    "^GET$",
    "GET|POST",
    "^(GET|POST)$",
    ".*user.*",
    "/.*",
    "^/api/.*",
    "^/api/v[12]/users/\\d+$",
    "/users/{id}/orders",
    "/users/{id}",
    "^https?://[^/]+/api/",
    "^(?!.*health).*$",
    "(?i)^/Admin",
    "\\.json$",
    "^4\\d\\d$",
    "^10\\.0\\.",
    "[[]",
    "[]a]+",
    "[^]a]",
    "a{2,3}b{,2}",
    "x{}y",
    "x{2",
    ".*",
    "",
    "^",
    "$",
    "\\/users\\/",
    "\\\\.*",
    "\\.*",
    "^a.*b$",
    ".*?b",
    "(a)(b)?\\1",
    "(?P<x>a)(?P=x)",
    "(?P<x>a)?(?(x)b|c)",
    "a#b",
    "[a-c&&x]",
    "user$",
    "^/a\\.b/c+",
    "^ab*",
]
TEXTS = [
    "GET",
    "POST",
    "/api/v1/users/7",
    "https://h/api/v1/users/7?x=1",
    "/users/{id}/orders",
    "/users/{id}",
    "/health",
    "/admin",
    "/ADMIN",
    "x.json",
    "x.json\n",
    "404",
    "10.0.0.1",
    "[",
    "]",
    "aab",
    "aaabb",
    "x{}y",
    "x{2",
    "",
    "\\",
    "...",
    "aa",
    "aba",
    "ab",
    "c",
    "a#b",
    "user",
    "user\n",
    "a\nuser",
    "/a.b/c",
    "/axb/c",
    "a\nb",
    "&",
    "é",
]

CATASTROPHIC = [
    ("^(a+)+$", "a" * 8_000 + "!"),
    ("(.*)*x", "a" * 8_000),
    ("(a|a)*$", "a" * 8_000 + "!"),
    ("(a|aa)+$", "a" * 8_000 + "!"),
    ("([a-zA-Z]+)*$", "a" * 8_000 + "!"),
    ("^(([a-z])+.)+[A-Z]([a-z])+$", "a" * 8_000),
    ("(x+x+)+y", "x" * 8_000),
    ("^(.*?,){11}P", "1," * 4_000),
    ("(?:\\D+|<\\d+>)*[!?]", "a" * 8_000),
    ("\\s+$", " " * 8_000 + "x"),
    (".*.*.*.*.*=", "x" * 8_000),
    ("(?=(a+))a*b\\1+$", "a" * 8_000 + "b!"),
    ("(?i)(é|É|e)+$", "éE" * 4_000 + "!"),
    ("(\\w|_)*$", "_" * 8_000 + "!"),
    ("(a*)+(b*)+(c*)+$", "abc" * 2_500 + "!"),
]


def matches(expression: str, text: str) -> bool:
    return Pattern(expression).matches(text, Allowance())


@pytest.mark.parametrize("expression", REAL_EXPRESSIONS)
def test_the_answer_is_that_of_re(expression: str) -> None:
    """An expression as rules have them is found exactly where `re.search` finds it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        reference = re.compile(expression)
    for text in TEXTS:
        assert matches(expression, text) is (reference.search(text) is not None), text


_PIECES = st.sampled_from(
    [
        "a",
        "b",
        "/",
        ".",
        "\\.",
        "\\d",
        "\\w",
        "^",
        "$",
        ".*",
        ".*?",
        "a+",
        "[ab]",
        "[^a]",
        "(a|b)",
        "(?:ab)?",
        "|",
        "{",
        "}",
        "{id}",
        "b{2}",
        "\\\\",
        "-",
        "1",
        "\n",
        "é",
        "[[]",
        "(?=a)",
    ]
)


@given(st.lists(_PIECES, max_size=8).map("".join), st.text(alphabet="ab/.1é\n\\{}-id", max_size=12))
@settings(max_examples=400, deadline=None)
def test_any_expression_that_both_take_means_the_same(expression: str, text: str) -> None:
    """Whatever `re` compiles is answered as `re` answers it, or refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            reference = re.compile(expression)
        ours = Pattern(expression)
    except (re.error, RuleError):
        return
    assert ours.matches(text, Allowance()) is (reference.search(text) is not None)


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_compiles_or_is_refused(expression: str) -> None:
    """No text makes compiling fail in another way than by `RuleError`."""
    try:
        Pattern(expression).matches("a/b c1é", Allowance())
    except (RuleError, OutOfTimeError):
        pass


@pytest.mark.parametrize("expression", ["(?<n>ab)", "\\p{L}", "x*+", "(?>a|ab)b"])
def test_javascript_and_newer_syntax_is_taken(expression: str) -> None:
    """Rules are written in a web page: what JavaScript takes and old versions of `re` do not is no error."""
    Pattern(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "(",
        ")",
        "[",
        "[[",
        "*",
        "a**",
        "a{2}{3}",
        "\\",
        "(?P<a",
        "(?<=",
        "(?",
        "[z-a]",
        "(?P=n)",
        "(" * 500,
        "\\1",
        "a{3,2}",
    ],
)
def test_an_invalid_expression_is_refused(expression: str) -> None:
    """An expression that is none raises `RuleError`, and the message does not quote it."""
    with pytest.raises(RuleError) as caught:
        Pattern(expression)
    assert "expression" in str(caught.value)


@pytest.mark.parametrize(
    "expression",
    [
        "(?R)",
        "(?1)",
        "(?&x)",
        "(?b)a",
        "(?fi:a)",
        "(?V1)a",
        "(?r)a",
        "(?|a)",
        "(?:a{100}b){100}",
        "((a{0,1000}){0,1000}){0,1000}",
        "(?i)" + "é" * MAX_EXPRESSION_CHARS,
        "a{999999999999999999999}",
        "(?:" * 400 + "a" + ")+" * 400,
    ],
)
def test_what_could_be_dear_to_compile_is_refused(expression: str) -> None:
    """Recursion, fuzzy matching, unrolled repetitions and long expressions are refused before the engine sees them."""
    with pytest.raises(RuleError):
        Pattern(expression)


def test_nested_groups_within_reason_are_taken() -> None:
    """Refusing what is too large leaves ordinary nesting alone."""
    assert matches("^(?:[0-9a-f]{4}-){3}(?:(?:a|b){2,4}){1,8}$", "0123-4567-89ab-abab")


@pytest.mark.parametrize(("expression", "text"), CATASTROPHIC)
def test_a_catastrophic_expression_is_bounded(expression: str, text: str) -> None:
    """Whatever the expression, a search answers or is given up; the request's allowance pays for what it took.

    The bound that the engine keeps is `SEARCH_LIMIT_S` of CPU time; here only that it comes back is asserted, since
    machines differ: without the limit these run for hours.
    """
    allowance = Allowance()
    try:
        Pattern(expression).matches(text, allowance)
    except OutOfTimeError:
        assert allowance.remaining_s <= REQUEST_LIMIT_S - SEARCH_LIMIT_S


def test_a_request_has_one_allowance_and_every_search_its_least() -> None:
    """When the allowance is spent, slow searches are given up within a moment, and ordinary ones are still answered."""
    allowance = Allowance()
    given_up = 0
    while allowance.remaining_s > 0:
        with pytest.raises(OutOfTimeError):
            Pattern("^(a+)+$").matches("a" * 4_000 + "!", allowance)
        given_up += 1
    assert given_up == 3  # 10 ms, 10 ms, 5 ms
    before_s = allowance.remaining_s
    with pytest.raises(OutOfTimeError):
        Pattern("^(a+)+$").matches("a" * 4_000 + "!", allowance)
    assert before_s - allowance.remaining_s == pytest.approx(LEAST_LIMIT_S)
    assert Pattern("(a|b)c").matches("ac", allowance)
    assert Pattern("ac").matches("ac", allowance)


def test_a_slow_expression_costs_less_for_a_minute_and_stays_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow texts one after the other: each costs a fifth of the first, and ordinary texts are answered all the time."""
    now_s = 1_000.0
    monkeypatch.setattr(expressions.time, "perf_counter", lambda: now_s)
    pattern = Pattern("^(a+)+$")
    hostile = "a" * 4_000 + "!"
    costs = []
    for _ in range(30):
        allowance = Allowance()
        with pytest.raises(OutOfTimeError):
            pattern.matches(hostile, allowance)
        costs.append(REQUEST_LIMIT_S - allowance.remaining_s)
        assert pattern.matches("aaa", Allowance())
    assert costs == pytest.approx([SEARCH_LIMIT_S] + [SLOW_LIMIT_S] * 29)
    now_s += 61.0
    allowance = Allowance()
    with pytest.raises(OutOfTimeError):
        pattern.matches(hostile, allowance)
    assert REQUEST_LIMIT_S - allowance.remaining_s == pytest.approx(SEARCH_LIMIT_S)


def test_simple_expressions_need_no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most expressions of real rules have nothing that could take long: they are searched without a time limit."""
    patterns = [
        Pattern(text) for text in ["GET", "^GET$", "/api/v1/", ".*users.*", "^/api/.*", "\\.json$", "v[12]", ""]
    ]

    def no_clock() -> float:
        raise AssertionError("clock asked")

    monkeypatch.setattr(expressions.time, "perf_counter", no_clock)
    for pattern in patterns:
        pattern.matches("https://host/api/v1/users.json", Allowance())
    with pytest.raises(AssertionError):
        Pattern("(a|b)").matches("a", Allowance())


def test_the_bound_is_that_of_the_documentation() -> None:
    """The figures that the documentation states."""
    limits = (SEARCH_LIMIT_S, REQUEST_LIMIT_S, LEAST_LIMIT_S, SLOW_LIMIT_S, MAX_EXPRESSION_CHARS)
    assert limits == (0.010, 0.025, 0.0005, 0.002, 1_000)
    assert time.get_clock_info("perf_counter").monotonic
