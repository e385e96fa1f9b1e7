"""The small API that the demo calls: a Flask app with users, orders, a stream, an error and an upload.

Owns: `make_api`, and the Moesif options that a service like it would set.
Threads: those of its server; its data is one dict that requests only add to.
Never: knows that it is captured (the middleware is put around it outside).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, jsonify, request, stream_with_context

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["company_of", "make_api", "metadata_of"]

_PRICES_CENTS = {"tea": 450, "coffee": 900, "cup": 1250}


def make_api() -> Flask:
    """Make the app."""
    app = Flask("moesif_otel_demo")
    _add_users(app)
    _add_orders(app)

    @app.post("/uploads")
    def upload() -> tuple[Response, int]:
        size_bytes = 0
        while piece := request.stream.read(16_384):
            size_bytes += len(piece)
        return jsonify(received_bytes=size_bytes, content_type=request.content_type), 201

    @app.get("/reports/daily")
    def report() -> Response:
        raise RuntimeError("the report's database is away")

    @app.errorhandler(RuntimeError)
    def failed(error: RuntimeError) -> tuple[Response, int]:
        return jsonify(error="internal", message=str(error)), 500

    return app


def _add_users(app: Flask) -> None:
    users: dict[str, dict[str, Any]] = {
        "ann": {"id": "ann", "name": "Ann Arbor", "plan": "gold"},
        "bob": {"id": "bob", "name": "Bob Bell", "plan": "free"},
    }

    @app.get("/users")
    def list_users() -> Response:
        return jsonify(list(users.values()))

    @app.get("/users/<user_id>")
    def get_user(user_id: str) -> tuple[Response, int]:
        user = users.get(user_id)
        return (jsonify(user), 200) if user else (jsonify(error="not_found", user_id=user_id), 404)

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
        return jsonify(token="a-token-that-nobody-should-see", expires_in=3600)  # noqa: S106 - planted, to be hidden


def _add_orders(app: Flask) -> None:
    numbers = itertools.count(1001)

    @app.get("/orders")
    def list_orders() -> Response:
        wanted = request.args.get("status")
        orders = [{"id": number, "status": "paid" if number % 2 else "open"} for number in range(1, 41)]
        return jsonify([order for order in orders if wanted in {None, order["status"]}])

    @app.post("/orders")
    def add_order() -> tuple[Response, int, dict[str, str]]:
        items: list[dict[str, Any]] = request.get_json()["items"]
        total = sum(_PRICES_CENTS.get(item["product"], 0) * item["quantity"] for item in items)
        order_id = next(numbers)
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
                yield f"{number},{product},{number % 3 + 1}\n"

        return Response(stream_with_context(lines()), mimetype="text/csv")


def company_of(_app: Any, environ: dict[str, Any]) -> str | None:
    """Identify the company: this API's clients name theirs in a header."""
    return environ.get("HTTP_X_COMPANY")


def metadata_of(_app: Any, environ: dict[str, Any]) -> dict[str, Any]:
    """Give metadata of the call."""
    return {"region": environ.get("HTTP_X_REGION", "eu-central"), "service": "demo-shop"}
