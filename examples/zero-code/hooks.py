"""Callbacks for Moesif, named by import path in the environment: imported when the first call needs them."""


def identify_user(app, environ):
    """Say who calls: the arguments are the framework's application object and the WSGI environ."""
    return environ.get("HTTP_X_USER")
