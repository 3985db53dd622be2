"""Model directories of both layouts, made here: tiny graphs whose logits are known functions of the tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from onnx import TensorProto, helper, save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from services.fallback_model.engine import Calibration, ModelError, read_card
from services.fallback_model.model import Model

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
VOCABULARY = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, "hello": 4, "attack": 5, "world": 6}


def write_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.save(str(directory / "tokenizer.json"))


def write_graph(directory: Path) -> None:
    """Two logits a row: 0, and 8 x (how many tokens are `attack`) - 4."""
    nodes = [
        helper.make_node("Equal", ["input_ids", "five"], ["is_attack"]),
        helper.make_node("Cast", ["is_attack"], ["ones"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["ones", "axis"], ["count"], keepdims=1),
        helper.make_node("Mul", ["count", "eight"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "four"], ["score"]),
        helper.make_node("Sub", ["score", "score"], ["zero"]),
        helper.make_node("Concat", ["zero", "score"], ["logits"], axis=1),
    ]
    constants = [
        helper.make_tensor("five", TensorProto.INT64, [1], [5]),
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
        helper.make_tensor("eight", TensorProto.FLOAT, [1], [8.0]),
        helper.make_tensor("four", TensorProto.FLOAT, [1], [4.0]),
    ]
    shape = ["rows", "tokens"]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, shape)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 2])]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    save(model, str(directory / "model.onnx"))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A Hugging Face export for sequence classification, as `optimum` lays it out."""
    directory = tmp_path / "tiny-injection-model"
    directory.mkdir()
    write_tokenizer(directory)
    write_graph(directory)
    config = {"model_type": "bert", "id2label": {"0": "SAFE", "1": "INJECTION"}, "max_position_embeddings": 18}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def detect(model: Model, text: str) -> float:
    prepared = model.prepare(text)
    return model.judge(prepared, model.sessions[0].run(prepared.rows)).probability


def test_a_hugging_face_export_is_served_as_it_is(foreign: Path) -> None:
    model = Model(foreign, sessions=1, threads=1)
    assert model.card.name == "tiny-injection-model"
    assert detect(model, "hello world") == pytest.approx(0.018, abs=0.001)
    assert detect(model, "hello attack") == pytest.approx(0.982, abs=0.001)
    prepared = model.prepare("hello attack")
    assert model.judge(prepared, model.sessions[0].run(prepared.rows)).threats == ("injection",)


def test_a_long_text_is_read_in_windows_to_its_end(foreign: Path) -> None:
    model = Model(foreign, sessions=1, threads=1)
    prepared = model.prepare("hello " * 200 + "attack")
    detection = model.judge(prepared, model.sessions[0].run(prepared.rows))
    assert detection.probability > 0.9
    assert detection.coverage.windows > 10
    assert not detection.coverage.truncated


@pytest.mark.parametrize(
    ("labels", "malicious"),
    [
        (["LABEL_0", "LABEL_1"], (1,)),
        (["benign", "malicious"], (1,)),
        (["safe", "unsafe"], (1,)),
        (["BENIGN", "INJECTION", "JAILBREAK"], (1, 2)),
        (["jailbreak", "benign"], (0,)),
        (["no_injection", "injection"], (1,)),
    ],
)
def test_the_malicious_label_is_found_by_its_name(foreign: Path, labels: list[str], malicious: tuple[int, ...]) -> None:
    (foreign / "config.json").write_text(json.dumps({"id2label": {str(i): label for i, label in enumerate(labels)}}))
    assert read_card(foreign).malicious == malicious


@pytest.mark.parametrize(
    "config",
    [
        "no json",
        "{}",
        '{"id2label": {"0": "cat", "1": "dog"}}',
        '{"format": "portcullis-detector/1", "threats": []}',
        '{"id2label": 3}',
    ],
)
def test_a_directory_that_cannot_be_used_is_refused_in_words(foreign: Path, config: str) -> None:
    (foreign / "config.json").write_text(config)
    with pytest.raises(ModelError, match="config"):
        read_card(foreign)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "config.json"])
def test_a_missing_or_broken_file_is_refused_in_words(foreign: Path, name: str) -> None:
    (foreign / name).write_text("broken")
    with pytest.raises(ModelError, match=name.split(".")[0]):
        Model(foreign, sessions=1, threads=1)
    (foreign / name).unlink()
    with pytest.raises(ModelError, match=name.split(".")[0]):
        Model(foreign, sessions=1, threads=1)


def test_calibration_rises_with_the_logit_and_never_overflows() -> None:
    calibration = Calibration(scale=1.7, shift=-0.4)
    said = [calibration.probability(logit) for logit in (-900.0, -3.0, 0.4 / 1.7, 2.5, 900.0)]
    assert said == sorted(said)
    assert said[0] == pytest.approx(0.0)
    assert said[2] == pytest.approx(0.5)
    assert said[-1] == pytest.approx(1.0)
