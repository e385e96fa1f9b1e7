"""A Flask service that knows nothing of Moesif.

With `pip install '../..[auto]' flask gunicorn`, in this folder:

    MOESIF_APPLICATION_ID=… MOESIF_IDENTIFY_USER=hooks:identify_user opentelemetry-instrument python app.py

or `… opentelemetry-instrument gunicorn app:app`. Options from a file (`pip install opentelemetry-configuration`):

    MOESIF_APPLICATION_ID=… OTEL_CONFIG_FILE=otel-config.yaml opentelemetry-instrument python app.py

OTEL_TRACES_EXPORTER, OTEL_METRICS_EXPORTER and OTEL_LOGS_EXPORTER say where telemetry goes besides; `none` is nowhere.
With MOESIF_BASE_URI=http://127.0.0.1:8765 calls go to `moesif-otel sandbox`. PORT defaults to 5000.
"""

import os

import flask

app = flask.Flask(__name__)
orders = []


@app.post("/orders")
def order():
    """Take an order."""
    orders.append(flask.request.get_json())
    return {"number": len(orders)}, 201


@app.get("/orders/<int:number>")
def show(number):
    """Show an order."""
    if not 0 < number <= len(orders):
        return {"error": "no such order"}, 404
    return orders[number - 1]


if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "5000")))
