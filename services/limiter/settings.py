"""The limiter's configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, SecretStr, field_validator

from libs.common.settings import CommonSettings
from services.limiter.address import located


class Settings(CommonSettings):
    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    """`redis://`, `rediss://` or `unix://`, of a primary; or `redis+sentinel://:password@host:26379,host:26379/mymaster/0` of its
    sentinels (`?sentinel_password=…`: their own); or `redis+cluster://:password@host:6379,host:6379` of some nodes of a Redis
    Cluster. `rediss+sentinel://`, `rediss+cluster://`: TLS to all of them."""
    register_per_hour: Annotated[int, Field(ge=1)] = 30
    """Registrations from one address (IPv6: from one /64) in any hour."""
    limiter_local_keys: Annotated[int, Field(ge=1)] = 10_000
    """Keys whose state is kept in this process for the time that Redis is away; some 2 KB each at the worst."""

    @field_validator("redis_url")
    @classmethod
    def _can_be_parsed(cls, url: SecretStr) -> SecretStr:
        try:
            located(url.get_secret_value())
        except ValueError:
            # redis-py's own sentence may quote the URL, and with it a password.
            raise ValueError("not a Redis URL such as redis://:password@host:6379/0") from None
        return url
