"""A Flask service whose calls reach Moesif.

    MOESIF_APPLICATION_ID=... python examples/flask/app.py

Needs flask and waitress beside moesif-otel.
With MOESIF_BASE_URI=http://127.0.0.1:8765 they go to `moesif-otel sandbox` instead. PORT defaults to 8000.
"""

import os

from flask import Flask, jsonify, request
from waitress import serve

from moesif_otel.wsgi import MoesifMiddleware

app = Flask(__name__)
BOOKS = {1: {"id": 1, "title": "The Left Hand of Darkness"}}


@app.get("/books/<int:book_id>")
def get_book(book_id):
    book = BOOKS.get(book_id)
    return (book, 200) if book else ({"error": "no such book"}, 404)


@app.post("/books")
def add_book():
    book = {"id": len(BOOKS) + 1, "title": request.get_json()["title"]}
    BOOKS[book["id"]] = book
    return jsonify(book), 201


@app.get("/feed")
def feed():
    # A stream stays a stream: each line leaves when it is yielded.
    return (f'{{"line": {number}}}\n' for number in range(3)), {"Content-Type": "application/x-ndjson"}


def identify_user(app, environ, response_headers):
    return environ.get("HTTP_X_USER_ID")  # without it, the user is the `sub` of a Bearer token


def get_metadata(app, environ):
    return {"datacenter": "westus", "shelf": environ.get("HTTP_X_SHELF", "none")}


def mask_event(event):
    if "title" in event.request.body:
        event.request.body["title"] = event.request.body["title"].title()
    return event


app.wsgi_app = MoesifMiddleware(
    app.wsgi_app,
    {
        "APPLICATION_ID": os.environ["MOESIF_APPLICATION_ID"],
        "BASE_URI": os.environ.get("MOESIF_BASE_URI", "https://api.moesif.net"),
        "IDENTIFY_USER": identify_user,
        "GET_METADATA": get_metadata,
        "MASK_EVENT_MODEL": mask_event,
    },
)

if __name__ == "__main__":
    serve(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
