"""Trains the network: languages first, then teachers on parts of the rows, then a student on the rows and their judgement.

The student is then trained on by the labels alone, which fits the rows better and carries over worse; a release is trained on
with what was written since, of which the reverse holds. What is released lies between the two (Wortsman et al. 2022, robust
fine-tuning: the straight line between such weights holds better ones than its ends).
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from services.fallback_model.characters import spell
from services.fallback_model.eval.corpus import Row, read_rows
from services.fallback_model.labels import THREATS
from services.fallback_model.training import check, ngrams, parallel, vocabulary, written
from services.fallback_model.training.align import Pair, align
from services.fallback_model.training.feed import Tokens, feed, grouped, padded
from services.fallback_model.training.heads import refit_threats
from services.fallback_model.training.locate import positions
from services.fallback_model.training.network import Detector, load_base, load_release
from services.fallback_model.training.rows import FOLDS
from services.fallback_model.training.samples import Sample, Sampler
from services.fallback_model.training.schedule import Progress, autocast, optimizer_of, step
from services.fallback_model.training.tokens import bare_tokenizer

_TYPED = 14_000
"""Attacks that the head of the threat types is fitted on, and a few thousand more."""


@dataclass(frozen=True)
class Plan:
    """How long and how hard to train. Lengths are counted in tokens, so they do not hang on the machine.

    `places`: tokens of the base's vocabulary that give way to pieces of other languages. `judged`: share of a label that is what
    the teachers say. `own_fold`: how much more the teacher counts that has not seen the row. `further_tokens`: what the finished
    network is trained on for; `further_share`: how far the released weights lie towards what comes out of that. `ngram_tokens`:
    what the n-grams are fitted on. From a release, only these last parts are done.
    """

    places: int = 9500
    align_tokens: int = 42_000_000
    teacher_tokens: int = 22_000_000
    student_tokens: int = 85_000_000
    further_tokens: int = 97_000_000
    further_share: float = 0.4
    ngram_tokens: int = 60_000_000
    ngram_batch_tokens: int = 12_288
    max_tokens: int = 256
    batch_tokens: int = 24_576
    batch_rows: int = 640
    learning_rate: float = 2.5e-4
    head_rate: float = 1e-3
    warm_up_share: float = 0.04
    decay: float = 0.6
    dropout: float = 0.1
    threat_share: float = 0.3
    averaging: float = 0.998
    judged: float = 0.5
    own_fold: float = 2.0
    pool: int = 3000
    seed: int = 17


FROM_RELEASE = Plan(
    places=0,
    align_tokens=0,
    teacher_tokens=0,
    student_tokens=0,
    further_tokens=40_500_000,
    further_share=0.5,
    learning_rate=2e-4,
    judged=0.4,
)
"""For training on from a release, which is the teacher for the rows of the data. It knows nothing of what was written since, so
that there the labels alone count."""


@dataclass(frozen=True)
class Batch:
    """`fold` is that of each row's text, -1 for what was made up."""

    tokens: Tokens
    target: Tensor
    weight: Tensor
    threat: Tensor
    threat_weight: Tensor
    fold: Tensor

    def to(self, device: torch.device) -> Batch:
        rest = (self.target, self.weight, self.threat, self.threat_weight, self.fold)
        return Batch(self.tokens.to(device), *(one.to(device, non_blocking=True) for one in rest))


def batches(samples: Iterator[Sample], tokenizer: Tokenizer, plan: Plan, seed: int) -> Iterator[Batch]:
    rng = random.Random(seed)
    room = plan.max_tokens - 2
    while True:
        drawn = [next(samples) for _ in range(plan.pool)]
        encodings = tokenizer.encode_batch([spell(sample.text) for sample in drawn], add_special_tokens=False)
        both = zip(drawn, encodings, strict=True)
        items = [(encoding.ids, sample) for sample, encoding in both if not (sample.complete and len(encoding.ids) > room)]
        for group in grouped(items, lambda item: min(room, len(item[0])) + 2, plan.batch_tokens, plan.batch_rows, rng):
            yield _collate(group, room)


def _fed(sampler: Sampler, tokenizer: Tokenizer, plan: Plan, seed: int, processes: int) -> Iterator[Batch]:
    """Batches of what a sampler draws, from as many processes."""

    def shown(own_seed: int) -> Iterator[Batch]:
        return batches(sampler.seeded(own_seed).stream(), tokenizer, plan, own_seed)

    return feed(shown, seed, processes)


def _collate(group: list[tuple[list[int], Sample]], room: int) -> Batch:
    threat = torch.zeros((len(group), len(THREATS)))
    threat_weight = torch.zeros(len(group))
    for row, (_, sample) in enumerate(group):
        if sample.threat >= 0:
            threat[row, sample.threat] = 1.0
            threat_weight[row] = sample.threat_weight
    return Batch(
        padded([ids for ids, _ in group], room),
        torch.tensor([sample.target for _, sample in group]),
        torch.tensor([sample.weight for _, sample in group]),
        threat,
        threat_weight,
        torch.tensor([sample.fold for _, sample in group]),
    )


def _judgement(teachers: Sequence[Detector], batch: Batch, own_fold: float) -> Tensor:
    """Probabilities: of the teachers' mean logit, in which the one that has not seen the row counts `own_fold` more."""
    with torch.inference_mode():
        logits = torch.stack([teacher(batch.tokens.ids, batch.tokens.mask)[0].float() for teacher in teachers])
        folds = torch.arange(len(teachers), device=logits.device)[:, None]
        weight = 1.0 + own_fold * (batch.fold[None, :] == folds)
        return torch.sigmoid((logits * weight).sum(0) / weight.sum(0)).clone()


def _loss(model: Detector, part: Part, batch: Batch, plan: Plan) -> Tensor:
    target = batch.target
    with autocast(target.device):
        if part.teachers:
            judged = torch.lerp(target, _judgement(part.teachers, batch, plan.own_fold), plan.judged)
            target = torch.where(batch.fold >= 0, judged, target) if part.only_rows else judged
        logits, threats = model(batch.tokens.ids, batch.tokens.mask)
    binary = functional.binary_cross_entropy_with_logits(logits.float(), target, batch.weight, reduction="mean")
    kinds = functional.binary_cross_entropy_with_logits(threats.float(), batch.threat, reduction="none").sum(1)
    return binary + plan.threat_share * (kinds * batch.threat_weight).sum() / len(logits)


@dataclass(frozen=True)
class Part:
    """A part of the training: from what it starts, what it is shown, who judges beside the labels, and for how long.

    `falling`: the learning rate falls from the beginning on, or only over the plan's share of the end. `only_rows`: the teachers
    judge rows of the data, and nothing that was made up or written.
    """

    name: str
    sampler: Sampler
    tokens: int
    seed: int
    teachers: Sequence[Detector] = ()
    falling: bool = False
    only_rows: bool = False


def fit(model: Detector, part: Part, tokenizer: Tokenizer, plan: Plan, processes: int) -> Detector:
    """Trains `model` in place and returns the moving average of its weights."""
    torch.manual_seed(part.seed)
    average = copy.deepcopy(model)
    heads = [*model.malicious.parameters(), *model.threats.parameters()]
    known = {id(parameter) for parameter in heads}
    body = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups: list[dict[str, Any]] = [{"params": body, "full": plan.learning_rate}, {"params": heads, "full": plan.head_rate}]
    optimizer = optimizer_of(groups)
    warm_up = int(part.tokens * plan.warm_up_share)
    progress = Progress(part.name, part.tokens, warm_up, 1 - plan.warm_up_share if part.falling else plan.decay)
    device = next(model.parameters()).device
    model.train()
    ours, theirs = list(average.parameters()), list(model.parameters())
    for batch in _fed(part.sampler, tokenizer, plan, part.seed, processes):
        step(model, optimizer, _loss(model, part, batch.to(device), plan), progress, batch.tokens.ids.numel())
        with torch.no_grad():
            torch._foreach_lerp_(ours, theirs, 1 - min(plan.averaging, 1 - 1 / progress.steps))
        if progress.over:
            break
    average.eval()
    return average


def prepare(rows: list[Row], pairs: list[Pair], base: Path, out: Path, places: int) -> Path:
    """A base with pieces of other languages in its vocabulary, in `out`; made only once."""
    if not (out / "model.safetensors").exists():
        english = [spell(row.text) for row in rows if row.lang == "en"] + sorted({english for _, english, _ in pairs})
        foreign: dict[str, list[str]] = {}
        for language, _, text in pairs:
            foreign.setdefault(language, []).append(spell(text))
        vocabulary.extend(base, english, foreign, places, out)
    return out


def all_pairs(path: Path) -> list[Pair]:
    """The file's, and several times over the translations that were made for this project."""
    own = [(language, one.english, one.text) for language, texts in written.read_all().items() for one in texts.translations]
    return parallel.read(path) + 5 * own


def train(
    data: Path, base: Path, pairs_file: Path | None, out: Path, plan: Plan, *, start: Path | None = None, processes: int = 0
) -> Path:
    """Trains and returns the path of the checkpoint (`weights.pt`, the average) in `out`, beside `tokenizer.json`.

    `data`: folder with train, valid and dev. `start`: a released model to train on from, instead of the base. What is finished is
    kept in `out`, and a second call goes on after it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(asdict(plan) | {"continued_from": start.name if start else None}, indent=1))
    rows = read_rows(data / "train.jsonl.zst")
    pairs = all_pairs(pairs_file) if pairs_file else []
    sampler = Sampler(rows, pairs, plan.seed)
    origin = start or prepare(rows, pairs, base, out / "base", plan.places)
    (out / "tokenizer.json").write_bytes((origin / "tokenizer.json").read_bytes())
    tokenizer = bare_tokenizer(origin / "tokenizer.json")
    sets = check.read_sets(data, tokenizer)

    def finished(part: Part, begin: Callable[[], Detector]) -> Detector:
        path = out / f"{part.name}.pt"
        model: Detector = begin().to(device)
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            model.eval()
            return model
        average = fit(model, part, tokenizer, plan, processes)
        _save(average, path)
        check.show(part.name, average, sets)
        return average

    def locate(model: Detector) -> None:
        sampler.positions = positions(model.eval(), sampler.rows, tokenizer, plan.max_tokens)

    if start:
        student = load_release(start / "model.onnx", len(THREATS), plan.dropout).to(device)
        locate(student)
    else:
        model = load_base(origin / "model.safetensors", len(THREATS), plan.dropout).to(device)
        if (out / "aligned.pt").exists():
            model.load_state_dict(torch.load(out / "aligned.pt", weights_only=True))
        else:
            align(model, pairs, tokenizer, plan.align_tokens, plan.batch_tokens, processes, plan.seed)
            _save(model, out / "aligned.pt")
        teachers: list[Detector] = []
        for fold in range(FOLDS):
            part = Part(f"teacher-{fold}", sampler.without(fold), plan.teacher_tokens, plan.seed + 1 + fold)
            teachers.append(finished(part, lambda: _beginner(model)))
            if not sampler.positions:
                locate(teachers[0])
        part = Part("student", sampler, plan.student_tokens, plan.seed, teachers)
        student = finished(part, lambda: _beginner(model))
    if plan.further_tokens:
        if start:
            before = copy.deepcopy(student).eval()
            part = Part("further", sampler, plan.further_tokens, plan.seed + 12, [before], only_rows=True)
        else:
            part = Part("further", sampler, plan.further_tokens, plan.seed + 10, falling=True)
        further = finished(part, lambda: copy.deepcopy(student))
        with torch.no_grad():
            for ours, theirs in zip(student.parameters(), further.parameters(), strict=True):
                ours.lerp_(theirs, plan.further_share)
        refit_threats(student, sampler.seeded(plan.seed + 20).typed(_TYPED), tokenizer, plan.max_tokens - 2)
    shorter = replace(plan, batch_tokens=plan.ngram_batch_tokens)
    fed = (batch.to(device) for batch in _fed(sampler, tokenizer, shorter, plan.seed + 30, processes))
    ngrams.fit(student.ngrams, ((batch.tokens, batch.target) for batch in fed), plan.ngram_tokens)
    _save(student, out / "weights.pt")
    check.show("released", student, sets)
    return out / "weights.pt"


def _beginner(aligned: Detector) -> Detector:
    """The aligned encoder with heads that have learnt nothing yet."""
    model = copy.deepcopy(aligned)
    for head in (model.malicious, model.threats):
        head.reset_parameters()
    return model


def _save(model: Detector, path: Path) -> None:
    torch.save({key: value.detach().cpu() for key, value in model.state_dict().items()}, path)
