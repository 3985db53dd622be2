"""What the normaliser promises of any text."""

from __future__ import annotations

from services.fallback_model import characters
from services.fallback_model.lexicon import Lexicon
from services.fallback_model.normalise import MOST_FRAGMENTS, SPARE_CHARACTERS, Normalised, View, normalise


def check_views(text: str, lexicon: Lexicon) -> None:
    """Views are bounded in number and size, and every place that they name is inside the text."""
    for spelt in (True, False):
        found = normalise(text, lexicon, spelt=spelt)
        _check_bounds(found, len(text), spelt)
        for view in found.views:
            _check_places(view, len(text))


def _check_bounds(found: Normalised, length: int, spelt: bool) -> None:
    assert 1 <= len(found.views) <= MOST_FRAGMENTS + 2
    most = characters.MOST_SPELT * characters.MOST_GROWTH
    assert sum(len(view.text) for view in found.views) <= most * (3 * length + SPARE_CHARACTERS)
    if not spelt:
        decoded = [view.text for view in found.views if view.region is not None]
        assert sum(map(len, decoded)) <= length + SPARE_CHARACTERS
    assert all(count > 0 for count in found.transforms.values())


def _check_places(view: View, length: int) -> None:
    assert view.starts is None or len(view.starts) == len(view.text)
    size = len(view.text)
    for start, end in ((0, 1), (size // 2, size // 2 + 1), (size - 1, size), (0, size)):
        if 0 <= start < end <= size:
            first, last = view.source(start, end)
            assert 0 <= first < last <= length
