"""Where in a long text the network itself sees an attack (multiple-instance learning: the label is the text's, not the window's).

After the first stage, windows of long texts are drawn by this: of a malicious text mostly the window that looks most like an
attack, so that its other windows, which hold none, are not learnt as malicious; of a harmless text that window too, which is
its hardest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tokenizers import Tokenizer
from torch import distributed

from services.fallback_model.training.network import Detector
from services.fallback_model.training.samples import CLS, SEP, Row, spelt

_STEP_SHARE = 0.75
_ROWS = 24


def positions(model: Detector, rows: list[Row], tokenizer: Tokenizer, max_tokens: int) -> dict[str, int]:
    """For each text of more than one window: the character at which its most suspicious window begins.

    Texts are spelt as `Sampler` spells them. With several processes each scores its share, and all get the whole.
    """
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    model.eval()
    best: dict[str, tuple[float, int]] = {}
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        batch: list[tuple[str, int, list[int]]] = []
        for index, window in enumerate(_windows(rows, tokenizer, max_tokens - 2)):
            if index % world != rank:
                continue
            batch.append(window)
            if len(batch) == _ROWS:
                _score(model, batch, best)
                batch = []
        if batch:
            _score(model, batch, best)
    model.train()
    shares: list[dict[str, tuple[float, int]]] = [best]
    if distributed.is_initialized():
        shares = [{} for _ in range(world)]
        distributed.all_gather_object(shares, best)
    joined: dict[str, tuple[float, int]] = {}
    for share in shares:
        for text, found in share.items():
            joined[text] = max(found, joined.get(text, found))
    return {text: start for text, (_, start) in joined.items()}


def _windows(rows: list[Row], tokenizer: Tokenizer, room: int) -> Iterator[tuple[str, int, list[int]]]:
    """Full windows (text, first character, ids) of texts that have more than one."""
    for first in range(0, len(rows), 500):
        texts = [spelt(row).text for row in rows[first : first + 500]]
        for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
            if len(encoding.ids) <= room:
                continue
            for start in [*range(0, len(encoding.ids) - room, int(room * _STEP_SHARE)), len(encoding.ids) - room]:
                yield text, encoding.offsets[start][0], [CLS, *encoding.ids[start : start + room], SEP]


def _score(model: Detector, batch: list[tuple[str, int, list[int]]], best: dict[str, tuple[float, int]]) -> None:
    ids = torch.tensor([window for _, _, window in batch])
    logits = model(ids, torch.ones_like(ids))[0].float().tolist()
    for (text, start, _), logit in zip(batch, logits, strict=True):
        best[text] = max((logit, start), best.get(text, (logit, start)))
