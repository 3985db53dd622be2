"""A quick look at a network between the parts of its training: the worst window of each text, in the precision of training."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from services.fallback_model.characters import spell
from services.fallback_model.eval import metrics
from services.fallback_model.eval.corpus import NOISY, Row, find_sets, read_rows
from services.fallback_model.training import written
from services.fallback_model.training.calibrate import FALSE_ALARMS, Array
from services.fallback_model.training.feed import padded
from services.fallback_model.training.network import Detector
from services.fallback_model.training.schedule import autocast

_ROOM = 254
_STEP = 190
_ROWS = 64


@dataclass(frozen=True)
class Set:
    """`windows`: the row that each is of, and its ids."""

    rows: list[Row]
    windows: list[tuple[int, list[int]]]


def read_sets(data: Path, tokenizer: Tokenizer) -> dict[str, Set]:
    """`valid`, those of dev/, and the held-out written texts (English, and others)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "written.jsonl"
        written.write_held_out(path)
        held = read_rows(path)
    sets = {"valid": read_rows(data / "valid.jsonl.zst")} | find_sets(data / "dev")
    sets["written_en"] = [row for row in held if row.lang == "en"]
    sets["written_others"] = [row for row in held if row.lang != "en" and row.source == "written"]
    sets["translated"] = [row for row in held if row.source == "translated"]
    return {name: Set(rows, _windows(rows, tokenizer)) for name, rows in sets.items() if rows}


def _windows(rows: list[Row], tokenizer: Tokenizer) -> list[tuple[int, list[int]]]:
    encodings = tokenizer.encode_batch([spell(row.text) for row in rows], add_special_tokens=False)
    return [
        (place, encoding.ids[start : start + _ROOM])
        for place, encoding in enumerate(encodings)
        for start in range(0, max(1, len(encoding.ids) - (_ROOM - _STEP)), _STEP)
    ]


def show(name: str, model: Detector, sets: dict[str, Set]) -> None:
    """Prints figures at the threshold that 1 % of valid's benign texts reach."""
    logits = {one: _logits(model, found) for one, found in sets.items()}
    labels = {one: np.array([row.label for row in found.rows], dtype=np.float64) for one, found in sets.items()}
    threshold = metrics.threshold_at(logits["valid"][labels["valid"] == 0], FALSE_ALARMS)
    clean = np.array([row.source not in NOISY for row in sets["valid"].rows])
    figures: dict[str, dict[str, float | None]] = {
        "valid_clean": {"auc": metrics.auc(labels["valid"][clean], logits["valid"][clean])}
    }
    for one in sets:
        counts = metrics.confusion(labels[one], logits[one] >= threshold)
        figures[one] = {"recall": counts.recall, "fa": counts.false_alarms, "auc": metrics.auc(labels[one], logits[one])}
    rounded = {one: {key: round(value, 4) for key, value in found.items() if value is not None} for one, found in figures.items()}
    print(f"{name}: {json.dumps(rounded)}", flush=True)  # noqa: T201  # the log of a command line tool


def _logits(model: Detector, found: Set) -> Array:
    device = next(model.parameters()).device
    logits = np.full(len(found.rows), -np.inf)
    ordered = sorted(found.windows, key=lambda window: len(window[1]))
    model.eval()
    with torch.inference_mode(), autocast(device):
        for first in range(0, len(ordered), _ROWS):
            places, ids = zip(*ordered[first : first + _ROWS], strict=True)
            tokens = padded(list(ids), _ROOM).to(device)
            np.maximum.at(logits, list(places), model.judge(tokens.ids, tokens.mask).float().cpu().numpy())
    return logits
