"""The health check of the images, as a process of its own, against what a service answers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from infra.docker import health
from tests.conftest import free_port


@contextmanager
def answering(status: int, body: str) -> Iterator[int]:
    """The port of a server that answers every path with this, and a wrong path with 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == health.PATH else 404)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def check(*arguments: str, metrics_port: int) -> tuple[int, str]:
    """Exit status and what it prints, as an engine runs it: without anything that is installed."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(Path(health.__file__)), *arguments],
        env={**os.environ, "PORTCULLIS_METRICS_PORT": str(metrics_port)},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_process_that_takes_work_is_healthy() -> None:
    with answering(200, "ok\n") as port:
        assert check(metrics_port=port) == (0, "")


def test_one_that_takes_none_is_not() -> None:
    with answering(503, "no\n") as port:
        assert check(metrics_port=port) == (1, f"port {port}: no\n")


def test_another_port_can_be_asked() -> None:
    with answering(200, "ok\n") as metrics, answering(503, "auth is missing") as edge:
        assert check(str(edge), metrics_port=metrics) == (1, f"port {edge}: auth is missing\n")


def test_a_process_that_does_not_listen_is_not() -> None:
    port = free_port()
    status, said = check(metrics_port=port)
    assert status == 1
    assert "refused" in said


def test_one_that_hangs_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(health, "TIMEOUT_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "timed out" in str(health.problem(silent.getsockname()[1]))
