"""`tei`: a sequence classifier served by Hugging Face's text-embeddings-inference, `POST /predict`.

A single string as `inputs` is answered by a list of `{"label", "score"}`, one for each label of the model and, for a model with
two labels or more, softmax probabilities that add up to 1. The probability of "malicious" is that of all labels but the benign
ones (`PORTCULLIS_ENGINE_BENIGN_LABELS`); an answer without a benign label, or whose scores are no distribution, is a failure:
one would have to guess what the labels mean.

`truncate` is false: what is longer than the model's window is refused by TEI (413) and goes to the fallback, which reads all of
it, instead of being cut in silence. 413 and 422 (the tokeniser's refusal) are the text's fault; 424 (inference failed), 429
(overloaded) and the rest are the engine's.

https://github.com/huggingface/text-embeddings-inference, router/src/http/{types,server}.rs
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from libs.common.context import RequestContext
from libs.common.contracts import THREAT_TYPES, DetectPayload, Probability, ThreatType, encode
from services.detector_proxy.engines.http import HttpClient, bad_status, decoded, up_if_ok
from services.detector_proxy.ports import EngineError, EngineResult, Health

SUM_TOLERANCE = 0.01
"""Half-precision softmax adds up to 1 within a few thousandths."""


class _Request(msgspec.Struct):
    inputs: str
    truncate: bool = False
    raw_scores: bool = False


class _Prediction(msgspec.Struct):
    label: str
    score: Probability


class _Problem(msgspec.Struct):
    error: str


_predictions = msgspec.json.Decoder(Annotated[list[_Prediction], Meta(min_length=2, max_length=100)])
_problem = msgspec.json.Decoder(_Problem)


class TeiEngine:
    """`benign_labels`: in lower case."""

    def __init__(self, client: HttpClient, name: str | None, benign_labels: frozenset[str]) -> None:
        self.name = name or "tei"
        self._client = client
        self._benign_labels = benign_labels

    async def detect(self, payload: DetectPayload, context: RequestContext, timeout_seconds: float) -> EngineResult:
        reply = await self._client.post("/predict", encode(_Request(payload.text)), context)
        if reply.status in (413, 422):
            decoded(_problem, reply)
            raise EngineError("rejected", counts=False)
        if reply.status != 200:
            raise bad_status(reply.status)
        return self._judgement(decoded(_predictions, reply))

    def _judgement(self, predictions: list[_Prediction]) -> EngineResult:
        benign = [p for p in predictions if p.label.lower() in self._benign_labels]
        total = sum(p.score for p in predictions)
        if not benign or len(benign) == len(predictions) or abs(total - 1) > SUM_TOLERANCE:
            raise EngineError("labels")
        malicious = sorted((p for p in predictions if p not in benign), key=lambda p: -p.score)
        return EngineResult(
            confidence=min(1.0, sum(p.score for p in malicious)),
            model=self.name,
            threat_types=_threats(malicious[0].label),
        )

    async def health(self) -> Health:
        return up_if_ok(await self._client.get_status("/health"))

    async def close(self) -> None:
        await self._client.close()


def _threats(label: str) -> tuple[ThreatType, ...]:
    """The threat that a label names, if it names one."""
    name = label.lower().replace("-", "_").replace(" ", "_")
    return tuple(threat for threat in THREAT_TYPES if threat == name)
