"""The console's configuration: where it listens, who may look, how much it keeps."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, SecretStr, model_validator

from libs.common.settings import CommonSettings

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ConsoleSettings(CommonSettings):
    """`PORTCULLIS_*`."""

    console_host: str = "127.0.0.1"
    """The address that it listens on. One that others can reach needs `admin_token`."""
    console_port: Annotated[int, Field(ge=1, le=65535)] = 4318
    """Where the pages are served to the edge, and where services send their traces (OTLP over HTTP, whose usual port this is)."""
    admin_token: Annotated[SecretStr, Field(min_length=16)] | None = None
    """What whoever looks at the console must know."""
    console_open: bool = False
    """Let whoever reaches it under a loopback name look without the token; `./run up` sets it where only this machine does."""
    console_max_spans: Annotated[int, Field(ge=100)] = 20_000
    """Spans that are kept, in memory; the oldest traces go first, and ordinary ones before those that failed or were slow."""
    console_max_bytes: Annotated[int, Field(ge=1024 * 1024)] = 32 * 1024**2
    """Bytes that they take, about."""

    @model_validator(mode="after")
    def _open_to_this_machine_only(self) -> ConsoleSettings:
        if self.console_open and self.console_host not in LOOPBACK:
            raise ValueError(
                "PORTCULLIS_CONSOLE_OPEN needs a loopback PORTCULLIS_CONSOLE_HOST; unset it, and use the admin token"
            )
        return self
