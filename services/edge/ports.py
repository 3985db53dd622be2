"""What the edge needs from outside itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from libs.common.clock import Clock
from libs.common.context import RequestContext
from libs.common.contracts import Message, Reply


class Answered(Protocol):
    """A decoded answer, and the milliseconds that each stage spent on it."""

    @property
    def reply(self) -> Reply: ...

    @property
    def timings(self) -> Mapping[str, float]: ...


class Stages(Protocol):
    """The stages behind the edge; `libs.common.bus.Bus` is one."""

    @property
    def clock(self) -> Clock: ...

    @property
    def connected(self) -> bool: ...

    async def request(
        self, subject: str, message: Message, context: RequestContext, *, idempotent: bool = False, token: str | None = None
    ) -> Answered:
        """Raises `PortcullisError` when no reply comes; a refusal is a reply. `idempotent`: may be sent twice.

        `token`: a name of this request among all of the process, given again when the same is asked again after a failure.
        """
        ...

    async def gather(
        self, subject: str, message: Message | None, context: RequestContext, *, window_seconds: float, expected: int = 0
    ) -> list[bytes]: ...
