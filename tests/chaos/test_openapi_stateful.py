"""Calls that follow from one another, as /openapi.json links them: a job from its submission to its cancellation, a key's life.

`test_openapi_holds.py` tries every call by itself; here what was answered is what is asked about next, in any order.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case
from schemathesis.checks import not_a_server_error
from schemathesis.core.transport import Response
from schemathesis.specs.openapi.checks import (
    ensure_resource_availability,
    negative_data_rejection,
    positive_data_acceptance,
    use_after_free,
)

from tests.chaos.kit import CONTRACT_STATUSES, Stack, unlimited_key, wait_for_detection
from tests.fuzz.budget import examples

# What a name or a date may be is finer than the schema says. A job is there before its submission is complete, and after it was
# cancelled. And of the 5xx there are two that the contract has.
LEFT_OUT: list[Any] = [
    negative_data_rejection,
    positive_data_acceptance,
    use_after_free,
    ensure_resource_availability,
    not_a_server_error,
]
# What a caller's own key is used up by belongs to the test of single calls.
APART = {"/auth/key", "/auth/rotate", "/auth/register"}
MOST_RETRY_SECONDS = 20


def test_calls_that_follow_from_one_another_are_answered_as_described(stack: Stack) -> None:
    wait_for_detection(stack, 30)
    headers = {"X-API-Key": asyncio.run(unlimited_key(stack)), "X-Admin-Token": stack.secret("PORTCULLIS_ADMIN_TOKEN")}
    schema = schemathesis.openapi.from_url(f"{stack.url}/openapi.json").exclude(path=sorted(APART))
    seen: Counter[tuple[str, int]] = Counter()

    class Calls(schema.as_state_machine()):  # type: ignore[misc]
        def before_call(self, case: Case[Any]) -> None:
            # No drawn string says so; three batches of four are to be jobs.
            if case.path == "/v1/detect/batch" and zlib.crc32(repr(case.body).encode()) % 4:
                case.headers["Prefer"] = "respond-async"

        def get_call_kwargs(self, case: Case[Any]) -> dict[str, Any]:
            return {"headers": headers}

        def validate_response(self, response: Response, case: Case[Any], **kwargs: Any) -> None:
            case.validate_response(response, excluded_checks=LEFT_OUT, transport_kwargs={"headers": headers})
            seen[f"{case.method} {case.path}", response.status_code] += 1
            assert response.status_code in CONTRACT_STATUSES
            if response.status_code in (429, 503):
                (retry,) = response.headers["retry-after"]
                assert 1 <= int(retry) <= MOST_RETRY_SECONDS

    Calls.run(
        settings=settings(
            max_examples=examples(15),
            stateful_step_count=10,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
    )
    print(dict(seen))
    followed = {
        "POST /v1/detect/batch": 202,
        "GET /v1/jobs/{id}": 200,
        "GET /v1/jobs/{id}/results": 200,
        "DELETE /v1/jobs/{id}": 200,
    }
    assert set(followed.items()) <= set(seen), "no job was followed to its end"
    wait_for_detection(stack, 30)
