"""Windows cover every token, and the way back to characters holds."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.fallback_model.engine import load_tokenizer
from services.fallback_model.paths import DEFAULT_MODEL
from services.fallback_model.windows import Windower, characters

TOKENIZER = load_tokenizer(DEFAULT_MODEL)
WINDOWER = Windower(TOKENIZER, max_tokens=16, overlap=5)


@settings(max_examples=150)
@given(st.lists(st.sampled_from(["alpha", "b", "gamma!", "unbelievably", "...", "x9", "忽"]), max_size=120).map(" ".join))
def test_every_token_is_in_a_window_and_no_window_is_too_long(text: str) -> None:
    encoding = WINDOWER.encode([text])[0]
    windows = WINDOWER.cut(WINDOWER.ids(text))
    seen = {index for window in windows for index in range(window.first, window.last)}
    assert seen == set(range(len(encoding.ids)))
    for window in windows:
        assert len(window.ids) <= 16
        assert window.ids[0] == 101
        assert window.ids[-1] == 102
        assert window.ids[1:-1].tolist() == encoding.ids[window.first : window.last]
        start, end = characters(encoding, window)
        assert 0 <= start <= end <= len(text)
    for before, after in itertools.pairwise(windows):
        assert before.last - after.first >= 5


_PARTS = st.one_of(
    st.sampled_from(
        [
            "Alpha",
            "BETA-9",
            "it's",
            "[MASK]",
            "[mask]",
            "[SEP]",
            "x" * 101,
            "\x00",
            "\x0b",
            "\x7f",
            "\r\n",
            "\t",
            "é",
            "忽",
            "\u200b",
        ]
    ),
    st.text(st.characters(max_codepoint=0x7F), max_size=12),
)


@settings(max_examples=300)
@given(st.lists(_PARTS, max_size=12).map("".join))
def test_plain_texts_become_the_tokens_that_the_whole_tokenizer_gives(text: str) -> None:
    whole = TOKENIZER.encode(text, add_special_tokens=False)
    (located,) = WINDOWER.encode([text])
    assert WINDOWER.ids(text).tolist() == whole.ids
    assert (located.ids, located.offsets) == (whole.ids, whole.offsets)


def test_a_text_without_tokens_still_has_a_window() -> None:
    encoding = WINDOWER.encode([""])[0]
    (window,) = WINDOWER.cut(WINDOWER.ids(""))
    assert characters(encoding, window) == (0, 0)


def test_an_overlap_that_would_not_move_forward_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        Windower(load_tokenizer(DEFAULT_MODEL), max_tokens=16, overlap=14)


def test_time_to_place_windows_grows_no_faster_than_the_text() -> None:
    """Four times the tokens take at most some eight times as long to cut and to place."""

    def seconds(words: int) -> float:
        text = "alpha " * words
        encoding = WINDOWER.encode([text])[0]
        spent = []
        for _ in range(3):
            began = time.process_time()
            for window in WINDOWER.cut(WINDOWER.ids(text)):
                characters(encoding, window)
            spent.append(time.process_time() - began)
        return min(spent)

    assert seconds(20_000) <= 8 * seconds(5_000) + 0.02
