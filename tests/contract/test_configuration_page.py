"""The configuration page says what the settings are."""

from __future__ import annotations

from tests.contract.configuration_page import PAGE, render


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "run python -m tests.contract.configuration_page"
