"""The network: a BERT encoder (MiniLM-L6, 384 wide) with a binary head and a head for the six threat types.

Written out by hand because it is short, so training needs torch and nothing of `transformers`, and the ONNX graph that
comes out of it holds exactly these operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from services.fallback_model.training.ngrams import NGrams


@dataclass(frozen=True)
class Shape:
    """Sizes of the encoder; the defaults are all-MiniLM-L6-v2's."""

    vocabulary: int = 30522
    positions: int = 512
    width: int = 384
    layers: int = 6
    heads: int = 12
    inner: int = 1536
    epsilon: float = 1e-12


class Layer(nn.Module):
    """One post-norm transformer layer (Vaswani et al. 2017, as BERT arranges it)."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query = nn.Linear(shape.width, shape.width)
        self.key = nn.Linear(shape.width, shape.width)
        self.value = nn.Linear(shape.width, shape.width)
        self.mix = nn.Linear(shape.width, shape.width)
        self.norm_attention = nn.LayerNorm(shape.width, eps=shape.epsilon)
        self.widen = nn.Linear(shape.width, shape.inner)
        self.narrow = nn.Linear(shape.inner, shape.width)
        self.norm_output = nn.LayerNorm(shape.width, eps=shape.epsilon)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, bias: Tensor) -> Tensor:
        """hidden: [rows, tokens, width]; bias: [rows, 1, 1, tokens], 0 where a token counts and very negative elsewhere."""
        rows, tokens, width = hidden.shape

        def split(projected: Tensor) -> Tensor:
            return projected.view(rows, tokens, self.heads, width // self.heads).transpose(1, 2)

        query, key, value = split(self.query(hidden)), split(self.key(hidden)), split(self.value(hidden))
        if self.training and not hidden.is_cuda:
            # Written out: torch's own attention is half as fast backwards on processors, with heads this small.
            score = torch.matmul(query * (width // self.heads) ** -0.5, key.transpose(2, 3))
            mixed = torch.matmul(torch.softmax(score + bias.to(score.dtype), dim=-1), value)
        else:
            mask = bias.to(query.dtype).expand(rows, self.heads, tokens, tokens)
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(rows, tokens, width)
        hidden = self.norm_attention(hidden + self.dropout(self.mix(mixed)))
        inner = self.narrow(functional.gelu(self.widen(hidden)))
        return self.norm_output(hidden + self.dropout(inner))


def mean_of(hidden: Tensor, keep: Tensor) -> Tensor:
    """Mean over the tokens that count: [rows, width]."""
    weight = keep[:, :, None]
    return (hidden * weight).sum(1) / weight.sum(1)


class Detector(nn.Module):
    """Encoder, mean pooling joined with the first token's state, and two linear heads.

    Mean pooling is what the sentence encoder was trained with; the first token's state is free to become a detector of
    one odd sentence among many, which a mean would water down; a maximum over the tokens sees a single strong one.

    `ngrams` are fitted when the rest is finished, and learn nothing with it: `judge` counts them in, `forward` does not.
    """

    def __init__(self, shape: Shape, threats: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.words = nn.Embedding(shape.vocabulary, shape.width)
        self.places = nn.Embedding(shape.positions, shape.width)
        self.kind = nn.Parameter(torch.zeros(shape.width))
        self.norm = nn.LayerNorm(shape.width, eps=shape.epsilon)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.layers))
        self.dropout = nn.Dropout(dropout)
        self.malicious = nn.Linear(3 * shape.width, 1)
        self.threats = nn.Linear(3 * shape.width, threats)
        self.ngrams = NGrams()

    def encode(self, input_ids: Tensor, keep: Tensor) -> Tensor:
        """The encoder's last states, [rows, tokens, width]; `keep` is 1 where a token counts and 0 elsewhere."""
        bias = (1.0 - keep)[:, None, None, :] * -1e4
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.norm(self.words(input_ids) + self.places(places) + self.kind)
        hidden = self.dropout(hidden)
        for layer in self.layers:
            hidden = layer(hidden, bias)
        return hidden

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both inputs are int64 [rows, tokens]. Returns logits: [rows] for malicious and [rows, threats]."""
        pooled = self.dropout(self.pool(input_ids, attention_mask))
        return self.malicious(pooled)[:, 0], self.threats(pooled)

    def judge(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The logits for malicious that are released, [rows]: those of `forward` and of the n-grams."""
        logits: Tensor = self(input_ids, attention_mask)[0]
        return logits + self.ngrams(input_ids, attention_mask)

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What the heads see: [rows, 3 x width]."""
        keep = attention_mask.to(torch.float32)
        hidden = self.encode(input_ids, keep)
        peak = (hidden + (keep[:, :, None] - 1.0) * 1e4).amax(1)
        return torch.cat([hidden[:, 0], mean_of(hidden, keep), peak], dim=1)


def load_base(path: Path, threats: int, dropout: float) -> Detector:
    """The detector on the weights of a Hugging Face BERT checkpoint (`model.safetensors`), heads fresh.

    Raises KeyError if the checkpoint is not a BERT of the expected shape.
    """
    shape = Shape()
    model = Detector(shape, threats, dropout)
    source = {name.removeprefix("bert."): value for name, value in load_file(str(path)).items()}
    target: dict[str, Tensor] = {
        "words.weight": source["embeddings.word_embeddings.weight"],
        "places.weight": source["embeddings.position_embeddings.weight"],
        "kind": source["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": source["embeddings.LayerNorm.weight"],
        "norm.bias": source["embeddings.LayerNorm.bias"],
    }
    parts = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "mix": "attention.output.dense",
        "norm_attention": "attention.output.LayerNorm",
        "widen": "intermediate.dense",
        "narrow": "output.dense",
        "norm_output": "output.LayerNorm",
    }
    for index in range(shape.layers):
        for ours, theirs in parts.items():
            for end in ("weight", "bias"):
                target[f"layers.{index}.{ours}.{end}"] = source[f"encoder.layer.{index}.{theirs}.{end}"]
    missing, unexpected = model.load_state_dict(target, strict=False)
    heads = {f"{head}.{end}" for head in ("malicious", "threats") for end in ("weight", "bias")}
    if unexpected or set(missing) != heads | {"ngrams.table"}:
        raise KeyError(f"checkpoint does not fit: missing {sorted(set(missing) - heads)}, unexpected {unexpected}")
    return model


def load_release(path: Path, threats: int, dropout: float) -> Detector:
    """The detector on the weights of a released `model.onnx` (see `export`), as far as eight bits have kept them.

    Raises KeyError if the file is not such a release.
    """
    found: dict[str, Any] = {one.name: numpy_helper.to_array(one) for one in onnx.load(str(path)).graph.initializer}
    shape = Shape()
    model = Detector(shape, threats, dropout)
    target: dict[str, Any] = {
        "words.weight": found["words"].astype(np.float32) * found["words.scales"],
        "norm.weight": found["norm.gain"],
        "norm.bias": found["norm.shift"],
    }
    places = model.places.weight.detach().numpy().copy()
    places[: len(found["places"])] = found["places"]  # what the kind adds to each is in these already, and `kind` stays zero
    target["places.weight"] = places

    def linear(name: str) -> tuple[Any, Any]:
        return (found[f"{name}.weight"].astype(np.float32) * found[f"{name}.scale"]).T, found[f"{name}.bias"]

    for index in range(shape.layers):
        layer = f"layers.{index}"
        joined, shift = linear(f"{layer}.joined")
        scale = (shape.width // shape.heads) ** 0.5  # the export folds the scale of the scores into the query
        for place, part in enumerate(("query", "key", "value")):
            rows = slice(place * shape.width, (place + 1) * shape.width)
            factor = scale if part == "query" else 1.0
            target[f"{layer}.{part}.weight"], target[f"{layer}.{part}.bias"] = joined[rows] * factor, shift[rows] * factor
        for part in ("mix", "widen", "narrow"):
            target[f"{layer}.{part}.weight"], target[f"{layer}.{part}.bias"] = linear(f"{layer}.{part}")
        for part in ("norm_attention", "norm_output"):
            target[f"{layer}.{part}.weight"] = found[f"{layer}.{part}.gain"]
            target[f"{layer}.{part}.bias"] = found[f"{layer}.{part}.shift"]
    for head in ("malicious", "threats"):
        target[f"{head}.weight"], target[f"{head}.bias"] = found[f"{head}.weight"].T, found[f"{head}.bias"]
    values = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in target.items()}
    missing, unexpected = model.load_state_dict(values, strict=False)
    # The n-grams are fitted anew on what comes out of further training.
    if unexpected or set(missing) != {"kind", "ngrams.table"}:
        raise KeyError(f"not a release of this network: missing {missing}, unexpected {unexpected}")
    return model
