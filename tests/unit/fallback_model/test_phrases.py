"""The grammar of attacks and of harmless look-alikes: every template can be expanded, and the two sides stay apart."""

import random

import pytest

from services.fallback_model.labels import THREATS
from services.fallback_model.training import phrases


@pytest.mark.parametrize("names", [phrases.ATTACK, phrases.HARMLESS], ids=["attack", "harmless"])
def test_every_template_expands(names: dict[str, list[str]]) -> None:
    rng = random.Random(1)
    for templates in names.values():
        for template in templates:
            for _ in range(3):
                assert "{" not in phrases.expand(template, names, rng)


def test_an_unknown_slot_is_told() -> None:
    with pytest.raises(KeyError):
        phrases.expand("{nothing}", phrases.HARMLESS, random.Random(1))


def test_attacks_have_a_known_type_and_nothing_is_drawn_on_both_sides() -> None:
    rng = random.Random(2)
    attacks = [phrases.attack(rng, where) for where in ("attack", "indirect") for _ in range(3000)]
    assert {kind for _, kind in attacks} <= set(THREATS)
    harmless = {phrases.harmless(rng) for _ in range(3000)}
    assert not harmless & {text for text, _ in attacks}
