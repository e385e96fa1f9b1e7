"""Runs the measures side by side and writes `RESULTS.md`."""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import shutil
from pathlib import Path

from benchmarks.environments import python_of, versions
from benchmarks.measures import MEASURES, Line, Plan

RESULTS = Path(__file__).with_name("RESULTS.md")
_PACKAGES = (
    "opentelemetry-sdk",
    "opentelemetry-instrumentation-wsgi",
    "gunicorn",
    "flask",
    "fastapi",
    "uvicorn",
    "tornado",
    "requests",
    "orjson",
)
_REPLACED = ("moesifwsgi", "moesiftornado", "moesifpythonrequest", "moesifasgi")


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What moesif-otel costs, side by side.")
    parser.add_argument("--only", help=f"measures with commas between them: {', '.join(MEASURES)}")
    parser.add_argument("--quick", action="store_true", help="shorter rounds, for a first look")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md with --only, too")
    parser.add_argument("--rounds", type=int, help="rounds of each measure (default 5, quick 2)")
    options = parser.parse_args()
    plan = Plan(options.rounds or (2 if options.quick else 5), 2.0 if options.quick else 5.0)
    for environment in ("ours", "replaced"):
        python_of(environment)
    sections: list[tuple[str, list[Line]]] = []
    for name in options.only.split(",") if options.only else MEASURES:
        lines = MEASURES[name](plan)
        sections.append((name, lines))
        for line in lines:
            print(f"{line.what:85} {line.value:>9}  {line.spread:18} {line.goal}", flush=True)
    if options.write or not options.only:
        RESULTS.write_text(_page(sections, plan))
        print(f"written to {RESULTS.name}")


def _page(sections: list[tuple[str, list[Line]]], plan: Plan) -> str:
    installed = {**versions("ours", _PACKAGES), **versions("replaced", _REPLACED)}
    shown = ", ".join(f"{name} {version}" for name, version in installed.items())
    cores = len(os.sched_getaffinity(0))
    load = "wrk" if shutil.which("wrk") else "our own generator"
    made = (
        f"{dt.datetime.now(tz=dt.timezone.utc):%d %B %Y}, made by `python -m benchmarks`. Python {platform.python_version()}, "
        f"{platform.system()}, {cores} cores shared by server, load ({load}) and receiver. {shown}."
    )
    how = (
        f"{plan.rounds} rounds of {plan.seconds:g} s; variants take turns, ratios are taken round by round; median, lowest and "
        "highest. One gunicorn worker with four threads, a Flask handler with 1.7 KB of JSON each way and four connections, "
        "unless a line says otherwise. Everything is captured, converted and delivered."
    )
    text = ["# What it costs", "", made, "", how]
    for name, lines in sections:
        text += ["", f"## {name}", "", "| | measured | spread | to reach |", "|---|---|---|---|"]
        text += [f"| {line.what} | {line.value} | {line.spread} | {line.goal} |" for line in lines]
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
