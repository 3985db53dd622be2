"""Fits the head of the threat types anew on a network that is otherwise finished.

Averaged weights and a head that was learnt on the way to them need not fit together, and a linear head on states that do not
change any more is a matter of minutes.
"""

from __future__ import annotations

import random
from typing import Final

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from services.fallback_model.characters import spell
from services.fallback_model.labels import THREATS
from services.fallback_model.training.feed import grouped, padded
from services.fallback_model.training.network import Detector
from services.fallback_model.training.samples import Sample
from services.fallback_model.training.schedule import autocast

_TOKENS, _ROWS = 8192, 256
_PENALTY: Final = 1e-3
_ROUNDS: Final = 100


def refit_threats(model: Detector, attacks: list[Sample], tokenizer: Tokenizer, room: int) -> None:
    """Replaces the weights of `model.threats`: a linear map that tells the types of `attacks` apart."""
    states, targets, weights = _states(model, attacks, tokenizer, room)
    head = nn.Linear(states.shape[1], len(THREATS)).to(states.device)
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=_ROUNDS, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        each = functional.binary_cross_entropy_with_logits(head(states), targets, reduction="none").sum(1)
        value = (each * weights).sum() / weights.sum() + _PENALTY * head.weight.square().sum()
        value.backward()
        return float(value.detach())

    optimizer.step(loss)
    model.threats.load_state_dict(head.state_dict())


def _states(model: Detector, samples: list[Sample], tokenizer: Tokenizer, room: int) -> tuple[Tensor, Tensor, Tensor]:
    device = next(model.parameters()).device
    encodings = tokenizer.encode_batch([spell(sample.text) for sample in samples], add_special_tokens=False)
    items = [(encoding.ids, sample) for encoding, sample in zip(encodings, samples, strict=True)]
    states: list[Tensor] = []
    threats: list[int] = []
    weights: list[float] = []
    model.eval()
    with torch.inference_mode(), autocast(device):
        for group in grouped(items, lambda item: min(room, len(item[0])) + 2, _TOKENS, _ROWS, random.Random(0)):
            tokens = padded([ids for ids, _ in group], room).to(device)
            states.append(model.pool(tokens.ids, tokens.mask).float())
            threats += [sample.threat for _, sample in group]
            weights += [sample.threat_weight for _, sample in group]
    targets = functional.one_hot(torch.tensor(threats), len(THREATS)).float()
    return torch.cat(states).clone(), targets.to(device), torch.tensor(weights, device=device)
