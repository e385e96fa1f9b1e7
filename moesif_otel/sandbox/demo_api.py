"""The small API that the demo calls, and the payment service that it calls itself.

A Flask app with users, orders, payments, streams, an error and uploads; it does not know that it is captured. Its data
is a dict that requests only add to.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any, Final

import requests
from flask import Flask, Response, jsonify, redirect, request, stream_with_context

from moesif_otel.sandbox.demo_traffic import PNG

if TYPE_CHECKING:
    from collections.abc import Iterator

    from werkzeug.wrappers import Response as AnyResponse

__all__ = ["company_of", "make_api", "make_payments", "metadata_of"]

_PRICES_CENTS: Final = {"tea": 450, "coffee": 900, "cup": 1250}
_CALL_TIMEOUT_S: Final = 5


def make_api(payments_url: str, shipping_url: str) -> Flask:
    """Make the app.

    Args:
        payments_url: A service that answers.
        shipping_url: One that nobody listens to.
    """
    app = Flask("moesif_otel_demo")
    _add_users(app)
    _add_orders(app)
    _add_calls_to_others(app, payments_url, shipping_url)

    @app.post("/uploads")
    def upload() -> tuple[Response, int]:
        size_bytes = 0
        while piece := request.stream.read(16_384):
            size_bytes += len(piece)
        return jsonify(received_bytes=size_bytes, content_type=request.content_type), 201

    @app.get("/reports/daily")
    def report() -> Response:
        time.sleep(0.12)
        raise RuntimeError("the report's database is down")

    @app.get("/products/<name>/picture")
    def picture(name: str) -> Response:
        del name
        return Response(PNG, mimetype="image/png")

    @app.errorhandler(RuntimeError)
    def failed(error: RuntimeError) -> tuple[Response, int]:
        return jsonify(error="internal", message=str(error)), 500

    return app


def _add_users(app: Flask) -> None:
    users: dict[str, dict[str, Any]] = {
        "ann": {"id": "ann", "name": "Ann Arbor", "plan": "gold", "addresses": [{"city": "Oslo", "zip": "0150"}]},
        "bob": {"id": "bob", "name": "Bob Bell", "plan": "free", "addresses": []},
    }

    @app.get("/users")
    def list_users() -> Response:
        return jsonify(list(users.values()))

    @app.get("/users/<user_id>")
    def get_user(user_id: str) -> tuple[Response, int]:
        user = users.get(user_id)
        return (jsonify(user), 200) if user else (jsonify(error="not_found", user_id=user_id), 404)

    @app.patch("/users/<user_id>")
    def change_user(user_id: str) -> Response:
        return jsonify({**users.get(user_id, {"id": user_id}), **request.get_json()})

    @app.post("/users")
    def add_user() -> tuple[Response, int]:
        given = request.get_json(silent=True)
        if not isinstance(given, dict) or not given.get("id"):
            return jsonify(error="bad_request", message="id is missing"), 400
        users[str(given["id"])] = {name: given.get(name) for name in ("id", "name", "plan")}
        return jsonify(users[str(given["id"])]), 201

    @app.post("/login")
    def login() -> Response:
        request.get_json()
        time.sleep(0.04)  # as a password hash takes
        answer = jsonify(token="a-token-that-nobody-should-see", expires_in=3600)  # noqa: S106 - planted, to be hidden
        answer.set_cookie("session", "a-session-that-nobody-should-see", httponly=True)
        return answer

    @app.post("/sessions")
    def sign_in() -> AnyResponse:
        return redirect(request.form.get("next", "/"), 303)


def _add_orders(app: Flask) -> None:
    numbers = itertools.count(1001)

    @app.get("/orders")
    def list_orders() -> Response:
        wanted = request.args.get("status")
        orders = [{"id": number, "status": "paid" if number % 2 else "open"} for number in range(1, 41)]
        time.sleep(0.008)
        return jsonify([order for order in orders if wanted in {None, order["status"]}])

    @app.get("/old/orders")
    def moved() -> AnyResponse:
        return redirect("/orders", 301)

    @app.post("/orders")
    def add_order() -> tuple[Response, int, dict[str, str]]:
        items: list[dict[str, Any]] = request.get_json()["items"]
        total = sum(_PRICES_CENTS.get(item["product"], 0) * item["quantity"] for item in items)
        order_id = next(numbers)
        time.sleep(0.015)
        return jsonify(id=order_id, items=items, total_cents=total), 201, {"Location": f"/orders/{order_id}"}

    @app.delete("/orders/<int:order_id>")
    def cancel(order_id: int) -> tuple[str, int]:
        del order_id
        return "", 204

    @app.get("/orders/export")
    def export() -> Response:
        def lines() -> Iterator[str]:
            yield "id,product,quantity\n"
            for number, product in enumerate(itertools.islice(itertools.cycle(_PRICES_CENTS), 500), start=1):
                if number % 100 == 0:
                    time.sleep(0.01)
                yield f"{number},{product},{number % 3 + 1}\n"

        return Response(stream_with_context(lines()), mimetype="text/csv")

    @app.get("/events")
    def events() -> Response:
        def stream() -> Iterator[str]:
            for number, status in enumerate(("received", "paid", "packed", "sent")):
                time.sleep(0.02)
                yield f'id: {number}\nevent: order\ndata: {{"order": 1001, "status": "{status}"}}\n\n'

        return Response(stream_with_context(stream()), mimetype="text/event-stream")


def _add_calls_to_others(app: Flask, payments_url: str, shipping_url: str) -> None:
    def post(path: str, body: Any) -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False  # a proxy of the environment does not lead to this machine
            key = {"Authorization": "Bearer sk_live_nobody_should_see_this"}
            return session.post(payments_url + path, json=body, headers=key, timeout=_CALL_TIMEOUT_S)

    @app.post("/orders/<int:order_id>/pay")
    def pay(order_id: int) -> tuple[Response, int]:
        given = request.get_json()
        scored = post("/scores", {"order": order_id, "amount_cents": given["amount_cents"]})
        charged = post("/charges", {"order": order_id, **given})
        if charged.status_code != requests.codes.created:
            return jsonify(error="payment_failed", order=order_id, reason=charged.json()["error"]), 502
        return jsonify(order=order_id, paid=True, risk=scored.json()["risk"]), 200

    @app.get("/orders/<int:order_id>/shipping")
    def shipping(order_id: int) -> tuple[Response, int]:
        try:
            with requests.Session() as session:
                session.trust_env = False
                session.get(f"{shipping_url}/parcels?order={order_id}", timeout=_CALL_TIMEOUT_S)
        except requests.ConnectionError:
            return jsonify(order=order_id, state="unknown", message="the carrier does not answer"), 200
        return jsonify(order=order_id, state="sent"), 200


def make_payments() -> Flask:
    """Make the service that the API pays with: it takes even orders' cards only."""
    app = Flask("moesif_otel_demo_payments")

    @app.post("/scores")
    def score() -> Response:
        time.sleep(0.018)
        return jsonify(risk="low", score=12)

    @app.post("/charges")
    def charge() -> tuple[Response, int]:
        time.sleep(0.05)
        if request.get_json()["order"] % 2 == 0:
            return jsonify(error="card_declined"), 402
        return jsonify(id="ch_1", status="succeeded"), 201

    return app


def company_of(_app: Any, environ: dict[str, Any]) -> str | None:
    """Identify the company: this API's clients name theirs in a header."""
    return environ.get("HTTP_X_COMPANY")


def metadata_of(_app: Any, environ: dict[str, Any]) -> dict[str, Any]:
    """Return metadata of the call."""
    return {"region": environ.get("HTTP_X_REGION", "eu-central"), "service": "demo-shop"}
