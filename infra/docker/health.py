"""The health check of the images: exit status 0 when the process takes work, else 1 and what is wrong. Standard library only.

It asks /health/ready on the port of the metrics, or on the one that is named: the edge's own says whether a detection would be
answered, for which every other service is needed.
"""

from __future__ import annotations

import os
import socket
import sys

TIMEOUT_SECONDS = 2.5
HOST = "127.0.0.1"
PATH = "/health/ready"


def problem(port: int) -> str | None:
    """What is wrong with the process that listens on this port, or None."""
    try:
        with socket.create_connection((HOST, port), TIMEOUT_SECONDS) as connection:
            # HTTP 1.0 needs no Host, whatever names the service answers to.
            connection.sendall(f"GET {PATH} HTTP/1.0\r\n\r\n".encode())
            with connection.makefile("rb") as answer:
                head, _, body = answer.read().partition(b"\r\n\r\n")
    except OSError as error:
        return f"port {port}: {error}"
    return None if head.split(maxsplit=2)[1:2] == [b"200"] else f"port {port}: {body.decode(errors='replace').strip()}"


if __name__ == "__main__":
    found = problem(int(sys.argv[1] if len(sys.argv) > 1 else os.environ["PORTCULLIS_METRICS_PORT"]))
    if found is not None:
        print(found)
        raise SystemExit(1)
