"""The command `moesif-otel`: `sandbox`, `tail`, `demo` and `doctor`.

Runs on the main thread; SIGINT and SIGTERM end a command cleanly. The package never imports it, and it configures no
logging before a command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import logging
import os
import signal
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

    from moesif_otel.sandbox import Sandbox

__all__ = ["main"]

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2

_COLOURS: Final = ("auto", "always", "never")
_DEFAULT_PORT: Final = 8765
_FOLLOW_S: Final = 0.25
_FOLLOW_ROWS: Final = 200
_SAME_SIGNAL_S: Final = 1.0
_SIGNAL_CHECK_S: Final = 0.5  # a wait without an end is not interrupted by Ctrl-C on every system


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Without the program's name; `sys.argv` by default.

    Returns:
        The exit status: 0 when it went well or was ended by Ctrl-C, 1 when it failed, 2 when it was called wrongly
        or a package that it needs is not installed.
    """
    _make_streams_safe()
    options = _parser().parse_args(arguments)
    try:
        if options.command == "doctor":
            return _doctor(options)
        with _signals() as ended:
            return _COMMANDS[options.command](options, ended)
    except ImportError as error:
        # Only what an extra brings is explained; anything else is a defect that should be seen whole.
        if "the sandbox needs" not in str(error):
            raise
        _complain(str(error))
        return EXIT_USAGE
    except BrokenPipeError:
        # `… | head` has what it wanted. Python would complain once more when it flushes at exit.
        _discard_output()
        return 0
    except OSError as error:
        # A full disk, say. Commands tell of their own files and addresses themselves.
        if error.errno != errno.ENOSPC:
            raise
        _discard_output()
        _complain(f"cannot write the output: {error.strerror}")
        return EXIT_FAILED


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _make_streams_safe() -> None:
    """Let output never fail: closed streams are replaced, and what a terminal's encoding lacks is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # Opened before any socket, which would get the number of the closed stream.
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 - for the life of the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moesif-otel", description="API analytics, captured with OpenTelemetry.")
    parser.add_argument("--version", action="version", version=f"moesif-otel {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_sandbox_options(
        commands.add_parser(
            "sandbox",
            help="run a local stand-in for Moesif",
            description="Run a local stand-in for Moesif, and show what it receives.",
        )
    )
    _add_tail_options(
        commands.add_parser(
            "tail",
            help="show the calls that a running sandbox receives",
            description="Show the calls that a running sandbox receives, as they arrive.",
        )
    )
    demo = commands.add_parser(
        "demo",
        help="see calls being captured, without an account",
        description="Start a sandbox and a small API, send it traffic, and show what was captured.",
    )
    demo.add_argument("--once", action="store_true", help="send the traffic once, print a table and exit")
    demo.add_argument(
        "--port", type=_port, help=f"the sandbox's port (default {_DEFAULT_PORT}, or a free one if that is in use)"
    )
    doctor = commands.add_parser(
        "doctor",
        help="find out why no calls arrive",
        description="Check the options, OpenTelemetry, the connection to Moesif and, if you name it, your program. "
        "Exit status 1 if something is wrong.",
    )
    doctor.add_argument("--send", action="store_true", help="send one event and wait for its acknowledgement")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument(
        "program",
        nargs=argparse.REMAINDER,
        metavar="-- PROGRAM",
        help="a command such as python app.py, which is run for a few seconds, or module:application, to import",
    )
    return parser


def _add_sandbox_options(sandbox: argparse.ArgumentParser) -> None:
    add = sandbox.add_argument
    add("--port", type=_port, default=_DEFAULT_PORT, help="default %(default)s; 0 chooses a free one")
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    add("--database", metavar="FILE", help="keep what it receives in this SQLite file")
    only = "accept only this id (may be repeated)"
    add("--application-id", type=_id, action="append", default=[], metavar="ID", help=only)
    also = "also accept requests for this host name (may be repeated)"
    add("--allow-host", type=_host_name, action="append", default=[], metavar="NAME", help=also)
    add("--quiet", action="store_true", help="do not print a line for each call")
    add("--color", choices=_COLOURS, default="auto", help="default %(default)s")


def _add_tail_options(tail: argparse.ArgumentParser) -> None:
    add = tail.add_argument
    add("--url", default=f"http://127.0.0.1:{_DEFAULT_PORT}", help="the sandbox's address (default %(default)s)")
    add("-n", "--number", type=_number, default=10, help="recent calls to begin with (default %(default)s)")
    add("-q", "--text", dest="q", metavar="TEXT", help="only calls that contain this text")
    add("--verb", help="such as GET")
    add("--status", help="such as 404, 5xx or none; separate several with commas")
    add("--user", metavar="ID", help="only calls of this user")
    add("--company", metavar="ID", help="only calls of this company")
    add("--direction", choices=("incoming", "outgoing", "internal"))
    add("--application-id", metavar="ID", help="only calls sent with this application id")
    add("--route", help="only calls of this route, such as /users/{id}")
    add("--trace", metavar="ID", help="only calls of this trace")
    add("--marks", choices=("blocked", "hidden", "truncated"), help="only calls with this mark")
    add("--errors", action="store_const", const="1", help="only calls that failed")
    add("--json", action="store_true", help="print one JSON object per line")
    add("--color", choices=_COLOURS, default="auto", help="default %(default)s")


def _port(text: str) -> int:
    return _whole(text, 65_535)


def _number(text: str) -> int:
    return _whole(text, 99_999)


def _whole(text: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) <= most):
        raise argparse.ArgumentTypeError(f"takes a whole number from 0 to {most}, got {text!r}")
    return int(text)


def _id(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("takes an application id, got nothing")
    return text


def _host_name(text: str) -> str:
    if not text or any(mark in text for mark in "/:@ "):
        raise argparse.ArgumentTypeError(f"takes a host name without scheme and port, got {text!r}")
    return text


def _version() -> str:
    try:
        return version("moesif-otel")
    except PackageNotFoundError:  # run from a source tree
        return "(not installed)"


def _sandbox(options: argparse.Namespace, ended: threading.Event) -> int:
    import sqlite3

    from moesif_otel.sandbox import Sandbox

    try:
        sandbox = Sandbox(
            options.port,
            host=options.host,
            database=options.database,
            application_ids=options.application_id,
            allowed_hosts=options.allow_host,
        )
    except sqlite3.Error as error:
        _complain(f"cannot use the database {options.database}: {error}")
        return EXIT_FAILED
    last = sandbox.last_sequence()  # before it listens: a call that comes while the first lines are written is shown
    try:
        sandbox.start()
    except OSError as error:
        return _cannot_listen(f"{options.host} port {options.port}", error)
    else:
        _say(f"Moesif sandbox: {sandbox.url}/ shows what it receives; Ctrl-C ends it")
        _say("Send to it from any service that uses moesif-otel:")
        _say(f"  MOESIF_BASE_URI={sandbox.url} MOESIF_APPLICATION_ID={(options.application_id or ['any-id'])[0]}")
        _follow(sandbox, last, options, ended)
        stats = sandbox.stats()
        received, duplicates, refused = stats["received"], stats["duplicates"], stats["rejected"]
        _say(f"\nEvents received: {received}, duplicates: {duplicates}, requests refused: {refused}")
    finally:
        sandbox.close()
    return 0


def _cannot_listen(place: str, error: OSError) -> int:
    advice = "; --port 0 takes a free one" if error.errno in {errno.EADDRINUSE, errno.EACCES} else ""
    _complain(f"cannot listen on {place}: {error.strerror or error}{advice}")
    return EXIT_FAILED


def _follow(sandbox: Sandbox, last: int, options: argparse.Namespace, ended: threading.Event) -> None:
    """Print a line for each call that arrives after number `last`, until `ended`."""
    from moesif_otel.sandbox.terminal import Table

    if options.quiet:
        while not ended.wait(_SIGNAL_CHECK_S):
            pass
        return
    table = Table(colour=options.color)
    has_head = False
    while True:
        is_over = ended.wait(_FOLLOW_S)
        calls = sandbox.recent_calls(after=last, limit=_FOLLOW_ROWS + 1)
        if calls and not has_head:
            has_head = True
            _say(table.head())
        for stored in calls[-_FOLLOW_ROWS:]:
            _say(table.line(stored.row))
        if len(calls) > _FOLLOW_ROWS:
            _say("… and more than are shown here".replace("…", table.paint.safe("…")))
        last = calls[-1].sequence if calls else last
        if is_over:
            return


def _tail(options: argparse.Namespace, ended: threading.Event) -> int:
    from dataclasses import fields

    from moesif_otel.sandbox.query import Filters
    from moesif_otel.sandbox.tail import TailError, run_tail
    from moesif_otel.sandbox.terminal import Table

    names = (f.name for f in fields(Filters))
    filters = {name: value for name in names if (value := getattr(options, name))}
    try:
        return run_tail(
            options.url,
            filters,
            number=options.number,
            table=Table(colour=options.color),
            as_json=options.json,
            ended=ended,
            say=_say,
            complain=_complain,
        )
    except TailError as error:
        _complain(str(error))
        return EXIT_FAILED


def _demo(options: argparse.Namespace, ended: threading.Event) -> int:
    from moesif_otel.sandbox.demo import run_demo

    ports = (_DEFAULT_PORT, 0) if options.port is None else (options.port,)
    try:
        return run_demo(ports=ports, once=options.once, ended=ended, say=_say)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _cannot_listen(f"port {options.port}", error)


_COMMANDS: Final = {"sandbox": _sandbox, "tail": _tail, "demo": _demo}


def _doctor(options: argparse.Namespace) -> int:
    from moesif_otel._autoinstrument.doctor import diagnose, report

    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    # Problems are findings; log lines would repeat them.
    logger = logging.getLogger("moesif_otel")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        found = diagnose(program, send=options.send)
    finally:
        logger.setLevel(level)
    text = report(found, as_json=options.json)
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        _say(text)
    else:
        console = Console(soft_wrap=True)
        for line in text.splitlines():
            console.print(Text(line, style=_STYLES.get(line.split(" ", 1)[0], "")))
    return EXIT_FAILED if any(each.level == "error" for each in found) else 0


_STYLES: Final = {"ok": "green", "warning": "yellow", "error": "bold red"}


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C and SIGTERM set; another one later ends the process as it would have."""
    ended = threading.Event()
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    first_s: list[float] = []

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        ended.set()
        first_s.append(time.monotonic())
        # Programs that start others pass a Ctrl-C on which the terminal has sent already: that is one, not two.
        if first_s[-1] - first_s[0] > _SAME_SIGNAL_S:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, end)
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _complain(line: str) -> None:
    sys.stderr.write(f"moesif-otel: {line}\n")
