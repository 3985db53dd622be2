"""The edge's configuration: where it listens, what it accepts, how much at a time."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator

from libs.common.settings import CommonSettings


def _listed(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


class EdgeSettings(CommonSettings):
    """`PORTCULLIS_*`; lists are separated by commas."""

    edge_host: str = "127.0.0.1"
    """The address that it listens on; `0.0.0.0`: every one of this machine."""
    edge_port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """The port that it listens on; 0: a free one."""
    edge_socket_fd: Annotated[int, Field(ge=0)] | None = None
    """A listening socket that this process has inherited; all replicas may share one. Host and port are not used then."""

    allowed_hosts: str = "localhost,127.0.0.1,[::1]"
    """Names in the Host header that are answered (without port). `*.example.com`: its subdomains; `*`: any."""
    cors_origins: str = ""
    """Origins whose pages may call the API from a browser; `*`: any."""
    trusted_proxies: str = ""
    """Addresses or networks whose X-Forwarded-For is believed; without it the caller's address is the connection's."""

    request_timeout_seconds: Annotated[float, Field(gt=0, le=300)] = 10.0
    """The deadline of a call; `X-Request-Timeout` may lower it."""
    header_timeout_seconds: Annotated[float, Field(gt=0)] = 10.0
    """How long the head of a request may take to arrive."""
    body_timeout_seconds: Annotated[float, Field(gt=0)] = 10.0
    """How long the body of a request may take to arrive."""
    read_timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """How long a connection is kept whose caller takes nothing of what waits for it."""
    keep_alive_seconds: Annotated[int, Field(ge=1)] = 75
    """How long an idle connection is kept; longer than load balancers keep theirs, so that they close first."""
    edge_stop_grace_seconds: Annotated[float, Field(ge=0)] = 1.5
    """On SIGTERM, how long idle connections stay open for one more request, which is answered with `Connection: close`."""

    max_header_bytes: Annotated[int, Field(ge=1024)] = 16 * 1024
    """Bytes of the head of a request: its first line and all headers."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1_310_720
    """The largest legal text is 100 000 characters as surrogate pairs, `\\uXXXX\\uXXXX`: 1 200 000 bytes; and some around it."""
    edge_max_in_flight: Annotated[int, Field(ge=1)] = 512
    """Calls worked on at a time; further ones are refused at once."""
    edge_min_in_flight: Annotated[int, Field(ge=1)] = 16
    """Single texts that are let through to the stages at a time, however long they take; between this and the bound of all calls
    the limit follows their latency."""
    edge_tolerated_wait_ms: Annotated[float, Field(gt=0)] = 250.0
    """How much longer than on an idle gateway a single text may take before fewer are let through; without the time that the
    primary engine takes of it."""
    edge_max_buffered_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024**2
    """Bytes of all bodies held at a time."""
    max_batch_body_bytes: Annotated[int, Field(ge=1024)] = 16 * 1024**2
    """The largest JSON list of texts. NDJSON may be of any length; it is a line of it that `PORTCULLIS_MAX_BODY_BYTES` bounds."""
    batch_body_timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    """How long a JSON list of texts may take to arrive."""
    batch_idle_seconds: Annotated[float, Field(gt=0)] = 60.0
    """How long a batch waits for the next piece of an upload, and for its reader to take the next lines."""
    edge_max_batches: Annotated[int, Field(ge=1)] = 32
    """Batches answered at a time; further ones are refused at once."""
    edge_max_batch_buffered_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024**2
    """Bytes of all JSON lists of texts held at a time."""
    edge_max_connections: Annotated[int, Field(ge=1)] = 10_000
    """Connections open at a time; further ones are told `overloaded` at once."""
    console_url: str | None = None
    """Where the console is, http://host:port; what is asked below /console is asked there. Unset: nothing is at /console."""

    @field_validator("console_url")
    @classmethod
    def _is_plain_http(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"http://[^/?#@\s]+/?", url):
            raise ValueError("not an address such as http://console:4318")
        return url.rstrip("/") if url is not None else None

    @property
    def allowed_host_names(self) -> tuple[str, ...]:
        return tuple(name.lower() for name in _listed(self.allowed_hosts))

    @property
    def cors_origin_names(self) -> tuple[str, ...]:
        return _listed(self.cors_origins)

    @property
    def trusted_proxy_networks(self) -> tuple[str, ...]:
        return _listed(self.trusted_proxies)
