"""Release N and release N+1 side by side: each reads what the other sends, and what the other has stored.

The rule is in docs/operations/upgrade.md; `wire` holds what was agreed upon.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from libs.common import contracts as c
from libs.common.errors import ErrorCode
from services.jobs.core import JobRecord, code_of
from tests.contract import wire
from tests.contract.test_golden_messages import EXAMPLES, golden

STORED = Path(__file__).parent / "stored"
RECORD = STORED / "JobRecord.v1.json"
LATER = {"of_a_later_release": {"a": [1, None, "text"]}}
KEPT: list[type[c.Message]] = [c.JobItem, c.JobResult, c.DeadLetter, c.UsageRecorded]
"""What waits in streams, for days, for whichever release reads it; and the record of each job, which is no message."""


def grown(value: Any) -> Any:
    """The same with a field that nobody knows yet, in every object at every depth."""
    if isinstance(value, dict):
        return {**{name: grown(each) for name, each in value.items()}, **copy.deepcopy(LATER)}
    return [grown(each) for each in value] if isinstance(value, list) else value


def least(kind: type[msgspec.Struct], full: dict[str, Any]) -> dict[str, Any]:
    """As a release sent it in which no field had been added yet."""
    wanted = {field.encode_name for field in msgspec.structs.fields(kind) if field.required}
    return {name: value for name, value in full.items() if name in wanted}


def same(first: msgspec.Struct, second: msgspec.Struct) -> bool:
    """As plain data, less what a later release has put into embedded messages, which stay as they are on their way."""
    one, other = (_known(msgspec.json.decode(msgspec.json.encode(each))) for each in (first, second))
    return bool(one == other)


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _known(each) for name, each in value.items() if name not in LATER}
    return [_known(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_of_the_next_release_says_the_same_to_this_one(message: c.Message) -> None:
    plain = json.loads(golden(message).read_bytes())
    # `timings` are names and numbers and not fields: what is added there is a stage.
    later = json.dumps(_without_timings(grown(plain))).encode()
    read = msgspec.json.decode(later, type=type(message))
    assert same(read, msgspec.json.decode(json.dumps(_without_timings(plain)), type=type(message)))


def _without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_timings(each) for name, each in value.items() if name != "timings"}
    return [_without_timings(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_what_an_earlier_release_did_not_send_has_a_default(message: c.Message) -> None:
    kind = type(message)
    msgspec.json.decode(json.dumps(least(kind, json.loads(golden(message).read_bytes()))), type=kind)


def test_no_message_has_changed_its_form() -> None:
    assert wire.breaks(json.loads(wire.PAGE.read_text()), wire.forms()) == []


def test_what_is_new_is_agreed_upon_as_well() -> None:
    assert json.loads(wire.PAGE.read_text()) == wire.forms(), "run python -m tests.contract.wire"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda forms: forms.pop("Verdict"), "Verdict is gone"),
        (lambda forms: forms["Verdict"]["fields"].pop("confidence"), "Verdict.confidence is gone"),
        (lambda forms: forms["Verdict"]["fields"].update(confidence={"type": "string"}), "Verdict.confidence was"),
        (
            lambda forms: forms["Verdict"]["fields"].update(new={}) or forms["Verdict"]["required"].append("new"),
            "new has no default",
        ),
        (lambda forms: forms["Verdict"]["required"].append("timings"), "Verdict.timings has no default"),
        (lambda forms: forms["Principal"]["fields"]["scopes"]["items"]["enum"].append("x"), "Principal.scopes was"),
    ],
)
def test_a_break_is_seen(change: Any, said: str) -> None:
    released, now = wire.forms(), wire.forms()
    change(now)
    (found,) = wire.breaks(released, now)
    assert said in found


def test_what_is_added_with_a_default_is_no_break() -> None:
    now = wire.forms()
    now["Verdict"]["fields"]["new"] = {"type": "string"}
    now["New"] = {"required": ["a"], "fields": {"a": {}}}
    assert wire.breaks(wire.forms(), now) == []


# --- what is stored ------------------------------------------------------------------------------------------------------


def test_a_record_of_an_earlier_release_is_read_and_goes_on() -> None:
    stored = json.loads(RECORD.read_bytes())
    record = msgspec.json.decode(RECORD.read_bytes(), type=JobRecord)
    assert (record.state, record.total, record.done, record.position) == ("running", 257, 100, 4711)
    assert json.loads(msgspec.json.encode(record)).items() >= stored.items()
    msgspec.json.decode(json.dumps(least(JobRecord, stored)), type=JobRecord)


def test_a_record_of_the_next_release_is_read() -> None:
    later = json.dumps(grown(json.loads(RECORD.read_bytes())))
    assert msgspec.json.decode(later, type=JobRecord) == msgspec.json.decode(RECORD.read_bytes(), type=JobRecord)


@pytest.mark.parametrize("kind", KEPT)
def test_what_waits_in_streams_is_among_the_golden_messages(kind: type[c.Message]) -> None:
    """Of what is stored the tests above say the same as of what is sent."""
    assert kind in {type(message) for message in EXAMPLES}


# --- what is no field ----------------------------------------------------------------------------------------------------


def test_an_error_of_the_next_release_is_taken_for_an_outage_and_not_for_a_verdict() -> None:
    assert code_of(c.ErrorBody(code="of_a_later_release", detail="Something new.")) == ErrorCode.STAGE_UNAVAILABLE
