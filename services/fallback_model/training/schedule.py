"""One step of training, the learning rate over the tokens, and what is printed on the way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_FINAL_SHARE = 0.01
_WEIGHT_DECAY = 0.01
_LONGEST_STEP = 1.0
"""Gradients longer than this are shortened to it."""


def autocast(device: torch.device) -> torch.autocast:
    """bf16 where it pays and is safe."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


def optimizer_of(groups: Sequence[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW on groups of `params` with the learning rate `full` each."""
    return torch.optim.AdamW([{**group, "lr": group["full"]} for group in groups], weight_decay=_WEIGHT_DECAY, fused=True)


@dataclass
class Progress:
    """How far a part of the training is. The rate rises over the first `warm_up` tokens, stays, and falls linearly over the last
    share `decay` (trapezoidal, as in Hu et al. 2024, MiniCPM)."""

    name: str
    tokens: int
    warm_up: int
    decay: float
    done: int = 0
    steps: int = 0
    began: float = field(default_factory=time.monotonic)
    losses: list[Tensor] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return self.done >= self.tokens

    def share(self) -> float:
        """Share of the full learning rate."""
        left = max(0.0, 1 - self.done / self.tokens)
        return min(1.0, (self.done + 1) / max(1, self.warm_up), max(_FINAL_SHARE, left / self.decay))

    def note(self, loss: Tensor, tokens: int) -> None:
        self.done += tokens
        self.steps += 1
        self.losses.append(loss.detach())
        if self.steps % 200 == 0 or self.over:
            speed = self.done / (time.monotonic() - self.began)
            mean = torch.stack(self.losses).mean().item()
            self.losses.clear()
            print(  # noqa: T201  # the log of a command line tool
                f"{self.name}: step {self.steps}, {self.done / 1e6:.1f} of {self.tokens / 1e6:.1f} M tokens, loss {mean:.4f}, "
                f"{speed / 1e3:.0f} k tokens/s, {(self.tokens - self.done) / speed / 60:.1f} min left",
                flush=True,
            )


def step(model: nn.Module, optimizer: torch.optim.AdamW, loss: Tensor, progress: Progress, tokens: int) -> None:
    """Backwards, and one step of the optimizer."""
    share = progress.share()
    for group in optimizer.param_groups:
        group["lr"] = group["full"] * share
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _LONGEST_STEP)
    optimizer.step()
    optimizer.zero_grad()
    progress.note(loss, tokens)
