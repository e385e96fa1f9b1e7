"""Calls that no capture of ours sees: urllib3 used directly, under its own instrumentation; then the process ends."""

import http.server
import threading

import urllib3


class Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *args):
        pass


server = http.server.HTTPServer(("127.0.0.1", 0), Hello)
threading.Thread(target=server.serve_forever, daemon=True).start()
for number in range(2):
    answer = urllib3.PoolManager().request("GET", f"http://127.0.0.1:{server.server_port}/hello?n={number}")
    print(answer.status, flush=True)
