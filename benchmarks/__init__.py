"""What moesif-otel costs, beside the bare application, OpenTelemetry alone and the packages that it replaces.

`python -m benchmarks` runs everything in one go and writes `benchmarks/RESULTS.md`; `--only wsgi,memory` chooses,
`--quick` takes shorter rounds. Variants take turns in each round and ratios are taken round by round, so that a machine
whose speed drifts disturbs all of them alike. `python benchmarks/fuzz_events.py` tries the parsers on random input.
"""
