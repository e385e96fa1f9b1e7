"""An application for Flask's development server: `flask --app reloaded_app run --debug`."""

import os

import flask

app = flask.Flask(__name__)
print("application made in", os.getpid(), flush=True)


@app.get("/pid")
def pid():
    return {"pid": os.getpid()}
