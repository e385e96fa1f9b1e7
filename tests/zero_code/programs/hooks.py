"""Callbacks, named by import path."""

print("hooks imported", flush=True)


def identify_user(app, environ):
    return environ.get("HTTP_X_USER")


def metadata(app, environ):
    return {"app": type(app).__name__}


def tornado_user(handler):
    return handler.request.headers.get("X-User")
