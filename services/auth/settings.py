"""Configuration of auth; all of it from the environment, `PORTCULLIS_*`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from libs.common.settings import CommonSettings


class AuthSettings(CommonSettings):
    """What auth reads besides the common settings."""

    database_url: SecretStr
    """`postgresql://user:password@host:port/database`; `sslmode` is honoured."""
    database_pool_size: Annotated[int, Field(ge=1, le=100)] = 5
    """Connections of one replica for requests; two more serve its health check and the usage counts."""
    key_pepper: Annotated[SecretStr, Field(min_length=16)]
    """Keys are stored as HMACs under this secret. Under another pepper every issued key is refused, unless it is exchanged."""
    key_pepper_previous: Annotated[SecretStr, Field(min_length=16)] | None = None
    """While the pepper is exchanged, the other one: a key that is stored under it works, and is stored under the current one
    when it is used. Empty is as unset."""
    admin_token: Annotated[SecretStr, Field(min_length=16)] | None = None
    """Without one, only keys with the scope `admin` may administer."""
    registration: Literal["open", "admin"] = "admin"
    """`open`: anybody may register a key; `admin`: the admin token is needed."""
    register_max_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] = 1_000
    """The highest limit per minute that a self-registered key may have."""
    register_max_per_day: Annotated[int, Field(ge=1, le=1_000_000_000)] = 100_000
    """The highest limit per day that a self-registered key may have."""
    rotate_grace_seconds: Annotated[int, Field(ge=0, le=30 * 86_400)] = 86_400
    """How long a rotated key's old secret keeps working: time to deploy the new one."""
    auth_cache_ttl_seconds: Annotated[float, Field(gt=0, le=30)] = 10.0
    """How long a key that was read from PostgreSQL is used without asking again. Changes are broadcast and count at once."""
    auth_cache_entries: Annotated[int, Field(ge=1)] = 65_536
    """Keys that a replica remembers at most, about 1 KB each."""
    nats_issuer_seed: SecretStr | None = None
    """Seed of the account key (`SA…`) whose public part NATS's `auth_callout` names as issuer. Unset: no client is let in."""
    door_connections_per_key: Annotated[int, Field(ge=1, le=1000)] = 16
    """Connections to NATS that a key may have at a time."""
    usage_stream_bytes: Annotated[int, Field(ge=1024 * 1024)] = 512 * 1024 * 1024
    """Bound of the USAGE stream, used only when the stream does not exist yet; about 2.5 million events."""
    usage_retention_days: Annotated[int, Field(ge=31)] = 400
    """Daily counts older than this are deleted; totals are kept."""

    @field_validator("key_pepper_previous", mode="before")
    @classmethod
    def _may_be_empty(cls, pepper: object) -> object:
        return pepper or None  # a file that is mounted is there even when there is nothing to say

    @model_validator(mode="after")
    def _peppers_differ(self) -> Self:
        if self.key_pepper_previous == self.key_pepper:
            raise ValueError(
                "PORTCULLIS_KEY_PEPPER_PREVIOUS is the same as PORTCULLIS_KEY_PEPPER; set it to the other pepper of an exchange, "
                "or not at all"
            )
        return self
