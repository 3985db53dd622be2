"""Configuration from the environment, `PORTCULLIS_*`; a wrong value ends the start with one line that says what to do.

Secrets may come from files instead: `PORTCULLIS_SECRETS_DIR` names a folder in which each is a file called like its variable
in lower case, as container engines mount them. What is set in the environment goes before a file.
"""

from __future__ import annotations

import errno
import os
import ssl
import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

SECRETS_VARIABLE = "PORTCULLIS_SECRETS_DIR"
"""The folder of secrets; unset: secrets come from the environment, like all else."""


class CommonSettings(BaseSettings):
    """What every service reads."""

    model_config = SettingsConfigDict(env_prefix="PORTCULLIS_", extra="ignore", frozen=True, hide_input_in_errors=True)

    nats_url: str = "nats://127.0.0.1:4222"
    """Of a cluster, several servers, with commas between them; the others are learnt from whichever is there first."""
    nats_user: str | None = None
    """The user as which this service connects; each has its own, which may use the subjects of its service and no others."""
    nats_password: SecretStr | None = None
    """That user's; goes with `nats_user`."""
    nats_passwords: Annotated[dict[str, SecretStr], NoDecode] = {}
    """Of several services in one process, in place of the two: a JSON object with the password of each, whose user is called like
    the service."""
    nats_tls_ca: str | None = None
    """Path of the CA certificate with which the server's is checked; set for tls:// URLs with a private CA."""
    stream_replicas: Annotated[int, Field(ge=1, le=5)] = 1
    """So many servers of a NATS cluster keep each stream and bucket: 1, 3 or 5. Used only when one does not exist yet."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Where this process serves /metrics, /health/live and /health/ready on `metrics_host`; 0: nowhere."""
    metrics_host: str = "127.0.0.1"
    """`0.0.0.0` where whoever collects or probes is elsewhere; keep strangers from it."""
    drain_seconds: Annotated[float, Field(gt=0, le=600)] = 15.0
    """On SIGTERM, how long work in hand may still take. Longer than the longest deadline in use, and shorter than whoever stops
    the process waits before it kills it."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """What is less than this is not logged."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """`auto`: lines to read on a terminal, JSON anywhere else."""
    trace_per_second: Annotated[int, Field(ge=0)] = 10
    """So many traces a second are sent to the collector from their beginning, by each process in which traces begin; beside every
    failure and every slow request. Nothing is recorded unless `OTEL_EXPORTER_OTLP_ENDPOINT` names a collector."""
    trace_slow_ms: Annotated[float, Field(gt=0)] = 1000.0
    """A request that takes so long is sent to the collector."""
    trace_buffer_spans: Annotated[int, Field(ge=64)] = 16_384
    """Spans that each process remembers of requests about which nothing is decided yet; about 0.75 KB each."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is given outright, then the environment, then files."""
        return init_settings, env_settings, SecretsSettingsSource(settings_cls, secrets_dir=_secrets_folder())

    @field_validator("nats_url")
    @classmethod
    def _names_servers(cls, urls: str) -> str:
        servers = [url.strip() for url in urls.split(",")]
        if not all(servers):
            raise ValueError("a comma stands between two servers, and nowhere else")
        return ",".join(servers)

    @field_validator("nats_passwords", mode="before")
    @classmethod
    def _names_passwords(cls, passwords: object) -> object:
        if not isinstance(passwords, str):
            return passwords
        try:
            return msgspec.json.decode(passwords, type=dict[str, str])
        except (ValueError, RecursionError):
            raise ValueError('expected a JSON object such as {"edge": "…", "auth": "…"}') from None

    @field_validator("stream_replicas")
    @classmethod
    def _has_a_majority(cls, replicas: int) -> int:
        if replicas % 2 == 0:  # of which half would be no majority: no more may fail than of one fewer
            raise ValueError("1, 3 or 5")
        return replicas

    @field_validator("nats_tls_ca")
    @classmethod
    def _holds_a_certificate(cls, path: str | None) -> str | None:
        try:
            ssl.create_default_context(cafile=path or None)
        except OSError as error:  # what ssl raises for a file without a certificate, too
            raise ValueError(f"no CA certificate can be read from that file ({error.strerror or 'unreadable'})") from None
        return path


def _secrets_folder() -> str | None:
    named = os.environ.get(SECRETS_VARIABLE) or None
    if named is not None and not Path(named).is_dir():  # pydantic-settings would warn, and go on without
        raise SettingsError from NotADirectoryError(errno.ENOTDIR, "no such folder", named)
    return named


SettingsT = TypeVar("SettingsT", bound=CommonSettings)


def load(settings: type[SettingsT]) -> SettingsT:
    """The settings, or the end of the process with status 2 and one line per wrong value (values themselves are not shown)."""
    try:
        return settings()
    except SettingsError as error:
        cause = error.__cause__
        reason = f"{cause.filename}: {(cause.strerror or '').lower()}" if isinstance(cause, OSError) else "a file holds no text"
        print(f"portcullis: {SECRETS_VARIABLE}: {reason}; mount the secrets where this user can read them", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
    except ValidationError as error:
        for problem in error.errors(include_input=False, include_url=False):
            name = "_".join(str(part) for part in problem["loc"]).upper()
            if not name:  # about several variables together; the message names them
                print(f"portcullis: {problem['msg'].removeprefix('Value error, ')}", file=sys.stderr)  # noqa: T201
                continue
            prefix = "" if name.startswith("PORTCULLIS_") else "PORTCULLIS_"
            print(f"portcullis: {prefix}{name}: {problem['msg']}; set it in the environment", file=sys.stderr)  # noqa: T201
        raise SystemExit(2) from None
