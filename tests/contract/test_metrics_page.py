"""The page of metrics says what the code declares, and what is declared is named as Prometheus wants it."""

from __future__ import annotations

from tests.contract.metrics_page import PAGE, render
from tests.metric_labels import LABELS, OUTCOMES, REASONS
from tests.metrics_kit import SUFFIXES, TARGET_LABELS, Family, declared

# https://prometheus.io/docs/practices/naming/#base-units, and what is counted one by one.
UNITS = ("_seconds", "_bytes", "_tokens", "_ratio", "_windows", "_info")


def own() -> list[Family]:
    return [family for families in declared().values() for family in families if family.name.startswith("portcullis_")]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "run python -m tests.contract.metrics_page"


def test_each_metric_is_declared_by_one_service() -> None:
    names = [family.name for family in own()]
    assert len(names) == len(set(names)) > 50


def test_names_end_with_their_unit_and_every_metric_says_what_it_is() -> None:
    for family in own():
        assert family.kind in SUFFIXES, family
        assert family.help.endswith("."), family
        assert family.kind != "histogram" or family.name.endswith(UNITS), family
        for word in ("milli", "_ms", "_kb", "_percent"):
            assert word not in family.name, family


def test_no_label_is_one_of_the_target_and_each_is_described() -> None:
    used = {label for families in declared().values() for family in families for label in family.labels}
    assert not used & TARGET_LABELS
    assert used | {"le"} == set(LABELS)


def test_outcomes_and_reasons_are_listed_for_each_metric_that_has_them() -> None:
    for label, listed in (("outcome", OUTCOMES), ("reason", REASONS)):
        assert {family.name for family in own() if label in family.labels} == set(listed)
