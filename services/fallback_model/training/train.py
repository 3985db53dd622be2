"""Fine-tunes the network on `samples` and leaves a checkpoint with the averaged weights."""

from __future__ import annotations

import copy
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, distributed
from torch.nn import functional

from services.fallback_model.characters import spell
from services.fallback_model.labels import THREATS
from services.fallback_model.training.locate import positions
from services.fallback_model.training.network import Detector, load_base, load_release
from services.fallback_model.training.samples import CLS, PAD, SEP, Mixture, Sample, Sampler, read_rows


@dataclass(frozen=True)
class Stage:
    """A part of the training that is shown one mixture of samples; `tokens` of all processes together, padding included."""

    tokens: int
    mixture: Mixture


@dataclass(frozen=True)
class Plan:
    """How long and how hard to train.

    The length is counted in tokens, so it does not hang on the machine. The learning rate rises over the first
    `warm_up_tokens`, stays, and falls linearly over the last `decay_share` of all tokens (trapezoidal, as in Hu et al. 2024,
    MiniCPM): so a run can be made longer without having been another run up to then.
    """

    stages: tuple[Stage, ...] = (Stage(7_000_000, "data"), Stage(10_000_000, "all"), Stage(3_700_000, "all"))
    max_tokens: int = 256
    batch_tokens: int = 6144
    batch_rows: int = 160
    learning_rate: float = 2e-4
    head_rate: float = 1e-3
    warm_up_tokens: int = 500_000
    decay_share: float = 0.18
    final_share: float = 0.01
    weight_decay: float = 0.01
    dropout: float = 0.1
    threat_share: float = 0.3
    averaging: float = 0.996
    pool: int = 3000
    seed: int = 17
    threads: int = 1

    @property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)


FROM_RELEASE = Plan(
    stages=(Stage(10_000_000, "written"),), learning_rate=1.2e-4, head_rate=3e-4, warm_up_tokens=300_000, decay_share=0.85
)
"""For training on from a release: gentler, since what is there is good, and falling nearly from the beginning."""


@dataclass(frozen=True)
class Batch:
    ids: Tensor
    mask: Tensor
    target: Tensor
    weight: Tensor
    threat: Tensor
    threat_weight: Tensor


def bare_tokenizer(path: Path) -> Tokenizer:
    """The base's tokenizer without its own padding, truncation and special tokens."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def batches(samples: Iterator[Sample], tokenizer: Tokenizer, plan: Plan) -> Iterator[Batch]:
    """Batches of similar length: a pool of samples is sorted by length and cut where rows x longest reaches the budget."""
    rng = random.Random(plan.seed + 1)
    while True:
        pool = []
        drawn = [next(samples) for _ in range(plan.pool)]
        encodings = tokenizer.encode_batch([spell(sample.text) for sample in drawn], add_special_tokens=False)
        for sample, encoding in zip(drawn, encodings, strict=True):
            room = plan.max_tokens - 2
            if len(encoding.ids) > room and sample.complete:
                continue
            pool.append(([CLS, *encoding.ids[:room], SEP], sample))
        pool.sort(key=lambda item: len(item[0]))
        groups: list[list[tuple[list[int], Sample]]] = []
        group: list[tuple[list[int], Sample]] = []
        for item in pool:
            if group and (len(item[0]) * (len(group) + 1) > plan.batch_tokens or len(group) == plan.batch_rows):
                groups.append(group)
                group = []
            group.append(item)
        groups.append(group)
        rng.shuffle(groups)
        for group in groups:
            yield collate(group)


def collate(group: list[tuple[list[int], Sample]]) -> Batch:
    longest = max(len(ids) for ids, _ in group)
    ids = torch.full((len(group), longest), PAD)
    mask = torch.zeros((len(group), longest), dtype=torch.int64)
    threat = torch.zeros((len(group), len(THREATS)))
    threat_weight = torch.zeros(len(group))
    for row, (tokens, sample) in enumerate(group):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        if sample.threat >= 0:
            threat[row, sample.threat] = 1.0
            threat_weight[row] = sample.threat_weight
    return Batch(
        ids,
        mask,
        torch.tensor([sample.target for _, sample in group]),
        torch.tensor([sample.weight for _, sample in group]),
        threat,
        threat_weight,
    )


def loss_of(model: Detector, batch: Batch, plan: Plan) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, threats = model(batch.ids, batch.mask)
    binary = functional.binary_cross_entropy_with_logits(logits.float(), batch.target, batch.weight, reduction="mean")
    kinds = functional.binary_cross_entropy_with_logits(threats.float(), batch.threat, reduction="none").sum(1)
    return binary + plan.threat_share * (kinds * batch.threat_weight).sum() / len(logits)


def rate(tokens: float, plan: Plan) -> float:
    """Share of the full learning rate after `tokens`: up, level, down."""
    left = max(0.0, 1 - tokens / plan.tokens)
    return min(1.0, (tokens + 1) / plan.warm_up_tokens, max(plan.final_share, left / plan.decay_share))


def join_gradients(model: Detector, own: list[float]) -> list[float]:
    """Averages the gradients over all processes of `torchrun`, and with them the figures `own`, which are returned.

    Two processes of one thread get on better on a busy machine than two threads, which wait for each other at every
    operation.
    """
    if not distributed.is_initialized():
        return own
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor(own)])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    place = 0
    for gradient in gradients:
        gradient.copy_(flat[place : place + gradient.numel()].view_as(gradient))
        place += gradient.numel()
    joined: list[float] = flat[place:].tolist()
    return joined


@dataclass
class Progress:
    """What a run needs in order to go on: kept after every stage."""

    model: Detector
    average: Detector
    optimizer: torch.optim.AdamW
    stage: int = 0
    steps: int = 0
    tokens: float = 0.0

    def save(self, path: Path) -> None:
        torch.save(
            {
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "counts": [self.stage, self.steps, self.tokens],
            },
            path,
        )

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.stage, self.steps, self.tokens = state["counts"]


def begin(base: Path, plan: Plan, start: Path | None = None) -> Progress:
    """A run at its start: base weights and fresh heads (or a release's weights), their average, and an optimizer."""
    if start is None:
        model = load_base(base / "model.safetensors", len(THREATS), plan.dropout)
    else:
        model = load_release(start / "model.onnx", len(THREATS), plan.dropout)
    heads = [*model.malicious.parameters(), *model.threats.parameters()]
    known = {id(parameter) for parameter in heads}
    body = [parameter for parameter in model.parameters() if id(parameter) not in known]
    optimizer = torch.optim.AdamW(
        [
            {"params": body, "lr": plan.learning_rate, "full": plan.learning_rate},
            {"params": heads, "lr": plan.head_rate, "full": plan.head_rate},
        ],
        weight_decay=plan.weight_decay,
        fused=True,
    )
    return Progress(model, copy.deepcopy(model), optimizer)


def train(
    train_file: Path, base: Path, out: Path, plan: Plan, stages: int, *, resume: bool = False, start: Path | None = None
) -> Path:
    """Trains and returns the path of the checkpoint (`weights.pt`, the average) in `out`.

    `stages`: how many of the plan's stages to train for now.
    `resume`: go on after the last stage that was finished there; the result is that of a run without a break.
    `start`: a released model directory to train on from, instead of the base model.
    """
    if "WORLD_SIZE" in os.environ and not distributed.is_initialized():
        distributed.init_process_group("gloo")
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed + 1000 * rank)
    out.mkdir(parents=True, exist_ok=True)
    progress = begin(base, plan, start)
    if resume:
        progress.load(out / "state.pt")
    if rank == 0:
        (out / "plan.json").write_text(
            json.dumps(asdict(plan) | {"processes": world, "continued_from": start.name if start else None}, indent=1)
        )
    rows = read_rows(train_file)
    tokenizer = bare_tokenizer(base / "tokenizer.json")
    while progress.stage < stages:
        seed = plan.seed + 100 * progress.stage + 1000 * rank  # every process and stage draws its own samples
        torch.manual_seed(seed)
        # The base model has not seen anything yet that it could be asked about.
        learnt = progress.stage > 0 or start is not None
        found = positions(progress.average, rows, tokenizer, plan.max_tokens) if learnt else None
        stream = Sampler(rows, seed, plan.stages[progress.stage].mixture, found).stream()
        _run_stage(progress, batches(stream, tokenizer, replace(plan, seed=seed)), plan, rank, world)
        progress.stage += 1
        if rank == 0:
            progress.save(out / "state.pt")
            torch.save(progress.average.state_dict(), out / "weights.pt")
    return out / "weights.pt"


def _run_stage(progress: Progress, shown: Iterator[Batch], plan: Plan, rank: int, world: int) -> None:
    model, average, optimizer = progress.model, progress.average, progress.optimizer
    end = sum(stage.tokens for stage in plan.stages[: progress.stage + 1])
    first, began, losses = progress.tokens, time.monotonic(), []
    model.train()
    while progress.tokens < end:
        batch = next(shown)
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * rate(progress.tokens, plan)
        loss = loss_of(model, batch, plan)
        loss.backward()
        mean_tokens, mean_loss = join_gradients(model, [float(batch.ids.numel()), loss.item()])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.tokens += mean_tokens * world
        progress.steps += 1
        losses.append(mean_loss)
        with torch.no_grad():
            keep = min(plan.averaging, 1 - 1 / progress.steps)
            for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
                ours.lerp_(theirs, 1 - keep)
        if progress.steps % 50 == 0 and rank == 0:
            speed = (progress.tokens - first) / (time.monotonic() - began)
            print(  # noqa: T201  # the log of a command line tool
                f"stage {progress.stage} step {progress.steps} tokens {progress.tokens / 1e6:.2f} M of {plan.tokens / 1e6:.1f} M "
                f"loss {np.mean(losses[-50:]):.4f} {speed:.0f} tokens/s, "
                f"{(plan.tokens - progress.tokens) / speed / 60:.0f} min left",
                flush=True,
            )
