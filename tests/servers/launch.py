"""Runs `module:application` on a server that has no command of its own: `launch.py <server> <port> <module:name>`."""

from __future__ import annotations

import importlib
import socketserver
import sys


def wsgiref(app, port):
    from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

    class Server(socketserver.ThreadingMixIn, WSGIServer):
        daemon_threads = True

    class Handler(WSGIRequestHandler):
        def log_message(self, *arguments):
            pass

    make_server("127.0.0.1", port, app, Server, Handler).serve_forever()


def werkzeug(app, port):
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        def log(self, *arguments):
            pass

    make_server("127.0.0.1", port, app, threaded=True, request_handler=Handler).serve_forever()


def waitress(app, port):
    from waitress import serve

    serve(app, host="127.0.0.1", port=port, threads=4, _quiet=True)


def cheroot(app, port):
    from cheroot.wsgi import Server

    Server(("127.0.0.1", port), app, numthreads=4).safe_start()


def gevent(app, port):
    from gevent.monkey import patch_all

    patch_all()
    from gevent.pywsgi import WSGIServer

    WSGIServer(("127.0.0.1", port), app if callable(app) else load(app), log=None).serve_forever()


def load(name):
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


if __name__ == "__main__":
    server, port, name = sys.argv[1:]
    # gevent wants to patch before the application is imported.
    globals()[server](name if server == "gevent" else load(name), int(port))
