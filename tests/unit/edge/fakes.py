"""The stages behind the edge, written by hand, and what they would answer when all is well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httpx
import msgspec

from libs.common import contracts, keys, micro, subjects
from libs.common.clock import ManualClock
from libs.common.context import RequestContext
from libs.common.contracts import ErrorBody, FieldError, Message, RateState, Reply, raw
from libs.common.errors import CATALOGUE, ErrorCode, PortcullisError
from services.edge.app import build
from services.edge.gate import Gate
from services.edge.settings import EdgeSettings

RATE = RateState(limit_minute=70, remaining_minute=69, reset_minute=0.0, limit_day=50_000, remaining_day=49_000, reset_day=0.2)
VERDICT = contracts.Verdict(
    is_malicious=True,
    confidence=0.92,
    threat_types=("jailbreak",),
    endpoint="portcullis-minilm-v1",
    degraded=False,
    coverage=contracts.Coverage(tokens=9, windows=1, truncated=False),
    reason="instruction override",
    spans=(contracts.Span(start=0, end=6, score=0.9),),
    transforms=(contracts.Transform(name="base64", count=1),),
    timings={"model": 3.0},
)
KEY = keys.generate()
RECORD = contracts.KeyRecord(
    key_id=KEY[8:20],
    name="My App",
    scopes=("detect",),
    rate_limit_per_minute=70,
    rate_limit_per_day=50_000,
    created_at="2026-01-01T00:00:00+00:00",
    total_requests=3,
    malicious_detections=1,
    days=(contracts.DayUsage(date="2026-01-01", requests=3, malicious=1),),
)
ISSUED = contracts.IssuedKey(api_key=KEY, record=RECORD)
BREAKER = contracts.BreakerStatus(name="primary", state="closed", replica="one", failures=0, successes=5)
REPORT = contracts.BreakerReport(replica="one", breakers=(BREAKER,))
HEALTHY: tuple[tuple[str, dict[str, str]], ...] = (
    ("edge", {}),
    ("auth", {micro.STORE_POSTGRES: "up"}),
    ("limiter", {micro.STORE_REDIS: "up"}),
    (
        "detector-proxy",
        {
            micro.ENGINE_CONFIGURED: "pool",
            micro.ENGINE_NAME: "portcullis-minilm-v1",
            micro.ENGINE_STATUS: "up",
            micro.ENGINE_BREAKER: "closed",
        },
    ),
    ("fallback-model", {}),
    ("jobs", {}),
)


def ping(service: str, metadata: Mapping[str, str] | None = None, replica: str = "1", status: str = "ok") -> bytes:
    """A PING answer as nats-py writes it."""
    return msgspec.json.encode(
        {
            "type": "io.nats.micro.v1.ping_response",
            "name": f"portcullis-{service}",
            "id": f"{service}-{replica}",
            "version": "0.1.0",
            "metadata": {micro.STATUS: status, **(metadata or {})},
        }
    )


def healthy_fleet() -> list[bytes]:
    return [ping(service, metadata) for service, metadata in HEALTHY]


def refusal(code: ErrorCode, *, retry_after: int | None = None, fields: tuple[FieldError, ...] = ()) -> Reply:
    body = ErrorBody(code=code, detail=CATALOGUE[code].detail, retry_after=retry_after, fields=fields)
    return Reply(error=body, rate=RATE)


def admitted(message: Message) -> Reply:
    assert isinstance(message, contracts.AdmissionRequest)
    principal = contracts.Principal(key_id=KEY[8:20], scopes=("batch",), limit_minute=70, limit_day=50_000)
    return Reply(result=raw(contracts.Admission(principal=principal, granted=message.cost, rate=RATE)), rate=RATE)


def judged(message: Message) -> Reply:
    """A verdict for every text: malicious those that say "ignore"."""
    assert isinstance(message, contracts.DetectItems)
    benign = msgspec.structs.replace(VERDICT, is_malicious=False, confidence=0.1, threat_types=())
    verdicts = [VERDICT if "ignore" in text.lower() else benign for text in message.texts]
    return Reply(result=raw(contracts.ItemResults(results=tuple(contracts.ItemResult(verdict=each) for each in verdicts))))


JOB = contracts.JobStatus(
    job_id="0123456789ab0123456789abcdef",
    state="running",
    total=3,
    done=2,
    malicious=1,
    failed=1,
    created_at="2026-01-01T00:00:00.000Z",
    items_per_second=2.5,
    estimated_end_at="2026-01-01T00:00:02.000Z",
    started_at="2026-01-01T00:00:01.000Z",
)
JOB_RESULTS: tuple[contracts.ItemResult, ...] = (
    contracts.ItemResult(verdict=VERDICT),
    contracts.ItemResult(error=ErrorBody(code=ErrorCode.INTERNAL, detail="It broke.")),
)


def job_answer(message: Message) -> Reply:
    """What jobs answers when all is well."""
    assert isinstance(message, contracts.JobRequest)
    results = tuple(
        contracts.StoredJobResult(cursor=7 + index, result=contracts.JobResult(index=index, result=result, id=f"id{index}"))
        for index, result in enumerate(JOB_RESULTS)
    )
    answers: dict[str, Message | None] = {
        "create": contracts.JobOpened(job_id=JOB.job_id, sealed=False),
        "append": None,
        "seal": JOB,
        "get": JOB,
        "list": contracts.JobPage(jobs=(JOB,), next_before=JOB.job_id),
        "results": contracts.JobResultPage(results=results, more=False),
        "cancel": msgspec.structs.replace(JOB, state="cancelled", finished_at="2026-01-01T00:00:03.000Z"),
    }
    return Reply(result=raw(answers[message.operation]), rate=RATE)


@dataclass(frozen=True, slots=True)
class Answered:
    reply: Reply
    timings: Mapping[str, float] = field(default_factory=lambda: {"auth": 0.4, "limiter": 0.5})


Behaviour = Reply | PortcullisError | Callable[[Message], Reply]


class FakeStages:
    """`asked` records every request. A subject without behaviour has nobody listening."""

    def __init__(self) -> None:
        self.clock: ManualClock = ManualClock()
        self.connected = True
        self.asked: list[tuple[str, Message | None, RequestContext]] = []
        issued = Reply(result=raw(ISSUED), rate=RATE)
        record = Reply(result=raw(RECORD), rate=RATE)
        nothing = Reply(rate=RATE)
        self.behaviours: dict[str, Behaviour] = {
            subjects.DETECT_REQUEST: Reply(result=raw(VERDICT), rate=RATE),
            subjects.BATCH_REQUEST: admitted,
            subjects.BATCH_ITEMS: judged,
            subjects.JOBS_REQUEST: job_answer,
            subjects.REGISTER_REQUEST: Reply(result=raw(ISSUED)),
            subjects.ACCOUNT_PROFILE: record,
            subjects.ACCOUNT_ROTATE: issued,
            subjects.ACCOUNT_REVOKE: nothing,
            subjects.ADMIN_KEYS_LIST: Reply(result=raw(contracts.KeyList(keys=(RECORD,)))),
            subjects.ADMIN_KEYS_CREATE: Reply(result=raw(ISSUED)),
            subjects.ADMIN_KEYS_GET: Reply(result=raw(RECORD)),
            subjects.ADMIN_KEYS_UPDATE: Reply(result=raw(RECORD)),
            subjects.ADMIN_KEYS_DELETE: Reply(),
        }
        self.reports: dict[str, list[bytes]] = {
            "$SRV.PING": healthy_fleet(),
            subjects.BREAKERS_LIST: [contracts.encode(Reply(result=raw(REPORT)))],
            subjects.BREAKERS_RESET_REQUEST: [contracts.encode(Reply(result=raw(REPORT)))],
        }
        self.repeatable: dict[str, bool] = {}
        self.expected: list[tuple[str, int]] = []
        self.tokens: list[tuple[str, str | None]] = []

    async def request(
        self, subject: str, message: Message, context: RequestContext, *, idempotent: bool = False, token: str | None = None
    ) -> Answered:
        self.tokens.append((subject, token))
        self.repeatable[subject] = idempotent
        self.asked.append((subject, message, context))
        behaviour = self.behaviours.get(subject, PortcullisError(ErrorCode.STAGE_UNAVAILABLE))
        if isinstance(behaviour, PortcullisError):
            raise behaviour
        return Answered(behaviour if isinstance(behaviour, Reply) else behaviour(message))

    async def gather(
        self, subject: str, message: Message | None, context: RequestContext, *, window_seconds: float, expected: int = 0
    ) -> list[bytes]:
        self.asked.append((subject, message, context))
        self.expected.append((subject, expected))
        return list(self.reports[subject])

    def last(self) -> tuple[str, Message | None, RequestContext]:
        return self.asked[-1]


def gate_of(stages: FakeStages, **settings: object) -> Gate:
    return build(stages, EdgeSettings.model_validate(settings))


def client_of(gate: Gate) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://localhost:8000")
