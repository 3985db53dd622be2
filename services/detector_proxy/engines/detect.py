"""`detect`: an engine with the Go detection engine's contract, `POST /v1/detect`.

Its `is_malicious` must be there but does not decide: it follows from `confidence` here, under the caller's threshold. Threat
types that we have no name for are left out.

A 400 in the contract's own form (`error`) says that this text cannot be judged: the text goes to the fallback and the breaker
does not count it. Every other answer but 200 is the engine's failure, 408 and 429 among them.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from libs.common.context import RequestContext
from libs.common.contracts import THREAT_TYPES, DetectPayload, Probability, ThreatType, encode
from services.detector_proxy.engines.http import HttpClient, bad_status, decoded
from services.detector_proxy.ports import EngineError, EngineResult, Health

MAX_REASON_CHARACTERS = 2000


class _Config(msgspec.Struct):
    confidence_threshold: float
    detailed_response: bool


class _Request(msgspec.Struct):
    text: str
    config: _Config


class _Response(msgspec.Struct):
    is_malicious: bool
    confidence: Probability
    threat_types: Annotated[list[str], Meta(max_length=100)] | None  # Go writes an empty slice as null
    processing_time_ms: float
    reason: str | None = None
    endpoint: str | None = None


class _Problem(msgspec.Struct):
    error: str


_response = msgspec.json.Decoder(_Response)
_problem = msgspec.json.Decoder(_Problem)
_known: dict[str, ThreatType] = {name: name for name in THREAT_TYPES}


class DetectEngine:
    """`name`: what the operator calls it; None to let it name itself."""

    def __init__(self, client: HttpClient, name: str | None, threshold: float) -> None:
        self.name = name or "detect"
        self._configured_name = name
        self._client = client
        self._threshold = threshold

    async def detect(self, payload: DetectPayload, context: RequestContext, timeout_seconds: float) -> EngineResult:
        threshold = payload.threshold if payload.threshold is not None else self._threshold
        request = _Request(payload.text, _Config(threshold, payload.detailed))
        reply = await self._client.post("/v1/detect", encode(request), context)
        if reply.status == 400:
            decoded(_problem, reply)
            raise EngineError("rejected", counts=False)
        if reply.status != 200:
            raise bad_status(reply.status)
        answer = decoded(_response, reply)
        return EngineResult(
            confidence=answer.confidence,
            model=self._configured_name or _sane(answer.endpoint) or self.name,
            threat_types=tuple(dict.fromkeys(_known[name] for name in answer.threat_types or () if name in _known)),
            reason=answer.reason[:MAX_REASON_CHARACTERS] if answer.reason else None,
        )

    async def health(self) -> Health:
        """200 up, 206 degraded."""
        status = await self._client.get_status("/health")
        return "up" if status == 200 else "degraded" if status == 206 else "down"

    async def close(self) -> None:
        await self._client.close()


def _sane(endpoint: str | None) -> str | None:
    """What an engine calls itself, if it can be shown: a short printable word."""
    if endpoint and len(endpoint) <= 128 and endpoint.isascii() and endpoint.isprintable() and " " not in endpoint:
        return endpoint
    return None
