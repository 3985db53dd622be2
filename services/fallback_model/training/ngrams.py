"""A linear model on hashed n-grams of tokens, whose logit is added to that of the network.

It knows wordings and nothing of meaning, so it errs on other texts than the network does, and both together err on fewer than
either (the wide and the deep part of Cheng et al. 2016, fitted one after the other). What it costs is a look-up for each token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.fallback_model.training.feed import Tokens
from services.fallback_model.training.schedule import Progress

BUCKETS: Final = 1 << 20
MULTIPLIERS: Final = (
    (2_654_435_761, 0, 0),
    (7_919, 1_000_003, 0),
    (104_729, 0, 998_244_353),
    (611_953, 245_489, 1_000_003),
)
"""Of a token, the one before it and the one before that, for each kind of n-gram: the token, the pair, the pair with a gap, the
triple. Odd, so that, where all else is the same, two tokens never meet in a bucket."""
OFFSETS: Final = (1, 2, 3, 5)
SHARE: Final = 0.4
"""What its logit counts beside the network's. From 0.3 to 0.5 all sets that were looked at give nearly the same figures."""
MOST: Final = 1.0
"""No weight is greater: what an n-gram says by itself must not decide, since in other texts it may stand for something else."""
BOUND: Final = 2.0
"""Its logit is never farther from zero, so that no repeated wording can outvote the network, nor the discount of a disguise."""
_RATE: Final = 0.3
_FIRST_SQUARE: Final = 1e-3
"""What Adagrad takes as the gradients that were seen before the first: an n-gram seen once must not weigh much."""


class NGrams(nn.Module):
    """`table`: the weight of each bucket; zeros say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.zeros(BUCKETS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [rows] of int64 [rows, tokens]: the sum of the weights by the square root of the number of tokens, bounded."""
        return pooled(self.table[buckets(input_ids)].sum(-1), attention_mask).clamp(-BOUND, BOUND)


def buckets(input_ids: Tensor) -> Tensor:
    """[rows, tokens] → [rows, tokens, kinds]; what stands before the first token counts as token 0."""
    before = functional.pad(input_ids, (2, 0))
    shown = torch.stack([input_ids, before[:, 1:-1], before[:, :-2]], dim=-1)
    factors = torch.tensor(MULTIPLIERS, device=input_ids.device)
    offsets = torch.tensor(OFFSETS, device=input_ids.device)
    # Multiplied and summed, not as a product of matrices: GPUs have none of whole numbers.
    return ((shown[:, :, None, :] * factors).sum(-1) + offsets) % BUCKETS


def pooled(weights: Tensor, attention_mask: Tensor) -> Tensor:
    """[rows, tokens] → [rows]: the weights of the tokens that count."""
    keep = attention_mask.to(weights.dtype)
    return (weights * keep).sum(1) / keep.sum(1).sqrt()


def fit(model: NGrams, shown: Iterator[tuple[Tokens, Tensor]], tokens: int) -> None:
    """Learns the table anew from texts and their soft labels, as many as have so many `tokens`; logistic regression by Adagrad.

    What is kept is `SHARE` of the weights, without the constant: calibration gives the sum of both logits one.
    """
    device = model.table.device
    table = nn.Embedding(BUCKETS, 1, sparse=True).to(device)
    nn.init.zeros_(table.weight)
    constant = nn.Parameter(torch.zeros(1, device=device))
    sparse = torch.optim.Adagrad(table.parameters(), _RATE, initial_accumulator_value=_FIRST_SQUARE)
    dense = torch.optim.Adagrad([constant], _RATE, initial_accumulator_value=_FIRST_SQUARE)
    progress = Progress("n-grams", tokens, warm_up=0, decay=1.0)
    for batch, target in shown:
        for optimizer in (sparse, dense):
            optimizer.param_groups[0]["lr"] = _RATE * progress.share()
            optimizer.zero_grad()
        logits = pooled(table(buckets(batch.ids))[..., 0].sum(-1), batch.mask) + constant
        # The sum and not the mean: the first square stands for gradients of single texts.
        loss = functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        loss.backward()
        sparse.step()
        dense.step()
        with torch.no_grad():
            table.weight.clamp_(-MOST, MOST)
        progress.note(loss / len(target), batch.ids.numel())
        if progress.over:
            break
    with torch.no_grad():
        model.table.copy_(SHARE * table.weight[:, 0])
