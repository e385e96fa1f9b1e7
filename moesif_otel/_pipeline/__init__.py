"""From a finished call to its event: tracer providers, span binding, callbacks, governance of one request."""
