"""A directory with a model becomes something that turns token ids into logits.

Two layouts are read: this project's own (`config.json` with `"format": "portcullis-detector/1"`) and the export of any
Hugging Face sequence-classification model (`config.json` with `id2label`). Both hold `model.onnx` and `tokenizer.json`.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as pybind
from tokenizers import Tokenizer

from services.fallback_model.labels import THREATS
from services.fallback_model.windows import Ids

FORMAT: Final = "portcullis-detector/1"
Floats = NDArray[np.float32]

# What onnxruntime raises for a file that it cannot load; they have no common base but Exception.
_LOAD_ERRORS: Final = (
    pybind.Fail,
    pybind.InvalidArgument,
    pybind.InvalidGraph,
    pybind.InvalidProtobuf,
    pybind.NoSuchFile,
    pybind.NotImplemented,
    pybind.RuntimeException,
    RuntimeError,
    ValueError,
)

_MALICIOUS_WORDS: Final = ("inject", "jailbreak", "malicious", "unsafe", "attack", "harmful", "label_1", "leak", "extract")
_HARMLESS_WORDS: Final = ("safe", "benign", "legit", "harmless", "clean", "no_", "not_", "non", "label_0")
_DEFAULT_WINDOW: Final = 512
_DEFAULT_OVERLAP_SHARE: Final = 0.25


class ModelError(Exception):
    """A model directory that cannot be used; the text is one line that says why."""


@dataclass(frozen=True)
class Calibration:
    """Platt scaling (Platt 1999): probability = sigmoid(scale * logit + shift)."""

    scale: float = 1.0
    shift: float = 0.0

    def probability(self, logit: float) -> float:
        value = self.scale * logit + self.shift
        return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


@dataclass(frozen=True)
class ModelCard:
    """What is known of a model beside its weights.

    threshold: the probability from which a text counts as malicious when the request does not say.
    window_penalty: taken off the logit of a text of n windows, times log(n): more windows are more chances for a false alarm.
    threat_logits: per threat type the logit from which it is named; None for a model without such a head.
    labels: column of the logits → name; malicious: the columns that mean so (empty for this project's own layout).
    """

    name: str
    max_tokens: int
    overlap: int
    spelt: bool
    threshold: float
    calibration: Calibration
    window_penalty: float = 0.0
    threat_logits: tuple[float, ...] | None = None
    labels: tuple[str, ...] = ()
    malicious: tuple[int, ...] = ()


def read_card(directory: Path) -> ModelCard:
    """Raises `ModelError` for a directory that holds no model of either layout."""
    for name in ("model.onnx", "tokenizer.json", "config.json"):
        if not (directory / name).is_file():
            raise ModelError(f"{directory} holds no {name}")
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{directory / 'config.json'} is not JSON: {error}") from None
    try:
        return _own_card(config) if config.get("format") == FORMAT else _foreign_card(directory, config)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{directory / 'config.json'} cannot be used: {error!r}") from None


def _own_card(config: dict[str, Any]) -> ModelCard:
    if tuple(config["threats"]) != THREATS:
        raise ValueError(f"threats are {config['threats']}")
    card = ModelCard(
        name=str(config["name"]),
        max_tokens=int(config["max_tokens"]),
        overlap=int(config["overlap"]),
        spelt=bool(config["spelt"]),
        threshold=float(config["threshold"]),
        calibration=Calibration(float(config["calibration"]["scale"]), float(config["calibration"]["shift"])),
        window_penalty=float(config["window_penalty"]),
        threat_logits=tuple(float(config["threat_logits"][threat]) for threat in THREATS),
    )
    if not (0 < card.threshold < 1 and card.calibration.scale > 0):
        raise ValueError("threshold or calibration is out of range")
    return card


def _foreign_card(directory: Path, config: dict[str, Any]) -> ModelCard:
    named = config["id2label"]
    labels = tuple(str(named[key]) for key in sorted(named, key=int))
    malicious = tuple(index for index, label in enumerate(labels) if _means_malicious(label))
    if not malicious or len(malicious) == len(labels):
        raise ValueError(f"which of the labels {labels} means malicious?")
    # RoBERTa-like models keep two positions for themselves, hence the margin.
    longest = min(_DEFAULT_WINDOW, int(config.get("max_position_embeddings", _DEFAULT_WINDOW)) - 2)
    name = str(config.get("_name_or_path") or directory.name).rstrip("/").rsplit("/", 1)[-1]
    return ModelCard(
        name=name,
        max_tokens=longest,
        overlap=int(longest * _DEFAULT_OVERLAP_SHARE),
        spelt=False,
        threshold=0.5,
        calibration=Calibration(),
        labels=labels,
        malicious=malicious,
    )


def _means_malicious(label: str) -> bool:
    lowered = label.lower()
    if any(word in lowered for word in ("unsafe", "malicious")):
        return True
    return not any(word in lowered for word in _HARMLESS_WORDS) and any(word in lowered for word in _MALICIOUS_WORDS)


@dataclass(frozen=True)
class Scores:
    """One row per window. `logits`: [rows], malicious; `threats`: [rows, 6] logits."""

    logits: Floats
    threats: Floats


def inputs(rows: list[Ids]) -> dict[str, Ids]:
    """Windows padded to the longest of them: `input_ids` and `attention_mask`, [rows, tokens]."""
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


class Session:
    """One onnxruntime session. Build it in the process that uses it: sessions do not survive `fork`."""

    def __init__(self, directory: Path, card: ModelCard, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        # onnxruntime would size its pool by the host's processors, whatever the container is allowed.
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except _LOAD_ERRORS as error:
            raise ModelError(f"{directory / 'model.onnx'} cannot be loaded: {error}") from None
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._card = card
        if "input_ids" not in self._inputs:
            raise ModelError(f"{directory / 'model.onnx'} has no input named input_ids, but {sorted(self._inputs)}")

    def run(self, rows: list[Ids]) -> Scores:
        """Scores of windows; they are padded to the longest of them."""
        feeds = inputs(rows)
        if "attention_mask" not in self._inputs:
            del feeds["attention_mask"]
        if "token_type_ids" in self._inputs:
            feeds["token_type_ids"] = np.zeros_like(feeds["input_ids"])
        outputs = self._session.run(None, feeds)
        if self._card.malicious:
            return _foreign_scores(np.asarray(outputs[0], dtype=np.float32), self._card)
        return Scores(np.asarray(outputs[0], dtype=np.float32), np.asarray(outputs[1], dtype=np.float32))


def _foreign_scores(logits: Floats, card: ModelCard) -> Scores:
    """The log-odds of the malicious labels taken together; the threat type is read off a label's name where it says one."""
    malicious = list(card.malicious)
    harmless = [index for index in range(logits.shape[1]) if index not in card.malicious]
    threats = np.full((len(logits), len(THREATS)), -10.0, dtype=np.float32)
    for column in malicious:
        name = card.labels[column].lower()
        kind = next((threat for threat in ("jailbreak", "injection") if threat[:6] in name), "injection")
        place = THREATS.index(kind)
        threats[:, place] = np.maximum(threats[:, place], logits[:, column])
    return Scores(_log_sum_exp(logits[:, malicious]) - _log_sum_exp(logits[:, harmless]), threats)


def _log_sum_exp(values: Floats) -> Floats:
    top = values.max(axis=1, keepdims=True)
    return np.asarray(top[:, 0] + np.log(np.exp(values - top).sum(axis=1)), dtype=np.float32)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Raises `ModelError` for a file that is no tokenizer."""
    # It would share out each call among threads of its own, by the host's processors: a third more work for a text, and threads
    # beside those that are laid out here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001  # `tokenizers` raises bare Exception, whatever is wrong
        raise ModelError(f"{directory / 'tokenizer.json'} cannot be loaded: {error}") from None
