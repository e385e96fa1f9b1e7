"""A Flask application that serves itself a few requests over TCP, says what the client saw, and ends."""

import http.client
import json
import os
import sys
import threading

print("application imported", flush=True)

import flask  # noqa: E402
from werkzeug.serving import make_server  # noqa: E402

app = flask.Flask(__name__)


@app.post("/echo")
def echo():
    return {"secret_answer": 42, "got": flask.request.get_json()}


@app.get("/fetch")
def fetch():
    import requests

    return {"upstream": requests.get(f"http://127.0.0.1:{port}/upstream?q=1", timeout=10).json()}


@app.get("/upstream")
def upstream():
    return {"traceparent": flask.request.headers.get("traceparent")}


server = make_server("127.0.0.1", 0, app, threaded=True)
port = server.server_port
threading.Thread(target=server.serve_forever, daemon=True).start()


def call(method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return {"status": answer.status, "body": text, "headers": [list(header) for header in answer.getheaders()]}


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CALLS = {
    "echo": lambda: call("POST", "/echo", '{"card": "plum 4711"}', **{"Content-Type": "application/json", "X-User": "mary"}),
    "traced": lambda: call("POST", "/echo", '{"card": 1}', **{"Content-Type": "application/json", "traceparent": TRACE}),
    "fetch": lambda: call("GET", "/fetch"),
}
answers = [CALLS[name]() for name in sys.argv[1:] or ["echo"]]
server.shutdown()
for thread in threading.enumerate():
    if "process_request_thread" in thread.name:
        thread.join()
print(json.dumps({"answers": answers, "pid": os.getpid()}), flush=True)
