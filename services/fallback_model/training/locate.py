"""Where in a long text the network itself sees an attack (multiple-instance learning: the label is the text's, not the window's).

Once a first teacher has learnt, windows of long texts are drawn by this: of a malicious text mostly the window that looks most
like an attack, so that its other windows, which hold none, are not learnt as malicious; of a harmless text that window too,
which is its hardest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer

from services.fallback_model.training.network import Detector
from services.fallback_model.training.rows import SpeltRow
from services.fallback_model.training.schedule import autocast
from services.fallback_model.training.tokens import CLS, SEP

_STEP_SHARE = 0.75
_ROWS = 64

Window = tuple[str, int, list[int]]
"""A text, the character at which its window begins, and the window's ids."""


def positions(model: Detector, rows: list[SpeltRow], tokenizer: Tokenizer, max_tokens: int) -> dict[str, int]:
    """For each text of more than one window: the character at which its most suspicious window begins."""
    best: dict[str, tuple[float, int]] = {}
    device = next(model.parameters()).device
    with torch.inference_mode(), autocast(device):
        for batch in _batched(_windows(rows, tokenizer, max_tokens - 2)):
            ids = torch.tensor([window for _, _, window in batch], device=device)
            logits = model(ids, torch.ones_like(ids))[0].float().tolist()
            for (text, start, _), logit in zip(batch, logits, strict=True):
                best[text] = max((logit, start), best.get(text, (logit, start)))
    return {text: start for text, (_, start) in best.items()}


def _batched(windows: Iterator[Window]) -> Iterator[list[Window]]:
    while batch := list(itertools.islice(windows, _ROWS)):
        yield batch


def _windows(rows: list[SpeltRow], tokenizer: Tokenizer, room: int) -> Iterator[Window]:
    """Full windows (text, first character, ids) of texts that have more than one."""
    for first in range(0, len(rows), 500):
        texts = [row.text for row in rows[first : first + 500]]
        for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            if len(encoding.ids) <= room:
                continue
            for start in [*range(0, len(encoding.ids) - room, int(room * _STEP_SHARE)), len(encoding.ids) - room]:
                yield text, encoding.offsets[start][0], [CLS, *encoding.ids[start : start + room], SEP]
