"""Gives the base's tokenizer pieces of other languages, in the places of tokens that nothing here uses.

Texts are spelt in ASCII before they are cut (see `characters`), so a third of the places of all-MiniLM-L6-v2's vocabulary can
never be asked for (other scripts, unused places) or hardly ever is (rare English names, which fall apart into pieces instead).
Pieces learnt on spelt texts of other languages take these places: their texts become about half as many tokens, of which more
are words. The size of the network stays what it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, trainers

from services.fallback_model.training.tokens import bare_tokenizer

_EMBEDDING: Final = "embeddings.word_embeddings.weight"
_CONTINUES: Final = "##"
_LEARNT: Final = 30_000
_SPECIAL: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def extend(base: Path, english: Iterable[str], foreign: Mapping[str, Sequence[str]], places: int, out: Path) -> int:
    """Writes `tokenizer.json` and `model.safetensors` of the base with up to `places` tokens replaced; returns how many were.

    `english` and `foreign` (language → texts, about as much of each) are spelt texts. A new piece's vector is the mean of those
    of the pieces that it was made of before.
    """
    tokenizer = bare_tokenizer(base / "tokenizer.json")
    old: dict[str, int] = tokenizer.get_vocab()
    free = _least_used(tokenizer, english)[:places]
    kept = {token: index for token, index in old.items() if index not in set(free)}
    pieces = _pieces(tokenizer, kept, foreign)[: len(free)]
    replaced = dict(zip(free, pieces, strict=False))

    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    names = {index: token for token, index in old.items()} | replaced
    content["model"]["vocab"] = {names[index]: index for index in range(len(names))}
    (out / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

    weights = load_file(str(base / "model.safetensors"))
    name = next(name for name in weights if name.endswith(_EMBEDDING))
    vectors = weights[name].clone()
    for index, piece in replaced.items():
        vectors[index] = weights[name][_made_of(tokenizer, old, piece)].mean(0)
    save_file(
        {key: value.half() for key, value in (weights | {name: vectors}).items() if value.is_floating_point()},
        out / "model.safetensors",
    )
    return len(replaced)


def _least_used(tokenizer: Tokenizer, english: Iterable[str]) -> list[int]:
    """Tokens that may go, those first that the texts use least. Single characters stay: they spell everything else."""
    used = Counter[int]()
    for encoding in tokenizer.encode_batch(list(english), add_special_tokens=False):
        used.update(encoding.ids)

    def may_go(token: str) -> bool:
        return token not in _SPECIAL and (len(token.removeprefix(_CONTINUES)) > 1 or not token.isascii())

    return sorted(
        (index for token, index in tokenizer.get_vocab().items() if may_go(token)), key=lambda index: (used[index], -index)
    )


def _pieces(base: Tokenizer, kept: Mapping[str, int], foreign: Mapping[str, Sequence[str]]) -> list[str]:
    """New pieces, those first that are used most."""
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # noqa: S106  # not a password
    learner.normalizer, learner.pre_tokenizer = base.normalizer, base.pre_tokenizer
    trainer = trainers.WordPieceTrainer(vocab_size=_LEARNT, special_tokens=list(_SPECIAL), show_progress=False)
    learner.train_from_iterator((text for texts in foreign.values() for text in texts), trainer)
    candidates = [token for token in learner.get_vocab() if token not in kept and token.isascii() and token not in _SPECIAL]
    # Numbered anew: the tokenizer wants no gaps.
    joined = {token: index for index, token in enumerate([*sorted(kept, key=kept.__getitem__), *sorted(candidates)])}
    both = Tokenizer(models.WordPiece(joined, unk_token="[UNK]", max_input_chars_per_word=100))  # noqa: S106
    both.normalizer, both.pre_tokenizer = base.normalizer, base.pre_tokenizer
    used = Counter[str]()
    for texts in foreign.values():
        own = Counter[str]()
        for encoding in both.encode_batch(list(texts), add_special_tokens=False):
            own.update(encoding.tokens)
        total = sum(own.values()) or 1
        used.update({token: count * 1_000_000 // total for token, count in own.items()})  # each language counts alike
    return sorted((token for token in candidates if used[token]), key=lambda token: (-used[token], token))


def _made_of(tokenizer: Tokenizer, old: Mapping[str, int], piece: str) -> list[int]:
    ids: list[int] = tokenizer.encode(piece.removeprefix(_CONTINUES), add_special_tokens=False).ids
    if piece.startswith(_CONTINUES):
        first = str(tokenizer.id_to_token(ids[0]))
        ids = [old.get(_CONTINUES + first, ids[0]), *ids[1:]]
    return ids
