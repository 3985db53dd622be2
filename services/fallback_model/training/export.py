"""Writes the network as ONNX: in float32, and with weights and activations of eight bits.

The graph is built operation by operation and not traced, so that each is the one that onnxruntime has a fast kernel for.

**Eight bits.** Weights are rounded per output channel, word vectors per word; activations to scales that were measured once, on
texts, and then fixed. Fixed scales make a row's result independent of the rows that share its batch: the same text gets the same
answer whatever else is being scored. (Scales measured per batch, which onnxruntime calls dynamic, move a logit with its
neighbours.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from services.fallback_model.labels import THREATS
from services.fallback_model.training import ngrams
from services.fallback_model.training.network import Detector, Shape

OPSET = 20  # Gelu is an operation of its own from here on
_MASKED = -1e4
MOST_WEIGHT = 64
"""Weights use seven of the eight bits: without VNNI instructions two products are added in 16 bits, and 2 x 255 x 64 fits."""
Floats = NDArray[np.float32]
Ranges = Mapping[str, tuple[float, float]]
"""Activation → the least and the greatest value that it is rounded within."""


def load_weights(path: Path) -> Detector:
    """A trained network from its checkpoint, ready to evaluate."""
    model = Detector(Shape(), len(THREATS), dropout=0.0)
    model.load_state_dict(torch.load(path, weights_only=True))
    model.eval()
    return model


def write_onnx(model: Detector, path: Path, max_tokens: int, ranges: Ranges | None = None) -> list[str]:
    """Inputs `input_ids` and `attention_mask`, int64 [rows, tokens]; outputs `logit` [rows] and `threats` [rows, 6], float32.

    `ranges` None: float32. Returns the names of the activations that ranges are needed for.
    """
    graph = _Graph(ranges)
    _network(graph, {name: value.numpy() for name, value in model.state_dict().items()}, Shape(), max_tokens)
    outputs = [
        helper.make_tensor_value_info("logit", TensorProto.FLOAT, ["rows"]),
        helper.make_tensor_value_info("threats", TensorProto.FLOAT, ["rows", len(THREATS)]),
    ]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["rows", "tokens"]) for name in ("input_ids", "attention_mask")
    ]
    made = helper.make_model(
        helper.make_graph(graph.nodes, "detector", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    onnx.save(made, str(path))
    return graph.activations


def measure_ranges(
    path: Path, activations: list[str], batches: Iterable[dict[str, NDArray[np.int64]]], coverage: float
) -> Ranges:
    """The range of each activation of the float32 model at `path` over `batches` of inputs, padding left out.

    `coverage`: the share of a batch's values that its range holds; the widest range of all batches counts.
    """
    model = onnx.load(str(path))
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in activations)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    low, high = dict.fromkeys(activations, 0.0), dict.fromkeys(activations, 0.0)
    for feeds in batches:
        kept = feeds["attention_mask"].astype(bool)
        for name, values in zip(activations, session.run(activations, feeds), strict=True):
            inside = values[kept].ravel()
            bottom, top = np.quantile(inside, [1 - coverage, coverage]) if coverage < 1 else (inside.min(), inside.max())
            low[name], high[name] = min(low[name], float(bottom)), max(high[name], float(top))
    return {name: (low[name], high[name]) for name in activations}


@dataclass
class _Graph:
    """Nodes and constants in the making. Every method returns the name of what it computes."""

    ranges: Ranges | None
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)
    _quantised: dict[str, str] = field(default_factory=dict)

    def node(self, kind: str, *inputs: str, name: str, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, domain=domain, **attributes))
        return name

    def constant(self, name: str, values: Any, kind: Any = np.float32) -> str:
        self.constants.append(numpy_helper.from_array(np.array(values, dtype=kind, order="C"), name))
        return name

    def linear(self, values: str, weight: Floats, bias: Floats, name: str) -> str:
        """values @ weight.T + bias; `weight`: [out, in], as torch keeps it."""
        shift = self.constant(f"{name}.bias", bias)
        if self.ranges is None:
            if values not in self.activations:
                self.activations.append(values)
            product = self.node("MatMul", values, self.constant(f"{name}.weight", weight.T), name=f"{name}.product")
            return self.node("Add", product, shift, name=name)
        rounded, scale, zero = self._eight_bits(values)
        scales = np.maximum(np.abs(weight).max(axis=1), 1e-8) / MOST_WEIGHT
        whole = np.clip(np.rint(weight / scales[:, None]), -MOST_WEIGHT, MOST_WEIGHT)
        return self.node(
            "MatMulIntegerToFloat",
            rounded,
            self.constant(f"{name}.weight", whole.T, np.int8),
            scale,
            self.constant(f"{name}.scale", scales),
            zero,
            self.constant(f"{name}.zero", np.zeros(len(scales)), np.int8),
            shift,
            name=name,
            domain="com.microsoft",
        )

    def _eight_bits(self, values: str) -> tuple[str, str, str]:
        assert self.ranges is not None
        scale, zero = f"{values}.scale", f"{values}.zero"
        if values not in self._quantised:
            low, high = self.ranges[values]
            step = (high - low) / 255
            self.constant(scale, step)
            self.constant(zero, round(-low / step), np.uint8)
            self._quantised[values] = self.node("QuantizeLinear", values, scale, zero, name=f"{values}.rounded")
        return self._quantised[values], scale, zero

    def words(self, ids: str, table: Floats) -> str:
        """The word vectors [rows, tokens, width]."""
        if self.ranges is None:
            return self.node("Gather", self.constant("words", table), ids, name="words.found")
        scales = np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-8) / 127
        rounded = self.constant("words", np.clip(np.rint(table / scales), -127, 127), np.int8)
        whole = self.node(
            "Cast", self.node("Gather", rounded, ids, name="words.rounded"), name="words.whole", to=TensorProto.FLOAT
        )
        scale = self.node("Gather", self.constant("words.scales", scales), ids, name="words.scale")
        return self.node("Mul", whole, scale, name="words.found")

    def norm(self, values: str, weights: Mapping[str, Floats], name: str, epsilon: float) -> str:
        gain, shift = (
            self.constant(f"{name}.gain", weights[f"{name}.weight"]),
            self.constant(f"{name}.shift", weights[f"{name}.bias"]),
        )
        return self.node("LayerNormalization", values, gain, shift, name=f"{name}.out", axis=-1, epsilon=epsilon)


def _network(graph: _Graph, weights: Mapping[str, Floats], shape: Shape, max_tokens: int) -> None:
    node, constant = graph.node, graph.constant
    zero, one, two = (constant(f"index.{value}", [value], np.int64) for value in (0, 1, 2))
    tokens = node("Shape", "input_ids", name="tokens", start=1, end=2)
    places = weights["places.weight"][:max_tokens] + weights["kind"]
    place = node("Slice", constant("places", places), zero, tokens, zero, name="place")
    hidden = graph.norm(
        node("Add", graph.words("input_ids", weights["words.weight"]), place, name="embedded"), weights, "norm", shape.epsilon
    )
    keep = node("Cast", "attention_mask", name="keep", to=TensorProto.FLOAT)
    masked = node("Mul", node("Sub", constant("one", 1.0), keep, name="dropped"), constant("far", _MASKED), name="masked")
    both = constant("axes.1.2", [1, 2], np.int64)
    bias = node("Unsqueeze", masked, both, name="bias")
    for index in range(shape.layers):
        hidden = _layer(graph, weights, f"layers.{index}", hidden, bias, shape)
    first = node("Squeeze", node("Slice", hidden, zero, one, one, name="begin"), one, name="first")
    weight = node("Unsqueeze", keep, two, name="weight")
    total = node("ReduceSum", node("Mul", hidden, weight, name="kept"), one, name="total", keepdims=0)
    mean = node("Div", total, node("ReduceSum", weight, one, name="count", keepdims=0), name="mean")
    away = node("Unsqueeze", masked, two, name="away")
    peak = node("ReduceMax", node("Add", hidden, away, name="shown"), one, name="peak", keepdims=0)
    pooled = node("Concat", first, mean, peak, name="pooled", axis=1)
    for head, name in (("malicious", "logits"), ("threats", "threats")):
        columns = constant(f"{head}.weight", weights[f"{head}.weight"].T)
        product = node("MatMul", pooled, columns, name=f"{head}.product")
        node("Add", product, constant(f"{head}.bias", weights[f"{head}.bias"]), name=name)
    deep = node("Squeeze", "logits", one, name="logit.deep")
    node("Add", deep, _ngrams(graph, weights["ngrams.table"], keep, (zero, one, two)), name="logit")


def _ngrams(graph: _Graph, table: Floats, keep: str, index: tuple[str, str, str]) -> str:
    """What the n-grams say of each row (see `ngrams.NGrams`); the table is of eight bits in float32 as well."""
    node, constant = graph.node, graph.constant
    zero, one, two = index
    before = node("Pad", "input_ids", constant("ngrams.room", [0, 2, 0, 0], np.int64), name="ngrams.before")
    last = [constant(f"ngrams.end.{end}", [-end], np.int64) for end in (1, 2)]
    shown = [
        node("Unsqueeze", values, two, name=f"ngrams.shown.{place}")
        for place, values in enumerate(
            (
                "input_ids",
                node("Slice", before, one, last[0], one, name="ngrams.token.1"),
                node("Slice", before, zero, last[1], one, name="ngrams.token.2"),
            )
        )
    ]
    factors = constant("ngrams.factors", np.array(ngrams.MULTIPLIERS).T, np.int64)
    mixed = node("MatMul", node("Concat", *shown, name="ngrams.shown", axis=2), factors, name="ngrams.mixed")
    moved = node("Add", mixed, constant("ngrams.offsets", ngrams.OFFSETS, np.int64), name="ngrams.moved")
    bucket = node("Mod", moved, constant("ngrams.buckets", ngrams.BUCKETS, np.int64), name="ngrams.bucket")
    scale = float(np.abs(table).max()) / 127 or 1.0
    rounded = constant("ngrams.table", np.rint(table / scale), np.int8)
    found = node("Cast", node("Gather", rounded, bucket, name="ngrams.rounded"), name="ngrams.found", to=TensorProto.FLOAT)
    each = node("ReduceSum", found, two, name="ngrams.each", keepdims=0)
    total = node("ReduceSum", node("Mul", each, keep, name="ngrams.kept"), one, name="ngrams.total", keepdims=0)
    length = node("Sqrt", node("ReduceSum", keep, one, name="ngrams.count", keepdims=0), name="ngrams.length")
    whole = node("Mul", node("Div", total, length, name="ngrams.mean"), constant("ngrams.scale", scale), name="ngrams.whole")
    bounds = [constant(f"ngrams.{end}", value) for end, value in (("least", -ngrams.BOUND), ("most", ngrams.BOUND))]
    return node("Clip", whole, *bounds, name="ngrams.logit")


def _layer(graph: _Graph, weights: Mapping[str, Floats], name: str, hidden: str, bias: str, shape: Shape) -> str:
    node = graph.node
    size = shape.width // shape.heads
    # Query, key and value in one product; the scale of the scores is folded into the query.
    scale = 1 / math.sqrt(size)
    parts = [(weights[f"{name}.{part}.weight"], weights[f"{name}.{part}.bias"]) for part in ("query", "key", "value")]
    parts[0] = (parts[0][0] * scale, parts[0][1] * scale)
    joined = graph.linear(
        hidden, np.concatenate([w for w, _ in parts]), np.concatenate([b for _, b in parts]), name=f"{name}.joined"
    )
    apart = graph.constant(f"{name}.apart", [0, 0, 3, shape.heads, size], np.int64)
    # [rows, tokens, 3, heads, size] → [3, rows, heads, tokens, size]
    split = node("Transpose", node("Reshape", joined, apart, name=f"{name}.split"), name=f"{name}.heads", perm=[2, 0, 3, 1, 4])
    query, key, value = (
        node("Gather", split, graph.constant(f"{name}.part.{part}", part, np.int64), name=f"{name}.{what}", axis=0)
        for part, what in enumerate(("query", "key", "value"))
    )
    turned = node("Transpose", key, name=f"{name}.key.turned", perm=[0, 1, 3, 2])
    score = node("Add", node("MatMul", query, turned, name=f"{name}.score"), bias, name=f"{name}.score.masked")
    share = node("Softmax", score, name=f"{name}.share", axis=-1)
    mixed = node("Transpose", node("MatMul", share, value, name=f"{name}.mixed"), name=f"{name}.mixed.turned", perm=[0, 2, 1, 3])
    whole = node("Reshape", mixed, graph.constant(f"{name}.whole", [0, 0, shape.width], np.int64), name=f"{name}.mixed.whole")
    out = graph.linear(whole, weights[f"{name}.mix.weight"], weights[f"{name}.mix.bias"], name=f"{name}.mix")
    hidden = graph.norm(node("Add", hidden, out, name=f"{name}.attended"), weights, f"{name}.norm_attention", shape.epsilon)
    wide = graph.linear(hidden, weights[f"{name}.widen.weight"], weights[f"{name}.widen.bias"], name=f"{name}.widen")
    inner = node("Gelu", wide, name=f"{name}.inner")
    narrow = graph.linear(inner, weights[f"{name}.narrow.weight"], weights[f"{name}.narrow.bias"], name=f"{name}.narrow")
    return graph.norm(node("Add", hidden, narrow, name=f"{name}.fed"), weights, f"{name}.norm_output", shape.epsilon)


def write_tokenizer(base: Path, target: Path) -> None:
    """The base's tokenizer without its padding and truncation: windows are cut by the worker."""
    content: dict[str, Any] = json.loads(base.read_text(encoding="utf-8"))
    content["truncation"] = None
    content["padding"] = None
    target.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
