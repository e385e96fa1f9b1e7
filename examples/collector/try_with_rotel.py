"""A Collector for trying this example, from the package registry: `pip install rotel; python try_with_rotel.py [port]`.

MOESIF_APPLICATION_ID names the application, MOESIF_BASE_URI where to forward (a sandbox, say). Ends with Ctrl-C.
rotel is an engine with an OTLP receiver and exporter; it queues in memory only.
"""

import os
import subprocess
import sys
from pathlib import Path

import rotel


def words(port: str) -> list[str]:
    """Return the command."""
    base_uri = os.environ.get("MOESIF_BASE_URI", "https://api.moesif.net")
    return [
        str(Path(rotel.__file__).with_name("rotel-agent")),
        "start",
        *("--otlp-http-endpoint", f"127.0.0.1:{port}"),
        *("--otlp-grpc-endpoint", "127.0.0.1:0"),
        *("--exporter", "otlp", "--otlp-exporter-protocol", "http", "--otlp-exporter-compression", "gzip"),
        *("--otlp-exporter-endpoint", base_uri),  # /v1/traces is appended
        *("--otlp-receiver-metrics-disabled", "--otlp-receiver-logs-disabled"),
        *("--otlp-exporter-custom-headers", f"X-Moesif-Application-Id={os.environ['MOESIF_APPLICATION_ID']}"),
    ]


if __name__ == "__main__":
    try:
        sys.exit(subprocess.call(words(sys.argv[1] if len(sys.argv) > 1 else "4318")))
    except KeyboardInterrupt:
        sys.exit(0)
