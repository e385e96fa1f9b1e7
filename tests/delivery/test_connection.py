"""The seams of `requests`, urllib3 and `http.client` that deadlines hang on: canaries for new releases."""

from __future__ import annotations

import http.client
import queue

import pytest
import requests
import urllib3

from moesif_otel._delivery import connection
from tests.faults.fault_server import FaultServer


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_our_pools_and_connections_are_the_ones_in_use(scheme) -> None:
    """urllib3 makes our pool with our connection, response and idle list, directly and behind a proxy."""
    session = connection.new_session(3, None)
    adapter = session.get_adapter(f"{scheme}://host/")
    for made in (adapter.poolmanager, adapter.proxy_manager_for("http://proxy:1")):
        pool = made.connection_from_url(f"{scheme}://host/")
        assert type(pool) is connection._POOLS[scheme]
        assert isinstance(pool.pool, connection._IdleConnections)
        assert pool.ConnectionCls.response_class is connection._DeadlineResponse


def test_http_client_reads_through_fp() -> None:
    """`HTTPResponse` still reads everything through `fp`, and a connection still makes it of `response_class`."""
    assert http.client.HTTPConnection.response_class is http.client.HTTPResponse
    with FaultServer() as server:
        seen = []

        class Reader(connection._DeadlineReader):
            def readinto(self, buffer):
                seen.append(len(buffer))
                return super().readinto(buffer)

        original, connection._DeadlineReader = connection._DeadlineReader, Reader
        try:
            with connection.deadline(5):
                connection.new_session(1, None).get(server.url, timeout=5)
        finally:
            connection._DeadlineReader = original
        assert seen


def test_a_deadline_that_is_over_raises_in_reading_and_sending() -> None:
    """Nothing is read or sent once the deadline is over."""
    with FaultServer() as server, connection.deadline(-1), pytest.raises(requests.RequestException):
        connection.new_session(1, None).get(server.url, timeout=5)


def test_deadlines_nest() -> None:
    """An inner deadline cannot be later than the outer one, and ends with its block."""
    with connection.deadline(100):
        with connection.deadline(1000):
            assert connection._left_s() <= 100
        with connection.deadline(1):
            assert connection._left_s() <= 1
        assert connection._left_s() > 50
    assert connection._left_s() is None


def test_idle_connections_behave_like_a_lifo_queue() -> None:
    """urllib3's use of its queue: last in first out, Full and Empty, its size."""
    idle = connection._IdleConnections(2)
    idle.put("a")
    idle.put("b", block=False)
    with pytest.raises(queue.Full):
        idle.put("c")
    assert idle.qsize() == 2
    assert [idle.get(block=False), idle.get(timeout=1)] == ["b", "a"]
    with pytest.raises(queue.Empty):
        idle.get()


def test_nothing_is_retried_by_the_layers_below() -> None:
    """`requests` is told to retry nothing, so that one call is one POST."""
    adapter = connection.new_session(1, None).get_adapter("https://x/")
    assert adapter.max_retries.total == 0
    assert isinstance(adapter.max_retries, urllib3.Retry)
