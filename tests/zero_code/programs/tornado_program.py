"""Two Tornado applications on one server port each, one with a WSGI application inside: `tornado_program.py <port>`."""

import asyncio
import sys

import tornado.autoreload
import tornado.web
import tornado.wsgi


class Echo(tornado.web.RequestHandler):
    def post(self):
        self.set_status(201)
        self.write({"got": self.request.body.decode()})


class Fail(tornado.web.RequestHandler):
    def get(self):
        raise LookupError


def wsgi_app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"from WSGI"]


def make_app(**settings):
    return tornado.web.Application(
        [
            ("/echo", Echo),
            ("/fail", Fail),
            ("/wsgi", tornado.web.FallbackHandler, {"fallback": tornado.wsgi.WSGIContainer(wsgi_app)}),
        ],
        **settings,
    )


async def main():
    make_app(autoreload="--reload" in sys.argv).listen(int(sys.argv[1]), "127.0.0.1")
    for path in sys.argv[2:]:
        if not path.startswith("--"):
            tornado.autoreload.watch(path)
    tornado.autoreload.add_reload_hook(lambda: print("restarting", flush=True))
    print("listening", flush=True)
    await asyncio.Event().wait()


asyncio.run(main())
