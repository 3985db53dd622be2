"""Teaches the encoder other languages by what it knows of English (Reimers and Gurevych 2020, multilingual distillation).

The encoder is moved so that a translation's mean state is that which the English text had before (a frozen copy says so), and the
English text's stays there. Beside the distance, each translation must be nearer to its own English text than to the others of the
batch (van den Oord et al. 2018, InfoNCE).
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from services.fallback_model.characters import spell
from services.fallback_model.training.feed import Tokens, feed, grouped, padded
from services.fallback_model.training.network import Detector, mean_of
from services.fallback_model.training.schedule import Progress, autocast, optimizer_of, step

Pair = tuple[str, str, str]
"""Language, English text, translation."""

_ROOM = 126
_POOL = 6000
_TEMPERATURE = 0.05
_ENGLISH_SHARE = 0.3
_BODY_RATE, _WORDS_RATE = 3e-4, 1e-3
_HELD_EVERY = 100


@dataclass(frozen=True)
class Aligned:
    """Tokens of translations and of their English texts; `same` numbers the English texts: equal numbers, equal texts."""

    translated: Tokens
    english: Tokens
    same: Tensor

    def to(self, device: torch.device) -> Aligned:
        return Aligned(self.translated.to(device), self.english.to(device), self.same.to(device))


def align(
    model: Detector, pairs: list[Pair], tokenizer: Tokenizer, tokens: int, batch_tokens: int, processes: int, seed: int
) -> None:
    """Trains `model`'s encoder in place, for as many tokens of translations. Every hundredth pair is kept for measuring."""
    teacher = copy.deepcopy(model).eval()
    held = pairs[::_HELD_EVERY]
    kept = [pair for place, pair in enumerate(pairs) if place % _HELD_EVERY]
    by_language: dict[str, list[Pair]] = defaultdict(list)
    for pair in kept:
        by_language[pair[0]].append(pair)

    def batches(own_seed: int) -> Iterator[Aligned]:
        return _batches(by_language, tokenizer, batch_tokens, own_seed)

    groups = [
        {"params": list(model.words.parameters()), "full": _WORDS_RATE},
        {"params": [one for name, one in model.named_parameters() if not name.startswith("words.")], "full": _BODY_RATE},
    ]
    optimizer = optimizer_of(groups)
    progress = Progress("align", tokens, warm_up=tokens // 20, decay=0.6)
    device = next(model.parameters()).device
    rng = random.Random(seed)
    model.train()
    for batch in feed(batches, seed, processes):
        there = batch.to(device)
        loss = _loss(model, teacher, there, with_english=rng.random() < _ENGLISH_SHARE)
        step(model, optimizer, loss, progress, batch.translated.ids.numel())
        if progress.over:
            break
    print("align: translations whose English text is the nearest of 300, by language:", found(model, held, tokenizer), flush=True)  # noqa: T201


def _batches(by_language: dict[str, list[Pair]], tokenizer: Tokenizer, batch_tokens: int, seed: int) -> Iterator[Aligned]:
    rng = random.Random(seed)
    languages = sorted(by_language)
    while True:
        drawn = [rng.choice(by_language[rng.choice(languages)]) for _ in range(_POOL)]
        translated = tokenizer.encode_batch([spell(text) for _, _, text in drawn], add_special_tokens=False)
        english = tokenizer.encode_batch([spell(text) for _, text, _ in drawn], add_special_tokens=False)
        numbers = {text: number for number, text in enumerate({text for _, text, _ in drawn})}
        items = [(one.ids, two.ids, numbers[pair[1]]) for one, two, pair in zip(translated, english, drawn, strict=True)]
        for group in grouped(items, lambda item: min(_ROOM, max(len(item[0]), len(item[1]))), batch_tokens, 1024, rng):
            yield Aligned(
                padded([item[0] for item in group], _ROOM),
                padded([item[1] for item in group], _ROOM),
                torch.tensor([item[2] for item in group]),
            )


def _means(model: Detector, tokens: Tokens) -> Tensor:
    keep = tokens.mask.to(torch.float32)
    return mean_of(model.encode(tokens.ids, keep).float(), keep)


def _loss(model: Detector, teacher: Detector, batch: Aligned, *, with_english: bool) -> Tensor:
    with autocast(batch.same.device):
        with torch.no_grad():
            wanted = _means(teacher, batch.english)
        got = _means(model, batch.translated)
        loss = _distance(got, wanted) + _nearest(got, wanted, batch.same)
        if with_english:
            loss = loss + _distance(_means(model, batch.english), wanted)
    return loss


def _distance(got: Tensor, wanted: Tensor) -> Tensor:
    """Squared error as a share of the variance, and one less the cosine."""
    return functional.mse_loss(got, wanted) / wanted.var() + (1 - functional.cosine_similarity(got, wanted)).mean()


def _nearest(got: Tensor, wanted: Tensor, same: Tensor) -> Tensor:
    scores = functional.normalize(got) @ functional.normalize(wanted).T / _TEMPERATURE
    others = (same[:, None] == same[None, :]) & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    return functional.cross_entropy(scores.float().masked_fill(others, -1e4), torch.arange(len(same), device=same.device))


def found(model: Detector, pairs: list[Pair], tokenizer: Tokenizer) -> dict[str, float]:
    """By language: share of translations whose English text is the nearest of up to 300."""
    by_language: dict[str, dict[str, str]] = defaultdict(dict)
    for language, english, text in pairs:
        by_language[language][english] = text
    device = next(model.parameters()).device
    model.eval()
    shares = {}
    with torch.inference_mode(), autocast(device):
        for language, texts in sorted(by_language.items()):
            sides = [list(texts)[:300], list(texts.values())[:300]]
            means = [functional.normalize(_sentences(model, [spell(text) for text in side], tokenizer, device)) for side in sides]
            nearest = (means[1] @ means[0].T).argmax(1)
            shares[language] = round((nearest == torch.arange(len(nearest), device=device)).float().mean().item(), 3)
    model.train()
    return shares


def _sentences(model: Detector, texts: list[str], tokenizer: Tokenizer, device: torch.device) -> Tensor:
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return torch.cat([_means(model, padded(ids[at : at + 64], _ROOM).to(device)).float() for at in range(0, len(ids), 64)])
