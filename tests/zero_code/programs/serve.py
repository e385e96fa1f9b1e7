"""Serve the composite application: `serve.py <server> <port>`."""

import sys

from composite import application

server, port = sys.argv[1], int(sys.argv[2])

if server == "wsgiref":
    from wsgiref.simple_server import make_server

    make_server("127.0.0.1", port, application).serve_forever()
elif server == "werkzeug":
    from werkzeug.serving import run_simple

    run_simple("127.0.0.1", port, application, threaded=True)
elif server == "waitress":
    import waitress

    waitress.serve(application, host="127.0.0.1", port=port)
elif server == "cheroot":
    from cheroot.wsgi import Server

    Server(("127.0.0.1", port), application).start()
elif server == "gevent":
    from gevent.pywsgi import WSGIServer

    WSGIServer(("127.0.0.1", port), application).serve_forever()
