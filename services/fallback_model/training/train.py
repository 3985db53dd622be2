"""Fine-tunes the network on `samples` and leaves a checkpoint with the averaged weights."""

from __future__ import annotations

import copy
import json
import math
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
from services.fallback_model.training.network import Detector, load_base
from services.fallback_model.training.samples import Sample, Sampler, read_rows

CLS, SEP, PAD = 101, 102, 0


@dataclass(frozen=True)
class Plan:
    """How long and how hard to train.

    The length is counted in tokens, padding included, so it does not hang on the machine. `minutes` bounds it by the clock
    as well: the learning rate then decays by whichever is nearer its end, and the run can no longer be repeated exactly.
    """

    tokens: int = 7_000_000
    minutes: float = math.inf
    max_tokens: int = 128
    batch_tokens: int = 2560
    batch_rows: int = 64
    learning_rate: float = 1.2e-4
    head_rate: float = 1e-3
    warm_up: float = 0.05
    final_share: float = 0.02
    weight_decay: float = 0.01
    dropout: float = 0.1
    threat_share: float = 0.3
    averaging: float = 0.998
    pool: int = 3000
    snapshot_every: float = 0.15
    seed: int = 17
    threads: int = 2


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
    logits, threats = model(batch.ids, batch.mask)
    binary = functional.binary_cross_entropy_with_logits(logits, batch.target, batch.weight, reduction="mean")
    kinds = functional.binary_cross_entropy_with_logits(threats, batch.threat, reduction="none").sum(1)
    return binary + plan.threat_share * (kinds * batch.threat_weight).sum() / len(logits)


def rate(done: float, plan: Plan) -> float:
    """Share of the full learning rate when the share `done` of the training is behind: linear warm-up, cosine decay."""
    if done < plan.warm_up:
        return done / plan.warm_up
    turn = (done - plan.warm_up) / (1 - plan.warm_up)
    return plan.final_share + (1 - plan.final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, turn)))


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


def train(train_file: Path, base: Path, out: Path, plan: Plan, start: Path | None = None) -> Path:
    """Trains and returns the path of the checkpoint (`weights.pt`) in `out`; snapshots of the average go there on the way.

    `start` is a checkpoint to go on from instead of the base weights.
    """
    if "WORLD_SIZE" in os.environ and not distributed.is_initialized():
        distributed.init_process_group("gloo")
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(asdict(plan), indent=1))
    model = load_base(base / "model.safetensors", len(THREATS), plan.dropout)
    if start is not None:
        model.load_state_dict(torch.load(start, weights_only=True))
    # Left as they are: two thirds of the weights, whose update would cost more than it gains, and words that no sample
    # holds keep their meaning relative to those that one does.
    model.words.weight.requires_grad = False
    heads = [*model.malicious.parameters(), *model.threats.parameters()]
    known = {id(parameter) for parameter in heads}
    body = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    optimizer = torch.optim.AdamW(
        [{"params": body, "lr": plan.learning_rate}, {"params": heads, "lr": plan.head_rate}],
        weight_decay=plan.weight_decay,
        fused=True,
    )
    full = [group["lr"] for group in optimizer.param_groups]
    average = copy.deepcopy(model)
    plan = replace(plan, seed=plan.seed + 1000 * rank)  # every process draws its own samples
    stream = Sampler(read_rows(train_file), plan.seed).stream()
    tokens, rows, clock_share = 0.0, 0.0, 0.0
    next_snapshot, losses, began = plan.snapshot_every, [], time.monotonic()
    model.train()
    for step, batch in enumerate(batches(stream, bare_tokenizer(base / "tokenizer.json"), plan), 1):
        done = max(tokens / plan.tokens, clock_share)
        if done >= 1.0:
            break
        for group, top in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = top * rate(done, plan)
        loss = loss_of(model, batch, plan)
        loss.backward()
        own = [float(batch.ids.numel()), float(len(batch.ids)), (time.monotonic() - began) / (60 * plan.minutes), loss.item()]
        mean_tokens, mean_rows, clock_share, mean_loss = join_gradients(model, own)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += mean_tokens * world
        rows += mean_rows * world
        losses.append(mean_loss)
        with torch.no_grad():
            keep = min(plan.averaging, 1 - 1 / step)
            for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
                if theirs.requires_grad:
                    ours.lerp_(theirs, 1 - keep)
        if step % 50 == 0 and rank == 0:
            spent = time.monotonic() - began
            print(  # noqa: T201  # the log of a command line tool
                f"step {step} done {done:.3f} rows {rows:.0f} loss {np.mean(losses[-50:]):.4f} tok/s {tokens / spent:.0f} "
                f"left {spent / done * (1 - done) / 60 if done else 0:.1f} min",
                flush=True,
            )
        if done >= next_snapshot and rank == 0:
            next_snapshot += plan.snapshot_every
            torch.save(average.state_dict(), out / "snapshot.pt")
    if rank == 0:
        torch.save(average.state_dict(), out / "weights.pt")
    return out / "weights.pt"
