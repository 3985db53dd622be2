"""What /openapi.json says is what the running stack does: generated requests with a key, no 5xx and no status undocumented."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from tests.chaos.kit import Stack, unlimited_key, wait_for_detection

# What a name or a date may be is finer than the schema says, and 70.0 is an integer to JSON Schema only.
LEFT_OUT: list[Any] = [negative_data_rejection, positive_data_acceptance]


def test_every_status_is_documented_and_none_is_a_failure(stack: Stack) -> None:
    wait_for_detection(stack, 30)
    headers = {"X-API-Key": asyncio.run(unlimited_key(stack)), "X-Admin-Token": stack.secret("PORTCULLIS_ADMIN_TOKEN")}
    seen: Counter[int] = Counter()

    def call(case: Case[Any]) -> None:
        response = case.call_and_validate(headers=headers, excluded_checks=LEFT_OUT)
        seen[response.status_code] += 1
        assert response.status_code < 500
        if (case.method, case.path) in {("DELETE", "/auth/key"), ("POST", "/auth/rotate")} and response.status_code < 300:
            headers["X-API-Key"] = asyncio.run(unlimited_key(stack))  # the old one has been used up

    schema = schemathesis.openapi.from_url(f"{stack.url}/openapi.json")
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]  # Err raises
    assert len(operations) > 10
    bounds = settings(max_examples=15, database=None, suppress_health_check=list(HealthCheck))
    for operation, mode in product(operations, GenerationMode):
        generated: Any = given(operation.as_strategy(generation_mode=mode))
        check: Callable[[], None] = bounds(generated(call))
        with suppress(Unsatisfiable):  # a call without parameters has no wrong ones
            check()
    print(dict(seen))
    assert {200, 201, 204, 404, 422} <= set(seen)
