"""Turns a checkpoint into a model directory that a worker loads: ONNX, eight bits, calibrated, with its card."""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from services.fallback_model.characters import spell
from services.fallback_model.engine import FORMAT, inputs
from services.fallback_model.eval import direct, metrics, robustness
from services.fallback_model.eval.corpus import Row, find_sets, read_rows
from services.fallback_model.eval.direct import Scored
from services.fallback_model.labels import THREATS
from services.fallback_model.model import Model
from services.fallback_model.training import calibrate, card, export
from services.fallback_model.training.calibrate import Array
from services.fallback_model.training.tokens import CLS, SEP, bare_tokenizer
from services.fallback_model.windows import Ids

MAX_TOKENS = 256
OVERLAP = 64
RANGE_COVERAGE = 0.9999
"""Share of a batch's values that the range of an activation holds: a few are so far out that they would coarsen all others."""
_MEASURED = 1500
"""Texts that ranges are measured on. With 600 the rounding moved the AUC of `cse_pi` by 0.002."""
_MEASURED_ROWS = 16
_LONG_DOCUMENTS = 60
_COMPARED = 1500
"""Texts of `valid` on which int8 is compared with float32, which takes twice the time."""


@dataclass(frozen=True)
class Figures:
    """What the card tells. `sets`: name → figure → value, at the shipped threshold; `delta_auc`: int8 less float32, by set."""

    cross_fitted: calibrate.CrossFitted
    sets: dict[str, dict[str, float]]
    delta_auc: dict[str, float]
    long_false_alarms: float


def release(weights: Path, data: Path, out: Path, name: str, seed: int) -> Figures:
    """Writes the directory `out` and returns its figures.

    `data` holds valid.jsonl.zst and dev/; `tokenizer.json` lies beside `weights`.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = weights.parent / "tokenizer.json"
    export.write_tokenizer(tokenizer, out / "tokenizer.json")
    valid = read_rows(data / "valid.jsonl.zst")
    sets = {"valid": valid} | find_sets(data / "dev")
    compared = sets | {"valid": random.Random(seed).sample(valid, min(len(valid), _COMPARED))}
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder)
        network = export.load_weights(weights)
        activations = export.write_onnx(network, full / "model.onnx", MAX_TOKENS)
        texts = random.Random(seed).sample(read_rows(data / "train.jsonl.zst"), _MEASURED)
        feeds = _batches([spell(row.text) for row in texts], bare_tokenizer(tokenizer))
        ranges = export.measure_ranges(full / "model.onnx", activations, feeds, RANGE_COVERAGE)
        export.write_onnx(network, out / "model.onnx", MAX_TOKENS, ranges)
        (full / "tokenizer.json").write_bytes((out / "tokenizer.json").read_bytes())
        for directory in (full, out):
            _write_config(directory, _config(name, 0.5, (1.0, 0.0), [0.0] * len(THREATS), 0.0))
        delta = _compare(out, full, compared)
    scored = {set_name: _score(out, rows) for set_name, rows in sets.items()}
    parts = robustness.documents(valid, _LONG_DOCUMENTS, seed)
    documents = _score(out, [Row("\n".join(texts), 0) for texts in parts])
    labels = np.array([row.label for row in valid], dtype=np.float64)
    penalty = calibrate.fit_penalty(
        labels, _raw(scored["valid"]), _windows(scored["valid"]), _raw(documents), _windows(documents)
    )
    logits = {set_name: _raw(found) - penalty * np.log(_windows(found)) for set_name, found in scored.items()}
    threat_logits = np.array([one.threat_logits for one in scored["valid"]])
    calibration = calibrate.fit_platt(labels, logits["valid"])
    threshold = metrics.threshold_at(logits["valid"][labels == 0], calibrate.FALSE_ALARMS)
    limits = calibrate.fit_threats([row.threat if row.label else None for row in valid], threat_logits)
    config = _config(name, calibration.probability(threshold), (calibration.scale, calibration.shift), limits, penalty)
    _write_config(out, config)
    figures = Figures(
        cross_fitted=calibrate.cross_fitted(valid, logits["valid"], threat_logits, seed),
        sets={set_name: _figures(rows, logits[set_name], threshold) for set_name, rows in sets.items()},
        delta_auc=delta,
        long_false_alarms=float((_raw(documents) - penalty * np.log(_windows(documents)) >= threshold).mean()),
    )
    (out / "MODEL_CARD.md").write_text(card.write(name, config, figures, weights.parent / "plan.json"), encoding="utf-8")
    (weights.parent / "figures.json").write_text(json.dumps(asdict(figures), indent=1), encoding="utf-8")
    return figures


def _batches(texts: list[str], tokenizer: Tokenizer) -> Iterator[dict[str, Ids]]:
    """Inputs of the network for the beginnings of texts, of like length together."""
    room = MAX_TOKENS - 2
    rows = sorted(([CLS, *found.ids[:room], SEP] for found in tokenizer.encode_batch(texts, add_special_tokens=False)), key=len)
    for first in range(0, len(rows), _MEASURED_ROWS):
        yield inputs([np.array(row, dtype=np.int64) for row in rows[first : first + _MEASURED_ROWS]])


def _compare(quantised: Path, exact: Path, sets: dict[str, list[Row]]) -> dict[str, float]:
    """ROC AUC of int8 less that of float32, by set; a set of attacks alone is set against `valid`'s benign texts."""
    areas = []
    for directory in (quantised, exact):
        logits = {name: _raw(_score(directory, rows)) for name, rows in sets.items()}
        benign = logits["valid"][[row.label == 0 for row in sets["valid"]]]
        areas.append({name: _area(rows, logits[name], benign) for name, rows in sets.items()})
    return {name: areas[0][name] - areas[1][name] for name in sets}


def _config(
    name: str, threshold: float, calibration: tuple[float, float], limits: list[float], penalty: float
) -> dict[str, object]:
    return {
        "format": FORMAT,
        "name": name,
        "base": "all-MiniLM-L6-v2",
        "inputs": ["input_ids", "attention_mask"],
        "outputs": ["logit", "threats"],
        "max_tokens": MAX_TOKENS,
        "overlap": OVERLAP,
        "spelt": True,
        "labels": ["benign", "malicious"],
        "threats": list(THREATS),
        "threat_logits": {threat: round(limit, 4) for threat, limit in zip(THREATS, limits, strict=True)},
        "calibration": {"method": "platt", "scale": calibration[0], "shift": calibration[1]},
        "threshold": threshold,
        "threshold_false_alarms_on_valid": calibrate.FALSE_ALARMS,
        "window_penalty": round(penalty, 4),
    }


def _write_config(directory: Path, config: dict[str, object]) -> None:
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _score(directory: Path, rows: list[Row]) -> list[Scored]:
    return list(direct.score(Model(directory, sessions=1, threads=2), [row.text for row in rows]))


def _raw(scored: list[Scored]) -> Array:
    """Logits as scored with a penalty of 0."""
    return np.array([one.logit for one in scored], dtype=np.float64)


def _windows(scored: list[Scored]) -> Array:
    return np.array([one.windows for one in scored], dtype=np.float64)


def _area(rows: list[Row], logits: Array, benign: Array) -> float:
    """ROC AUC; a set of one class is set against the benign texts of `valid` (or its own malicious ones are missing: NaN)."""
    labels = np.array([row.label for row in rows], dtype=np.float64)
    if labels.all():
        labels, logits = np.concatenate([labels, np.zeros(len(benign))]), np.concatenate([logits, benign])
    area = metrics.auc(labels, logits)
    return math.nan if area is None else area


def _figures(rows: list[Row], logits: Array, threshold: float) -> dict[str, float]:
    labels = np.array([row.label for row in rows], dtype=np.float64)
    counts = metrics.confusion(labels, logits >= threshold)
    found = {"recall": counts.recall, "false_alarms": counts.false_alarms, "auc": metrics.auc(labels, logits)}
    return {key: value for key, value in found.items() if value is not None}
