"""What is measured. Each measure returns lines of a table: what, value, spread, what must be reached."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
import urllib.request
from dataclasses import dataclass

from benchmarks.environments import ROOT, python_of
from benchmarks.load import Load, saturate, steady
from benchmarks.programs import ANSWERS, answer
from benchmarks.serving import Server, receiver

SETTLE_S = 1.0


@dataclass
class Line:
    """One line of the results."""

    what: str
    value: str
    spread: str = ""
    goal: str = ""


@dataclass
class Plan:
    """How long to measure."""

    rounds: int
    seconds: float


def _ratio(values: list[float], others: list[float]) -> tuple[str, str]:
    ratios = [value / other for value, other in zip(values, others, strict=True)]
    return f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f}–{max(ratios):.2f}"


@dataclass
class Round:
    """One variant's turn."""

    load: Load
    cpu_us: float
    memory_mb: float


def _turns(
    kind: str, variants: list[str], plan: Plan, size: int = 1_700, modes: dict[str, str] | None = None, **options: int
) -> dict[str, list[Round]]:
    """Let the variants serve in turns; each has a server of its own, started anew in every round."""
    found: dict[str, list[Round]] = {variant: [] for variant in variants}
    body = ANSWERS.get(size) or answer(size)
    for turn in range(plan.rounds):
        for variant in variants[turn % len(variants) :] + variants[: turn % len(variants)]:
            with (
                receiver((modes or {}).get(variant, "healthy")) as url,
                Server(kind, variant.partition(":")[0], url) as server,
            ):
                target = f"{server.url}/items/{size}"
                saturate(target, body, seconds=1, **options)
                before_s = server.cpu_s()
                load = saturate(target, body, seconds=plan.seconds, **options)
                time.sleep(SETTLE_S * 2.5)  # what was captured is delivered, and belongs to the cost
                cpu_us = (server.cpu_s() - before_s) / load.requests * 1e6
                if load.errors:
                    raise RuntimeError(f"{variant}: {load.errors} errors")
                found[variant].append(Round(load, cpu_us, server.memory_mb()))
    return found


def _rates(rounds: list[Round]) -> list[float]:
    return [each.load.rate for each in rounds]


def _p99s(rounds: list[Round]) -> list[float]:
    return [each.load.p99_ms for each in rounds]


def _cpu(rounds: list[Round]) -> list[float]:
    return [each.cpu_us for each in rounds]


def wsgi(plan: Plan) -> list[Line]:
    """Return what a saturated gunicorn worker with four threads still serves."""
    found = _turns("gunicorn", ["bare", "otel", "ours", "ours provider", "replaced"], plan)
    bare = found["bare"]
    names = {
        "otel": "OpenTelemetry's WSGI middleware alone",
        "ours": "moesif-otel",
        "ours provider": "moesif-otel, on a global SDK provider",
        "replaced": "moesifwsgi",
    }
    goals = {"ours": ("≥ 0.88", "≤ 1.3")}
    lines = []
    for variant, name in names.items():
        rate_goal, p99_goal = goals.get(variant, ("", ""))
        lines.append(Line(f"requests/s over bare: {name}", *_ratio(_rates(found[variant]), _rates(bare)), rate_goal))
        lines.append(Line(f"p99 over bare: {name}", *_ratio(_p99s(found[variant]), _p99s(bare)), p99_goal))
    over = _ratio(_rates(found["ours provider"]), _rates(found["otel"]))
    lines.append(Line("requests/s over OpenTelemetry alone: moesif-otel, on a global SDK provider", *over, "≥ 0.92"))
    return lines


def half_load(plan: Plan) -> list[Line]:
    """Return p50 and p99 at half of what the bare application can serve."""
    body = ANSWERS[1_700]
    found: dict[str, list[Load]] = {"bare": [], "ours": [], "replaced": []}
    for _ in range(plan.rounds):
        rate = 0.0
        for variant, loads in found.items():
            with receiver() as url, Server("gunicorn", variant, url) as server:
                target = f"{server.url}/items/1700"
                warm = saturate(target, body, seconds=1)
                rate = rate or warm.rate / 2
                loads.append(steady(target, body, rate, seconds=plan.seconds))
    lines = []
    for variant, name, goal in (("ours", "moesif-otel", "≤ 1.05"), ("replaced", "moesifwsgi", "")):
        for percentile in ("p50_ms", "p99_ms"):
            values = [getattr(each, percentile) for each in found[variant]]
            bare = [getattr(each, percentile) for each in found["bare"]]
            lines.append(
                Line(
                    f"{percentile[:3]} over bare at half load: {name}",
                    *_ratio(values, bare),
                    goal if "99" in percentile else "",
                )
            )
    return lines


def cpu(plan: Plan) -> list[Line]:
    """Return the CPU of the whole process for a call, over that of moesifwsgi and OpenTelemetry alone."""
    lines = []
    goals = {200: "≤ 0.30", 4_000: "≤ 0.15", 40_000: "≤ 0.06"}
    for size, goal in goals.items():
        found = _turns("gunicorn", ["bare", "otel", "ours", "ours provider", "replaced"], plan, size)
        bare = statistics.median(_cpu(found["bare"]))

        def added(variant: str, found=found, bare=bare) -> float:
            return statistics.median(_cpu(found[variant])) - bare

        text = f"bodies of {size / 1000:g} KB"
        old = added("replaced")
        lines.append(
            Line(
                f"CPU that a call adds over moesifwsgi's, {text}",
                f"{added('ours') / old:.2f}",
                f"{added('ours'):.0f} of {old:.0f} µs",
                goal,
            )
        )
        if size == 200:
            otel = added("otel")
            lines.append(
                Line(
                    f"CPU that a call adds over OpenTelemetry's, {text}",
                    f"{added('ours') / otel:.2f}",
                    f"{added('ours'):.0f} of {otel:.0f} µs",
                    "< 1",
                )
            )
            lines.append(
                Line(
                    f"CPU over OpenTelemetry alone, on a provider of the application, {text}",
                    f"+{added('ours provider') - otel:.0f} µs",
                    "",
                    "≤ +90 µs",
                )
            )
    return lines


_EVENT = """
import json, sys, time, gzip
from moesif_otel._capture.body import CapturedBody
from moesif_otel._capture.exchange import Exchange, Outcome
from moesif_otel._pipeline.sink import EventSink
from moesif_otel.settings import Settings
from benchmarks.programs import answer

sink = EventSink(Settings.of({"APPLICATION_ID": "b", "BASE_URI": sys.argv[1], "EVENT_QUEUE_SIZE": 1_000_000}))

class Pipe:
    settings, guard, budget, generation = sink.settings, sink.guard, sink.budget, 0
    def opened(self, exchange): pass
    def finished(self, exchange): pass
    finished_late = finished
pipe = Pipe()
body = answer(1_000)
request_headers = [("Host", "shop.example"), ("User-Agent", "Mozilla/5.0 (X11; Linux x86_64)"), ("Accept", "application/json"),
    ("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Authorization", "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2ln"),
    ("Accept-Encoding", "gzip"), ("X-Forwarded-For", "203.0.113.9"), ("Connection", "keep-alive"), ("Accept-Language", "en")]
response_headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Date", "x"), ("Server", "y"), ("X-Request-Id", "1")]

def one():
    exchange = Exchange(pipe, "Incoming", "POST")
    exchange.url = "https://shop.example/api/items/17?expand=owner"
    exchange.request_headers, exchange.response_headers = list(request_headers), list(response_headers)
    exchange.status, exchange.peer_address = 200, "10.1.2.3"
    for side in ("request_body", "response_body"):
        captured = CapturedBody(100_000, sink.budget)
        captured.add(body)
        setattr(exchange, side, captured)
    exchange.finish(Outcome.COMPLETE)
    exchange.fix_ids()
    return exchange

def spent(count, submit):
    started = time.process_time()
    for _ in range(count):
        exchange = one()
        if submit:
            sink.submit(exchange)
        else:
            exchange.discard()
    if submit:
        sink.force_flush(30)
    return (time.process_time() - started) / count * 1e6

spent(500, True)
found = []
for _ in range(7):
    found.append(spent(2_000, True) - spent(2_000, False))
assert not sink.stats()["dropped"], sink.stats()
print(json.dumps(found))
import os; os._exit(0)
"""


def event(plan: Plan) -> list[Line]:
    """Return the CPU from a finished call to a delivered batch."""
    del plan
    with receiver() as url:
        told = _run(["-c", _EVENT, url])
    values = json.loads(told)
    middle = statistics.median(values)
    return [
        Line(
            "CPU of one event with 1 KB bodies, finished call to delivered batch",
            f"{middle:.0f} µs",
            f"{min(values):.0f}–{max(values):.0f}",
            "≤ 40 µs",
        ),
        Line("events a second on one core", f"{1e6 / middle:,.0f}", "", "≥ 15 000"),
    ]


def _run(arguments: list[str], variant: str = "ours", **values: str) -> str:
    python = python_of("replaced" if variant == "replaced" else "ours")
    environ = {**os.environ, "VARIANT": variant, "PYTHONPATH": str(ROOT), **values}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages have bytecode; without it an import compiles
    return subprocess.run(
        [python, *arguments], check=True, capture_output=True, text=True, cwd=ROOT, env=environ
    ).stdout


def memory(plan: Plan) -> list[Line]:
    """Return the worker's memory after calls with large bodies, with a healthy and with a silent Moesif."""
    del plan
    lines = []
    for mode, variant, goal in (
        ("healthy", "bare", ""),
        ("healthy", "ours", "< 70 MB"),
        ("silent", "ours", ""),
        ("healthy", "replaced", ""),
    ):
        with receiver(mode) as url, Server("gunicorn", variant, url) as server:
            sent = 0
            while sent < 5_000:
                sent += saturate(f"{server.url}/items/40000", ANSWERS[40_000], seconds=1).requests
            name = {"ours": "moesif-otel", "replaced": "moesifwsgi", "bare": "bare"}[variant]
            lines.append(
                Line(
                    f"memory after 5 000 calls with 40 KB bodies, {mode} Moesif: {name}",
                    f"{server.memory_mb():.0f} MB",
                    "",
                    goal,
                )
            )
    return lines


def tornado(plan: Plan) -> list[Line]:
    """Return what a saturated Tornado still serves."""
    found = _turns("tornado", ["bare", "otel", "ours", "ours provider", "replaced"], plan)
    return [
        Line(
            "Tornado, requests/s over bare: moesif-otel",
            *_ratio(_rates(found["ours"]), _rates(found["bare"])),
            "≥ 0.85",
        ),
        Line(
            "Tornado, requests/s over OpenTelemetry alone: moesif-otel with it",
            *_ratio(_rates(found["ours provider"]), _rates(found["otel"])),
            "≥ 0.92",
        ),
        Line(
            "Tornado, requests/s over bare: OpenTelemetry alone", *_ratio(_rates(found["otel"]), _rates(found["bare"]))
        ),
        Line("Tornado, requests/s over bare: moesiftornado", *_ratio(_rates(found["replaced"]), _rates(found["bare"]))),
    ]


def asgi(plan: Plan) -> list[Line]:
    """Return what a saturated uvicorn with a FastAPI handler still serves."""
    found = _turns("uvicorn", ["bare", "bare provider", "otel", "ours", "ours provider", "replaced"], plan)
    return [
        Line(
            "FastAPI on uvicorn, requests/s over bare: moesif-otel",
            *_ratio(_rates(found["ours"]), _rates(found["bare"])),
            "≥ 0.88",
        ),
        Line("FastAPI on uvicorn, p99 over bare: moesif-otel", *_ratio(_p99s(found["ours"]), _p99s(found["bare"]))),
        Line(
            "FastAPI on uvicorn, requests/s over FastAPI's own spans alone: moesif-otel with them",
            *_ratio(_rates(found["ours provider"]), _rates(found["bare provider"])),
        ),
        Line(
            "FastAPI on uvicorn, requests/s over bare: OpenTelemetry alone",
            *_ratio(_rates(found["otel"]), _rates(found["bare"])),
        ),
        Line(
            "FastAPI on uvicorn, requests/s over bare: moesifasgi",
            *_ratio(_rates(found["replaced"]), _rates(found["bare"])),
        ),
    ]


def outgoing(plan: Plan) -> list[Line]:
    """Return the CPU that a `requests` call costs more."""
    found: dict[str, list[float]] = {"bare": [], "otel": [], "ours": [], "ours provider": [], "replaced": []}
    with receiver() as url:
        for _ in range(max(3, plan.rounds)):
            for variant, values in found.items():
                told = _run(["-m", "benchmarks.programs", "calls", f"{url}/upstream", "1500"], variant, MOESIF_URL=url)
                values.append(json.loads(told.splitlines()[-1])["cpu_us"])  # moesifpythonrequest prints before
    middle = {variant: statistics.median(values) for variant, values in found.items()}
    return [
        Line(
            "CPU of a `requests` call over OpenTelemetry alone: moesif-otel with it",
            f"{middle['ours provider'] - middle['otel']:+.0f} µs",
            "",
            "≤ +30 µs",
        ),
        Line("CPU of a `requests` call over bare: moesif-otel", f"{middle['ours'] - middle['bare']:+.0f} µs"),
        Line("CPU of a `requests` call over bare: OpenTelemetry alone", f"{middle['otel'] - middle['bare']:+.0f} µs"),
        Line(
            "CPU of a `requests` call over bare: moesifpythonrequest", f"{middle['replaced'] - middle['bare']:+.0f} µs"
        ),
    ]


def _read_stream(server: Server, size_bytes: int) -> None:
    with urllib.request.urlopen(f"{server.url}/stream/{size_bytes}") as answer_:
        while answer_.read(1 << 20):
            pass


def stream(plan: Plan) -> list[Line]:
    """Return the throughput of a stream of 256 MB."""
    found: dict[str, list[float]] = {"bare": [], "ours": [], "replaced": []}
    for _ in range(plan.rounds):
        for variant, values in found.items():
            with receiver() as url, Server("gunicorn", variant, url) as server:
                _read_stream(server, 1 << 20)  # gunicorn listens before its worker has imported the application
                started_s = time.perf_counter()
                _read_stream(server, 256 << 20)
                values.append(1 / (time.perf_counter() - started_s))
    return [
        Line("throughput of a 256 MB stream over bare: moesif-otel", *_ratio(found["ours"], found["bare"]), "≥ 0.97"),
        Line("throughput of a 256 MB stream over bare: moesifwsgi", *_ratio(found["replaced"], found["bare"])),
    ]


def start(plan: Plan) -> list[Line]:
    """Return what import and construction cost."""
    told = [json.loads(_run(["-m", "benchmarks.programs", "start"])) for _ in range(5 + plan.rounds)]
    lines = []
    for name, what, goal in (
        ("import_ms", "import of moesif_otel.wsgi over OpenTelemetry and moesifapi", "< 40 ms"),
        ("construction_ms", "construction of the middleware", "< 3 ms"),
    ):
        values = [each[name] for each in told]
        lines.append(Line(what, f"{statistics.median(values):.1f} ms", f"{min(values):.1f}–{max(values):.1f}", goal))
    return lines


def unhealthy(plan: Plan) -> list[Line]:
    """Return requests/s and p99 with a Moesif that is dead, slow, silent or refusing, over a healthy one."""
    modes = {f"ours:{mode}": mode for mode in ("healthy", "dead", "slow", "silent", "refusing")}
    found = _turns("gunicorn", list(modes), plan, modes=modes)
    healthy = found["ours:healthy"]
    lines = []
    for variant, mode in modes.items():
        if mode != "healthy":
            lines.append(
                Line(
                    f"requests/s over a healthy Moesif: {mode}",
                    *_ratio(_rates(found[variant]), _rates(healthy)),
                    "1 within noise",
                )
            )
            lines.append(
                Line(
                    f"p99 over a healthy Moesif: {mode}",
                    *_ratio(_p99s(found[variant]), _p99s(healthy)),
                    "1 within noise",
                )
            )
    return lines


def growth(plan: Plan) -> list[Line]:
    """Return how the cost grows: bodies, headers, connections."""
    lines = []
    short = Plan(1, plan.seconds)
    for size in (1, 1_000, 10_000, 100_000, 1_000_000):
        found = _turns("gunicorn", ["bare", "ours"], short, size)
        value, _ = _ratio(_rates(found["ours"]), _rates(found["bare"]))
        lines.append(
            Line(
                f"requests/s over bare, bodies of {size:,} bytes",
                value,
                f"+{_cpu(found['ours'])[0] - _cpu(found['bare'])[0]:.0f} µs a call",
            )
        )
    for headers in (5, 25, 95):  # gunicorn takes 100 in all
        found = _turns("gunicorn", ["bare", "ours"], short, headers=headers)
        value, _ = _ratio(_rates(found["ours"]), _rates(found["bare"]))
        lines.append(
            Line(
                f"requests/s over bare, {headers} more headers",
                value,
                f"+{_cpu(found['ours'])[0] - _cpu(found['bare'])[0]:.0f} µs a call",
            )
        )
    for connections in (1, 4, 16, 64):
        found = _turns("gunicorn", ["bare", "ours"], short, connections=connections)
        value, _ = _ratio(_rates(found["ours"]), _rates(found["bare"]))
        p99, _ = _ratio(_p99s(found["ours"]), _p99s(found["bare"]))
        lines.append(Line(f"requests/s over bare, {connections} connections", value, f"p99 ×{p99}"))
    full = _turns("gunicorn", ["ours", "ours queue"], short, modes={"ours queue": "silent"})
    value, _ = _ratio(_rates(full["ours queue"]), _rates(full["ours"]))
    lines.append(Line("requests/s with a queue that is full over one that is empty", value))
    return lines


MEASURES = {
    function.__name__: function
    for function in (wsgi, half_load, cpu, event, memory, tornado, asgi, outgoing, stream, start, unhealthy, growth)
}
