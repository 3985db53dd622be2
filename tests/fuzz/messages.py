"""Bodies of messages on the bus: whatever the bytes, they are read into what they say or refused, and nothing else.

The decoder is C and tells a fuzzer nothing of its way through the bytes. The standard library's reader in Python, instrumented,
shows it the way, and is the second opinion on what was read.
"""

from __future__ import annotations

import inspect
import json.decoder
import json.scanner
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import msgspec

from libs.common import contracts
from libs.common.contracts import Message
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.stages import Stage

GOLDEN: Final = Path(__file__).parents[1] / "contract" / "golden"
KINDS: Final = {
    name: kind
    for name, kind in inspect.getmembers(contracts, inspect.isclass)
    if issubclass(kind, Message) and kind is not Message
}
_NAMES: Final = sorted(KINDS)
_DECODERS: Final = {name: msgspec.json.Decoder(kind).decode for name, kind in KINDS.items()}
MOST_GROWTH: Final = 3
"""By what an accepted message may be longer when it is sent on: `1` is sent as `1.0`."""
DEFAULTS_BYTES: Final = 4096
"""What all fields that were left out may add."""


def _reader() -> json.JSONDecoder:
    reader = json.JSONDecoder()
    reader.parse_string = json.decoder.py_scanstring  # type: ignore[attr-defined]
    reader.scan_once = json.scanner.py_make_scanner(reader)  # type: ignore[attr-defined]
    return reader


_READER: Final = _reader()
MISSING: Final = object()
REFUSED: Final = object()
GUIDES: Final[tuple[Callable[..., Any], ...]] = (
    json.decoder.py_scanstring,  # type: ignore[attr-defined]
    json.decoder.JSONObject,  # type: ignore[attr-defined]
    json.decoder.JSONArray,  # type: ignore[attr-defined]
)
"""Of the standard library, to be instrumented."""


def read(name: str, body: bytes) -> Message:
    """As a stage reads it."""
    stage = cast(Any, SimpleNamespace(_decode=_DECODERS[name]))
    message: Message = Stage._read(stage, body)
    return message


def run(data: bytes) -> None:
    """The first line names the kind of message (any other line stands for one of them); the rest is the body."""
    first, _, body = data.partition(b"\n")
    name = first.decode(errors="replace")
    if name not in KINDS:
        name = _NAMES[zlib.crc32(first) % len(_NAMES)]
    opinion = _opinion(body.decode(errors="replace"))  # what nobody reads need not be UTF-8
    try:
        message = read(name, body)
    except PortcullisError as error:
        if error.code != ErrorCode.BAD_REQUEST:
            raise
        return
    sent = contracts.encode(message)
    assert len(sent) <= MOST_GROWTH * len(body) + DEFAULTS_BYTES, "an accepted message grows"
    assert read(name, sent) == message, "sent on, it says something else"
    _agree(message, opinion)


def _opinion(text: str) -> Any:
    """What the standard library reads; `MISSING` where it does not go as deep."""
    try:
        return _READER.decode(text)
    except RecursionError:
        return MISSING
    except ValueError:  # not only JSONDecodeError: it takes `\\u-001` for a number
        return REFUSED


def _agree(ours: Any, theirs: Any) -> None:
    """Everything that we have read stands there, and every string can be sent on and stored."""
    if theirs is MISSING:
        return
    assert theirs is not REFUSED, "accepted, and no JSON"
    if isinstance(ours, msgspec.Struct | dict):
        for field in ours if isinstance(ours, dict) else ours.__struct_fields__:
            _agree(ours[field] if isinstance(ours, dict) else getattr(ours, field), theirs.get(field, MISSING))
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            _agree(mine, other)
    elif isinstance(ours, str):
        assert ours.encode() is not None
        assert ours == theirs
    elif not isinstance(ours, msgspec.Raw):  # an embedded message, which whoever it is for reads
        assert ours == theirs


def seeds() -> Iterator[bytes]:
    """Every golden message, and some shapes that none of them has."""
    for path in sorted(GOLDEN.glob("*.v1.json")):
        yield path.name.removesuffix(".v1.json").encode() + b"\n" + path.read_bytes()
    for body in (
        rb'{"text":"\ud83d\ude00\u0000\ud800","threshold":1e-5,"detailed":false,"unknown":[{}]}',
        b'{"text":"a","text":"b","threshold":-0.0}',
        b'{"text":"\xe5\xbf\xbd\xf0\x9f\x98\x80","threshold":null}',
        b" {\t} ",
    ):
        yield b"DetectPayload\n" + body


def words() -> Iterator[str]:
    """For the fuzzer to write: what messages are made of."""
    fields = {field for kind in KINDS.values() for field in kind.__struct_fields__}
    yield from (f'"{field}":' for field in sorted(fields))
    yield from (
        '{"',
        '"}',
        "[{",
        "}]",
        ",",
        ":",
        "null",
        "true",
        "false",
        '""',
        "-0",
        "1e5",
        "0.5",
        "9007199254740993",
        r"\ud83d\ude00",
    )
    yield from (r"\u0000", r"\ud800", "\\n", "NaN", "1e999", "[[[[[[[[", '{"a":')
    yield from _NAMES
