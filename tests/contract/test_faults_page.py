"""The page of faults says what the matrix is."""

from __future__ import annotations

from tests.chaos.faults_page import PAGE, render


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "run python -m tests.chaos.faults_page"
