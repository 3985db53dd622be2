"""What the bus records of messages: a span where one is sent and one where it is handled, and which traces are kept."""

from __future__ import annotations

from collections import deque
from typing import Final

from libs.common import tracing
from libs.common.context import RequestContext
from libs.common.errors import CATALOGUE, ErrorCode
from libs.common.tracing import Span

NO_RESPONDERS: Final = "no responders"
SENT_AGAIN: Final = "sent again"
"""Events of a span that sends."""

_REMEMBERED: Final = 1024
_REFUSALS: Final = frozenset(str(code) for code, kind in CATALOGUE.items() if kind.status < 500)


class Hops:
    """Of one process's bus."""

    def __init__(self) -> None:
        self._sends: dict[str, tuple[str, tracing.Attributes]] = {}
        # Of a forward that finds nobody the server tells no more than the origin, within a millisecond or so.
        self._forwarded: deque[tuple[str, str]] = deque(maxlen=_REMEMBERED)

    def sending(self, subject: str, traceparent: str) -> Span:
        """The span of a message that is about to be sent below `traceparent`; whoever gets it is to be told the span's."""
        known = self._sends.get(subject)
        if known is None:
            known = self._sends[subject] = (f"send {subject}", tracing.messaging("send", subject))
        name, attributes = known
        return tracing.begin(name, tracing.PRODUCER, traceparent, attributes)

    def forwarded(self, origin: str | None, span: Span) -> None:
        """`span` sends a message whose answer goes to `origin`."""
        if span and origin:
            self._forwarded.append((origin, span.traceparent))

    def not_received(self, origin: str) -> None:
        """Nobody took the message that was forwarded with this origin."""
        for sent_to, traceparent in reversed(self._forwarded):
            if sent_to == origin:
                with tracing.begin(NO_RESPONDERS, tracing.INTERNAL, traceparent) as span:
                    span.event(NO_RESPONDERS)
                    span.fail(str(ErrorCode.STAGE_UNAVAILABLE))
                return


def handled(span: Span, context: RequestContext, outcome: str) -> None:
    """End the span of a message that a stage has dealt with. `outcome`: ok, expired, or an error's code."""
    outcome = str(outcome)
    span.set("portcullis.request_id", context.request_id)
    span.set("portcullis.outcome", outcome)
    if outcome != "ok":
        span.refused = outcome in _REFUSALS
        span.fail(outcome)
    span.end()
