"""Which engine is asked, how long, and when its breaker opens. All of it from `PORTCULLIS_*`."""

from __future__ import annotations

import re
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator

from libs.common.settings import CommonSettings
from libs.common.subjects import DEFAULT_POOL
from services.detector_proxy.breaker import BreakerPolicy
from services.detector_proxy.ports import EngineKind

Seconds = Annotated[float, Field(gt=0, le=600, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

# Names end up in subjects, answers and metrics.
_NAME = r"[A-Za-z0-9._:/@-]{1,128}"
_POOL_NAME = "[a-z0-9_-]{1,32}"
_POOL = re.compile(f"pool:({_POOL_NAME})", re.ASCII)


class DetectorProxySettings(CommonSettings):
    """Without `engine_url` the fallback pool is the engine."""

    engine_kind: EngineKind | None = None
    """`detect`, `tei`, `kserve` or `pool`; goes with `engine_url`."""
    engine_url: str | None = None
    """`detect`, `tei`: the server's base URL. `kserve`: the model's, http://host:port/v2/models/NAME. `pool`: `pool:NAME`."""
    engine_name: Annotated[str | None, Field(pattern=f"^{_NAME}$")] = None
    """What `endpoint` says when this engine has answered, in place of what it calls itself."""
    engine_token: SecretStr | None = None
    """Sent to an HTTP engine as `Authorization: Bearer`."""
    engine_timeout_seconds: Seconds = 2.0
    """How long the primary engine may take for a text; then it has failed, and the fallback is asked."""
    engine_threshold: Rate = 0.5
    """For callers that name none and engines that were shipped with none."""
    engine_max_concurrency: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Calls of the engine at a time, in each replica; beyond it a text goes to the fallback at once."""
    engine_batch_concurrency: Annotated[int, Field(ge=1, le=10_000)] = 16
    """Calls of an HTTP engine at a time for the texts of batches and jobs, in each replica, beside those for single texts."""
    engine_benign_labels: str = "benign,safe,legit,label_0"
    """`tei`: the labels, comma-separated and in any case, that mean "not malicious"; all others mean that it is."""

    fallback_pool: Annotated[str, Field(pattern=f"^{_POOL_NAME}$")] = DEFAULT_POOL
    """The pool of workers that answers when the primary engine does not, or is the engine where there is no other."""
    fallback_max_concurrency: Annotated[int, Field(ge=1, le=10_000)] = 512
    """Texts that are with the fallback pool at a time, from each replica of the proxy."""

    breaker_failures: Annotated[int, Field(ge=1, le=10)] = 5
    """Failures in a row that open the breaker of an engine."""
    breaker_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.5
    """The part of the calls of late whose failure opens it, too."""
    breaker_minimum_calls: Annotated[int, Field(ge=1, le=10_000)] = 10
    """So many calls there must have been of late for that."""
    breaker_window_seconds: Seconds = 10.0
    """How long ago "of late" is at most."""
    breaker_open_seconds: Seconds = 1.0
    """How long it stays open, until a single call may try the engine; doubled each time that this fails."""
    breaker_open_max_seconds: Seconds = 4.0
    """No longer than this."""

    @property
    def breaker_policy(self) -> BreakerPolicy:
        return BreakerPolicy(
            failure_threshold=self.breaker_failures,
            failure_rate=self.breaker_rate,
            minimum_calls=self.breaker_minimum_calls,
            window_seconds=self.breaker_window_seconds,
            open_seconds=self.breaker_open_seconds,
            open_max_seconds=self.breaker_open_max_seconds,
        )

    @property
    def engine_pool(self) -> str:
        """The name in `pool:NAME`."""
        match = _POOL.fullmatch(self.engine_url or "")
        return match.group(1) if match else ""

    @property
    def benign_labels(self) -> frozenset[str]:
        return frozenset(label.strip().lower() for label in self.engine_benign_labels.split(",") if label.strip())

    @model_validator(mode="after")
    def _engine_is_whole(self) -> Self:
        if (self.engine_url is None) != (self.engine_kind is None):
            raise ValueError("PORTCULLIS_ENGINE_URL and PORTCULLIS_ENGINE_KIND go together: set both, or neither")
        if self.engine_kind == "pool":
            if not self.engine_pool:
                raise ValueError("PORTCULLIS_ENGINE_URL must be pool:NAME for PORTCULLIS_ENGINE_KIND=pool")
            if self.engine_pool == self.fallback_pool:
                raise ValueError(f"the pool {self.fallback_pool!r} is the fallback already; leave PORTCULLIS_ENGINE_KIND unset")
        elif self.engine_url is not None:
            _check_http_url(self.engine_url)
            if self.engine_kind == "kserve" and "/v2/models/" not in self.engine_url:
                raise ValueError("PORTCULLIS_ENGINE_URL must be the model's, http://host:port/v2/models/NAME, for kserve")
        token = self.engine_token.get_secret_value() if self.engine_token is not None else "unset"
        if not re.fullmatch(r"[!-~]+", token):
            raise ValueError("PORTCULLIS_ENGINE_TOKEN must be one word of printable ASCII")
        if not self.benign_labels:
            raise ValueError("PORTCULLIS_ENGINE_BENIGN_LABELS must name at least one label")
        if self.breaker_open_max_seconds < self.breaker_open_seconds:
            raise ValueError("PORTCULLIS_BREAKER_OPEN_MAX_SECONDS must not be below PORTCULLIS_BREAKER_OPEN_SECONDS")
        return self


def _check_http_url(url: str) -> None:
    problem = "PORTCULLIS_ENGINE_URL must be http://host[:port][/path] or https://..., without user, query or fragment"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(problem) from None
    whole = parts.scheme in ("http", "https") and parts.hostname and port != 0
    if not whole or parts.username is not None or parts.query or parts.fragment or re.search(r"[\s\x00-\x1f]", url):
        raise ValueError(problem)
