"""Writes the network as ONNX, and the same with weights of eight bits."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.optimizer import optimize_model

from services.fallback_model.labels import THREATS
from services.fallback_model.training.network import Detector, Shape

OPSET = 17


def load_weights(path: Path) -> Detector:
    """A trained network from its checkpoint, ready to evaluate."""
    model = Detector(Shape(), len(THREATS), dropout=0.0)
    model.load_state_dict(torch.load(path, weights_only=True))
    model.eval()
    return model


def write_onnx(model: Detector, path: Path) -> None:
    """Inputs `input_ids` and `attention_mask`, int64 [rows, tokens]; outputs `logit` [rows] and `threats` [rows, 6], float32."""
    example = (torch.randint(1000, 2000, (2, 9)), torch.ones((2, 9), dtype=torch.int64))
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.onnx"
        torch.onnx.export(
            model,
            example,
            str(raw),
            dynamo=False,
            opset_version=OPSET,
            input_names=["input_ids", "attention_mask"],
            output_names=["logit", "threats"],
            dynamic_axes={
                "input_ids": {0: "rows", 1: "tokens"},
                "attention_mask": {0: "rows", 1: "tokens"},
                "logit": {0: "rows"},
                "threats": {0: "rows"},
            },
        )
        # Joins what makes up a LayerNorm, a GELU or an attention into one operation each.
        fused = optimize_model(str(raw), model_type="bert", num_heads=Shape().heads, hidden_size=Shape().width, opt_level=0)
        fused.save_model_to_file(str(path))


def quantise(source: Path, target: Path, keep: list[str]) -> None:
    """Dynamic quantisation: weights as int8 per output channel, activations as they come. `keep` names nodes left in float32."""
    quantize_dynamic(
        source,
        target,
        per_channel=True,
        reduce_range=False,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=keep,
        # The joined operations are onnxruntime's own, which shape inference does not know.
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def head_nodes(path: Path) -> list[str]:
    """The nodes of the two heads: a few thousand weights, whose rounding would be felt at once and saves nothing."""
    graph = onnx.load(str(path)).graph
    outputs = {value.name for value in graph.output}
    producers = {name: node for node in graph.node for name in node.output}
    found = []
    for name in outputs:
        node = producers[name]
        while node.op_type not in ("Gemm", "MatMul"):
            node = producers[node.input[0]]
        found.append(node.name)
    return found


def write_tokenizer(base: Path, target: Path) -> None:
    """The base's tokenizer without its padding and truncation: windows are cut by the worker."""
    content: dict[str, Any] = json.loads(base.read_text(encoding="utf-8"))
    content["truncation"] = None
    content["padding"] = None
    target.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
