"""What a batch consists of: items as they are read, lines as they are answered, and how many may be under way. No I/O."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec
from msgspec import UNSET

from libs.common.contracts import ItemResult, Verdict
from libs.common.errors import ErrorCode, PortcullisError
from services.edge import core, problems
from services.edge.schemas import BatchBody, BatchItem, BatchLine, BatchSummary, DetectConfig, FieldProblem, ItemId, ItemProblem

NDJSON = "application/x-ndjson"
EVENTS = "text/event-stream"
JSON = "application/json"
OFFERED = (NDJSON, EVENTS, JSON)
_NDJSON_TYPES = frozenset({NDJSON, "application/ndjson"})

MAX_LIST = 1000
"""Items of one JSON list, and of an answer that is one JSON object."""
MAX_ITEMS = 64
"""Items that go to the proxy in one message."""
MAX_CHARACTERS = 32_000
"""Characters of one message, unless a single text is longer: half a second of a worker's time."""
MAX_CHARGED = 128
MAX_CHARGED_CHARACTERS = 4 * MAX_CHARACTERS
"""What of an upload is charged at a time. To ask the limits costs as much as half a text; and who leaves has paid for no more
than this in vain."""
MAX_UNDER_WAY = 1024
MAX_CHARACTERS_UNDER_WAY = 512_000

FAST_SECONDS, SLOW_SECONDS = 0.25, 0.5
"""How long a message may have waited for others: below the one there may be more of them, above the other there are too many."""
_BACK = 0.25
FIRST_UNDER_WAY = 16.0
"""How many may be under way before anything is known: a few batches of one worker."""

_ITEM = msgspec.json.Decoder(BatchItem)
_BODY = msgspec.json.Decoder(BatchBody)
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Entry:
    """One item as it was read: a text, or why there is none. `index`: its place among all items of the batch."""

    index: int
    id: str | None
    text: str = ""
    error: PortcullisError | None = None


# --- in ------------------------------------------------------------------------------------------------------------------


def is_ndjson(headers: core.Headers) -> bool:
    return headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower() in _NDJSON_TYPES


def decode_list(body: bytes | bytearray) -> BatchBody:
    """The body of a JSON list. Raises as `core.decode_json`; the field names the item that is wrong, `requests[3].text`."""
    try:
        return core.decode_json(body, _BODY)
    except PortcullisError as error:
        if error.fields and error.fields[0][0].startswith("requests[...]"):
            raise _with_place(body, error) from None
        raise


class _Places(msgspec.Struct):
    requests: list[msgspec.Raw]


def _with_place(body: bytes | bytearray, error: PortcullisError) -> PortcullisError:
    for place, item in enumerate(msgspec.json.decode(body, type=_Places).requests):
        try:
            _ITEM.decode(item)
        except msgspec.ValidationError:
            field, message = error.fields[0]
            return core.invalid_field(field.replace("[...]", f"[{place}]", 1), message)
    return error


def entries_of(body: BatchBody) -> list[Entry]:
    return [Entry(index, item.id, item.text) for index, item in enumerate(body.requests)]


class _IdOnly(msgspec.Struct):
    id: msgspec.Raw = msgspec.Raw(b"null")


def read_line(line: bytes, index: int) -> Entry:
    """One line of NDJSON. What is wrong with it is in the entry, under its own id if that can be read."""
    try:
        item = core.decode_json(line, _ITEM)
    except PortcullisError as error:
        return Entry(index, _id_of(line), error=error)
    return Entry(index, item.id, item.text)


def _id_of(line: bytes) -> str | None:
    try:
        return msgspec.json.decode(msgspec.json.decode(line, type=_IdOnly).id, type=ItemId | None)
    except (ValueError, RecursionError):
        return None


class Lines:
    """Cuts what arrives into lines; of a line longer than `most_bytes` nothing is kept but that it was there (None)."""

    def __init__(self, most_bytes: int) -> None:
        self.whole: deque[bytes | None] = deque()
        self._most_bytes = most_bytes
        self._rest = b""
        self._skipping = False

    def add(self, piece: bytes) -> None:
        parts = piece.split(b"\n")
        for part in parts[:-1]:
            self._keep(part)
            self._end()
        self._keep(parts[-1])

    def end(self) -> None:
        """Nothing more comes: the last line need not end with a newline."""
        if self._rest or self._skipping:
            self._end()

    def _keep(self, part: bytes) -> None:
        if self._skipping:
            return
        self._rest = self._rest + part if self._rest else part
        if len(self._rest) > self._most_bytes:
            self._rest, self._skipping = b"", True

    def _end(self) -> None:
        line, self._rest = self._rest, b""
        if self._skipping:
            self.whole.append(None)
            self._skipping = False
        elif not line.isspace() and line:
            self.whole.append(line)


# --- out -----------------------------------------------------------------------------------------------------------------


def chosen(accept: bytes) -> str:
    """Which of the offered media types an Accept header prefers; the first of them when it names none.

    RFC 9110, 12.5.1, with the quality of the most specific range that fits; equal ones in our own order.
    """
    qualities = dict.fromkeys(OFFERED, (-1, 0.0))
    for part in accept.decode("latin-1").lower().split(","):
        media, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((_quality(value) for name, _, value in (p.partition("=") for p in parameters) if name == "q"), 1.0)
        for offered in OFFERED:
            kind = offered.partition("/")[0]
            specific = {offered: 2, f"{kind}/*": 1, "*/*": 0}.get(media, -1)
            if specific > qualities[offered][0]:
                qualities[offered] = (specific, quality)
    best = max(OFFERED, key=lambda offered: qualities[offered][1])
    return best if qualities[best][1] > 0 else OFFERED[0]


def _quality(value: str) -> float:
    try:
        quality = float(value)
    except ValueError:
        return 0.0
    return quality if 0 <= quality <= 1 else 0.0


@dataclass(slots=True)
class Tally:
    """What has been answered so far."""

    total: int = 0
    malicious: int = 0
    failed: int = 0
    degraded: int = 0

    def count(self, line: BatchLine) -> None:
        self.total += 1
        self.failed += line.error is not UNSET
        self.malicious += line.is_malicious is True
        self.degraded += line.degraded is True

    def summary(self, processing_time_ms: float, stopped: PortcullisError | None, next_index: int) -> BatchSummary:
        return BatchSummary(
            total=self.total,
            malicious=self.malicious,
            benign=self.total - self.malicious - self.failed,
            failed=self.failed,
            degraded=self.degraded,
            complete=stopped is None,
            processing_time_ms=processing_time_ms,
            next_index=UNSET if stopped is None else next_index,
            error=UNSET if stopped is None else problem_of(stopped),
        )


def line_of(entry: Entry, outcome: Verdict | PortcullisError, config: DetectConfig) -> BatchLine:
    if isinstance(outcome, PortcullisError):
        return BatchLine(index=entry.index, id=entry.id, error=problem_of(outcome))
    detailed = config.detailed_response
    return BatchLine(
        index=entry.index,
        id=entry.id,
        is_malicious=outcome.is_malicious,
        confidence=outcome.confidence,
        threat_types=outcome.threat_types,
        endpoint=outcome.endpoint,
        degraded=outcome.degraded,
        coverage=outcome.coverage,
        reason=outcome.reason if detailed else UNSET,
        spans=outcome.spans if detailed else UNSET,
        transforms=outcome.transforms if detailed else UNSET,
        timings=outcome.timings if detailed else UNSET,
    )


def outcome_of(result: ItemResult) -> Verdict | PortcullisError:
    if result.verdict is not None:
        return result.verdict
    if result.error is not None:
        return problems.from_reply(result.error)
    return PortcullisError(ErrorCode.STAGE_UNAVAILABLE, internal="an item with neither verdict nor error")


def problem_of(error: PortcullisError) -> ItemProblem:
    fields = tuple(FieldProblem(field, message) for field, message in error.fields)
    return ItemProblem(
        code=error.code,
        title=error.kind.title,
        status=error.kind.status,
        detail=error.detail,
        errors=fields or UNSET,
        retry_after=error.retry_after if error.retry_after is not None else UNSET,
    )


class _Stopped(msgspec.Struct, frozen=True):
    """The line that says why a stream ends before its last item."""

    error: ItemProblem
    next_index: int


class _Summed(msgspec.Struct, frozen=True):
    summary: BatchSummary


class _Whole(msgspec.Struct, frozen=True):
    results: list[msgspec.Raw]
    summary: BatchSummary


def framing(media_type: str) -> Callable[[str, bytes], bytes]:
    """How a line, of the kind `result`, `error` or `summary`, is written."""
    if media_type == EVENTS:
        return lambda kind, line: b"event: %b\ndata: %b\n\n" % (kind.encode(), line)
    return lambda _, line: line + b"\n"


def encode_line(line: BatchLine) -> tuple[str, bytes]:
    return ("error" if line.error is not UNSET else "result"), _encode(line)


def encode_stop(error: PortcullisError, next_index: int) -> bytes:
    return _encode(_Stopped(problem_of(error), next_index))


def encode_summary(summary: BatchSummary) -> bytes:
    return _encode(_Summed(summary))


def encode_whole(lines: Iterable[bytes], summary: BatchSummary) -> bytes:
    return _encode(_Whole([msgspec.Raw(line) for line in lines], summary))


# --- how many at a time --------------------------------------------------------------------------------------------------


class Pace:
    """How many items of one batch may be under way, by how long messages take.

    The first message is one text, so that its result comes as soon as that of a single one; some more follow before it is back.
    What may be under way doubles with each round trip while messages hardly wait, and falls back when they do. How long one waits
    is what it takes beyond the shortest time that any took (as TCP Vegas has it), so an engine that is far away is no reason to
    ask it less. What waits is about what is done in `SLOW_SECONDS`, however many workers there are and whoever else keeps them
    busy.
    """

    def __init__(self) -> None:
        self._limit = FIRST_UNDER_WAY
        self._begun = False
        self._shortest = math.inf
        self._items = 0
        self._characters = 0

    @property
    def size(self) -> int:
        """Items of the next message: three messages are under way when it goes well."""
        return max(1, min(MAX_ITEMS, math.ceil(self._limit / 3))) if self._begun else 1

    def has_room(self, items: int) -> bool:
        """Whether a message of so many may go."""
        if not self._items:
            return True
        return self._items + items <= self._limit and self._characters + MAX_CHARACTERS <= MAX_CHARACTERS_UNDER_WAY

    def begin(self, items: int, characters: int) -> None:
        self._begun = True
        self._items += items
        self._characters += characters

    def answered(self, items: int, seconds: float) -> None:
        """A message of so many items took so long; they are under way until `end`."""
        self._shortest = min(self._shortest, seconds)
        waited = seconds - self._shortest
        if waited <= FAST_SECONDS:
            self._limit = min(float(MAX_UNDER_WAY), self._limit + items)
        elif waited > SLOW_SECONDS:
            self._limit = max(1.0, self._limit - _BACK * items)

    def end(self, items: int, characters: int) -> None:
        self._items -= items
        self._characters -= characters
