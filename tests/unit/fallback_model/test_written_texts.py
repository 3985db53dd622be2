"""The texts that were written for training: what is held out is never drawn, and every language can be drawn from."""

import json
import random
from pathlib import Path

import pytest

from services.fallback_model.labels import THREATS
from services.fallback_model.training import written

ALL = written.read_all()


def test_the_languages_are_there() -> None:
    assert len(ALL) >= 28
    assert "en" in ALL


@pytest.mark.parametrize("language", sorted(ALL))
def test_what_is_held_out_is_not_trained_on(language: str) -> None:
    texts = ALL[language]
    trained = {text for part in (texts.lists, texts.attacks) for entries in part.values() for text in entries}
    held = {text for _, _, text in texts.held}
    assert not held & trained
    assert len(held) >= len(trained) // 30


@pytest.mark.parametrize("language", sorted(ALL))
def test_threats_are_known_and_both_kinds_can_be_drawn(language: str) -> None:
    texts, rng = ALL[language], random.Random(3)
    assert texts.attacks.keys() <= set(THREATS)
    for _ in range(200):
        attack, kind = texts.attack(rng)
        assert attack.strip()
        assert kind is None or kind in THREATS
        assert texts.hidden(rng).strip()
        assert texts.harmless(rng).strip()


def test_the_held_out_texts_become_rows_for_the_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "written.jsonl"
    number = written.write_held_out(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert len(rows) == number > 500
    assert {row["label"] for row in rows} == {0, 1}
    assert len({row["lang"] for row in rows}) >= 27  # one language has less than ten texts of a kind


def test_what_is_held_out_of_the_translations_is_held_out_in_every_language() -> None:
    trained = {one.english for texts in ALL.values() for one in texts.translations}
    held = {one.english for texts in ALL.values() for one in texts.held_translations}
    assert not trained & held
    assert len(held) > len(trained) // 20
    assert {language for language, texts in ALL.items() if texts.translations} >= {"ar", "de", "hi", "ja", "th", "zh"}


def test_translations_are_of_texts_that_are_trained_on_and_of_both_kinds() -> None:
    english = ALL["en"]
    known = {text for part in (english.lists, english.attacks) for entries in part.values() for text in entries}
    for texts in ALL.values():
        for one in (*texts.translations, *texts.held_translations):
            assert one.english in known
            assert one.text.strip()
            assert (one.threat in THREATS) == bool(one.label)
        assert not texts.translations or {one.label for one in texts.translations} == {0, 1}
