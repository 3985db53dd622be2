"""`kserve`: a model behind the Open Inference Protocol (KServe v2; Triton, MLServer and others), JSON over HTTP.

`POST .../v2/models/NAME/infer` with one input, `text`: BYTES, shape [1, 1]. The model must answer with an output `confidence`
(FP16, FP32 or FP64, one element): the probability that the text is malicious; and may answer with `threat_types` (BYTES, any
number of names). JSON tensors may be flat or nested, both forms are read. Any other answer is a failure, a 400 too: the
protocol uses it for a wrong model as for a wrong text, and the wrong model is the likelier.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
"""

from __future__ import annotations

from typing import Any

import msgspec

from libs.common.context import RequestContext
from libs.common.contracts import THREAT_TYPES, DetectPayload, encode
from services.detector_proxy.engines.http import HttpClient, bad_status, decoded, up_if_ok
from services.detector_proxy.ports import EngineError, EngineResult, Health

FLOATS = frozenset({"FP16", "FP32", "FP64"})
MAX_NESTING = 8


class _Input(msgspec.Struct):
    data: list[str]
    name: str = "text"
    shape: tuple[int, ...] = (1, 1)
    datatype: str = "BYTES"


class _Request(msgspec.Struct):
    inputs: list[_Input]


class _Output(msgspec.Struct):
    name: str
    datatype: str
    data: list[Any]


class _Response(msgspec.Struct):
    model_name: str
    outputs: list[_Output]


_response = msgspec.json.Decoder(_Response)


class KserveEngine:
    """`name`: what the operator calls it; None to let the server name its model. The client's base is the model's URL."""

    def __init__(self, client: HttpClient, name: str | None) -> None:
        self.name = name or "kserve"
        self._configured_name = name
        self._client = client

    async def detect(self, payload: DetectPayload, context: RequestContext, timeout_seconds: float) -> EngineResult:
        reply = await self._client.post("/infer", encode(_Request([_Input([payload.text])])), context)
        if reply.status != 200:
            raise bad_status(reply.status)
        answer = decoded(_response, reply)
        outputs = {output.name: output for output in answer.outputs}
        confidence = outputs.get("confidence")
        if confidence is None or confidence.datatype not in FLOATS:
            raise EngineError("malformed")
        threats = outputs.get("threat_types")
        names = set(_flat(threats.data)) if threats is not None and threats.datatype == "BYTES" else set()
        return EngineResult(
            confidence=_probability(_flat(confidence.data)),
            model=self._configured_name or answer.model_name[:128] or self.name,
            threat_types=tuple(threat for threat in THREAT_TYPES if threat in names),
        )

    async def health(self) -> Health:
        return up_if_ok(await self._client.get_status("/ready"))

    async def close(self) -> None:
        await self._client.close()


def _flat(data: list[Any], depth: int = 0) -> list[Any]:
    """The elements of a JSON tensor in row-major order."""
    if depth > MAX_NESTING:
        raise EngineError("malformed")
    flat: list[Any] = []
    for item in data:
        if isinstance(item, list):
            flat.extend(_flat(item, depth + 1))
        elif isinstance(item, dict):
            raise EngineError("malformed")  # no tensor holds one
        else:
            flat.append(item)
    return flat


def _probability(elements: list[Any]) -> float:
    """The one element, in [0, 1]. JSON has no NaN, so that one does not come this far."""
    if len(elements) != 1 or isinstance(elements[0], bool) or not isinstance(elements[0], int | float):
        raise EngineError("malformed")
    if not 0 <= elements[0] <= 1:
        raise EngineError("malformed")
    return float(elements[0])
