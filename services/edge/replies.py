"""What comes back from the stages: results, and refusals."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from libs.common.contracts import RateState
from libs.common.errors import ErrorCode, PortcullisError
from services.edge.ports import Answered

T = TypeVar("T")


class Refused(Exception):  # noqa: N818  # not an error of ours: a stage's answer
    """A stage refused; `rate` is the state of the key's limits, if it came so far."""

    def __init__(self, error: PortcullisError, rate: RateState | None) -> None:
        self.error = error
        self.rate = rate
        super().__init__(str(error))


def decoded(answered: Answered, decoder: msgspec.json.Decoder[T]) -> T:
    """A reply's result. Raises STAGE_UNAVAILABLE when it is not what it should be."""
    try:
        return decoder.decode(answered.reply.result)
    except (ValueError, RecursionError) as error:
        raise PortcullisError(ErrorCode.STAGE_UNAVAILABLE, internal=f"a stage's result cannot be read: {error}") from error
