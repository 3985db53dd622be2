from __future__ import annotations

import pytest

from infra.embedded.welcome import NotReadyError, insist


def test_insisting_ends_with_the_first_success() -> None:
    failures = [NotReadyError("not yet"), NotReadyError("not yet")]
    checks = []

    def attempt() -> str:
        if failures:
            raise failures.pop()
        return "verdict"

    assert insist(attempt, 60, lambda: checks.append(1)) == "verdict"
    assert len(checks) == 2


def test_insisting_ends_when_waiting_has_no_point() -> None:
    def attempt() -> None:
        raise NotReadyError("not yet")

    def check() -> None:
        raise LookupError("it keeps dying")

    with pytest.raises(LookupError):
        insist(attempt, 60, check)


def test_insisting_ends_with_the_last_reason() -> None:
    def attempt() -> None:
        raise NotReadyError("registration is closed")

    with pytest.raises(NotReadyError, match="closed"):
        insist(attempt, 0, lambda: None)
