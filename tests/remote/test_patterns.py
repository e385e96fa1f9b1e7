"""Expressions: the same answers as `re.search`, in bounded time."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesif_otel._remote import patterns
from moesif_otel._remote.expressions import MAX_EXPRESSION_CHARS
from moesif_otel._remote.patterns import (
    MAX_TEXT_CHARS,
    REQUEST_LIMIT_S,
    SEARCH_LIMIT_S,
    Allowance,
    OutOfTimeError,
    PatternError,
    compile_pattern,
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
    return compile_pattern(expression).matches(text, Allowance())


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
        ours = compile_pattern(expression)
    except (re.error, PatternError):
        return
    assert ours.matches(text, Allowance()) is (reference.search(text) is not None)


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_compiles_or_is_refused(expression: str) -> None:
    """No text makes compiling fail in another way than by `PatternError`."""
    try:
        compile_pattern(expression).matches("a/b c1é", Allowance())
    except (PatternError, OutOfTimeError):
        pass


@pytest.mark.parametrize("expression", ["(?<n>ab)", "\\p{L}", "x*+", "(?>a|ab)b"])
def test_javascript_and_newer_syntax_is_taken(expression: str) -> None:
    """Rules are written in a web page: what JavaScript takes and old versions of `re` do not is no error."""
    compile_pattern(expression)


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
    """An expression that is none raises `PatternError`, and the message does not quote it."""
    with pytest.raises(PatternError) as caught:
        compile_pattern(expression)
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
    with pytest.raises(PatternError):
        compile_pattern(expression)


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
        compile_pattern(expression).matches(text, allowance)
    except OutOfTimeError:
        assert allowance.remaining_s <= REQUEST_LIMIT_S - SEARCH_LIMIT_S


def test_a_request_has_one_allowance_for_all_expressions() -> None:
    """When the allowance is spent, further expressions are given up at once, and plain text still works."""
    allowance = Allowance()
    pattern = compile_pattern("^(a+)+$")
    given_up = 0
    while allowance.remaining_s > 0:
        with pytest.raises(OutOfTimeError):
            pattern.matches("a" * 4_000 + "!", allowance)
        given_up += 1
    assert given_up == 3  # 10 ms, 10 ms, 5 ms
    with pytest.raises(OutOfTimeError):
        compile_pattern("[ab]c").matches("ac", allowance)
    assert compile_pattern("ac").matches("ac", allowance)


def test_an_expression_that_always_runs_out_of_time_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """After twenty searches in a row that ran out of time it is not tried for a minute, then it is again."""
    now_s = 1_000.0
    monkeypatch.setattr(patterns.time, "monotonic", lambda: now_s)
    pattern = compile_pattern("^(a+)+$")
    hostile = "a" * 4_000 + "!"
    for _ in range(20):
        with pytest.raises(OutOfTimeError):
            pattern.matches(hostile, Allowance())
    untouched = Allowance()
    with pytest.raises(OutOfTimeError):
        pattern.matches("aaa", untouched)
    assert untouched.remaining_s == REQUEST_LIMIT_S
    now_s += 61.0
    assert pattern.matches("aaa", Allowance())


def test_one_slow_text_among_good_ones_does_not_make_it_rest() -> None:
    """Twenty in a row, not twenty in all: one client's long inputs do not switch a rule off for everyone."""
    pattern = compile_pattern("^(a+)+$")
    for _ in range(25):
        with pytest.raises(OutOfTimeError):
            pattern.matches("a" * 4_000 + "!", Allowance(0.001))
        assert pattern.matches("aaa", Allowance())


def test_plain_text_never_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most expressions of real rules cost a string comparison."""

    def no_engine(*arguments: object) -> None:
        raise AssertionError("engine asked")

    monkeypatch.setattr(patterns.regex, "compile", no_engine)
    for expression in ["GET", "^GET$", "/api/v1/", ".*users.*", "^/api/.*", "\\.json$", "\\/users\\/", ".*", ""]:
        compile_pattern(expression)


def test_the_bound_is_that_of_the_documentation() -> None:
    """The figures that the README states."""
    assert (SEARCH_LIMIT_S, REQUEST_LIMIT_S, MAX_TEXT_CHARS, MAX_EXPRESSION_CHARS) == (0.010, 0.025, 8_192, 1_000)
    assert time.get_clock_info("perf_counter").monotonic
