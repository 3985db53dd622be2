"""`python -m services.fallback_model.eval DATA`: how good the detector is, set by set.

On a model directory (`--model`), or through a running gateway (`--url`, with the key in `PORTCULLIS_API_KEY` or `--key`).
`--calibrate CORPUS` proposes a threshold from one's own benign texts instead.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from services.fallback_model.engine import ModelError
from services.fallback_model.eval import direct, metrics, remote, report, robustness
from services.fallback_model.eval.corpus import NOISY, Row, find_sets, read_rows
from services.fallback_model.model import Model
from services.fallback_model.paths import DEFAULT_MODEL

_SEED = 5


def main() -> int:
    arguments = _arguments()
    console = Console()
    try:
        if arguments.calibrate:
            return _calibrate(arguments, console)
        if arguments.robustness:
            return _robustness(arguments, console)
        sets = find_sets(arguments.data)
        if not sets:
            console.print(f"no .jsonl or .jsonl.zst file in {arguments.data}")
            return 2
        results = [_evaluate(arguments, name, rows) for name, rows in sets.items()]
    except (ModelError, remote.RemoteError, OSError, ValueError) as error:
        console.print(f"eval: {error}", markup=False)
        return 2
    shown = []
    for result in results:
        shown.append(result)
        if NOISY & {row.source for row in result.rows}:
            shown.append(result.without(NOISY))
    title = f"Portcullis detector: {arguments.url or arguments.model}"
    report.show(shown, title)
    report.write_html(shown, title, arguments.out)
    console.print(f"report: {arguments.out}", markup=False)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run eval", description="Figures of the detector on labelled texts.")
    parser.add_argument("data", type=Path, nargs="?", help="a .jsonl or .jsonl.zst file, or a directory of them")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="model directory (default: the shipped one)")
    parser.add_argument("--url", help="ask a running gateway at this address instead")
    parser.add_argument("--key", default=os.environ.get("PORTCULLIS_API_KEY"), help="its API key (default: PORTCULLIS_API_KEY)")
    parser.add_argument(
        "--threshold", type=float, help="probability from which a text counts as malicious (default: the shipped one)"
    )
    parser.add_argument("--calibrate", type=Path, metavar="CORPUS", help="propose a threshold from this file of benign texts")
    parser.add_argument("--robustness", action="store_true", help="try disguises and places instead; DATA is one file")
    parser.add_argument("--attacks", type=int, default=60, help="attacks in long documents with --robustness; each takes seconds")
    parser.add_argument("--false-alarms", type=float, default=0.01, help="share of false alarms to aim at with --calibrate")
    parser.add_argument("--out", type=Path, default=Path("eval-report.html"), help="where the HTML report goes")
    arguments = parser.parse_args()
    if arguments.data is None and arguments.calibrate is None:
        parser.error("give a file or a directory of labelled texts, or --calibrate CORPUS")
    if arguments.url and not arguments.key:
        parser.error("--url needs a key, in PORTCULLIS_API_KEY or --key")
    return arguments


def _evaluate(arguments: argparse.Namespace, name: str, rows: list[Row]) -> report.SetResult:
    texts = [row.text for row in rows]
    if arguments.url:
        answers = asyncio.run(remote.score(arguments.url, arguments.key, texts))
        scores = np.array([answer.confidence for answer in answers])
        flags = [answer.is_malicious for answer in answers] if arguments.threshold is None else scores >= arguments.threshold
        return report.SetResult(name, rows, scores, np.array(flags, dtype=bool), [answer.threats for answer in answers])
    model = _model(arguments)
    scored = list(
        track(direct.score(model, texts), description=name, total=len(texts), console=Console(stderr=True), transient=True)
    )
    scores = np.array([one.detection.probability for one in scored])
    threshold = model.card.threshold if arguments.threshold is None else arguments.threshold
    flagged = scores >= threshold
    # As a caller sees it: a text that passes has no threat types.
    threats: list[tuple[str, ...]] = [one.detection.threats if flag else () for one, flag in zip(scored, flagged, strict=True)]
    return report.SetResult(name, rows, scores, flagged, threats)


def _model(arguments: argparse.Namespace) -> Model:
    return Model(arguments.model, sessions=1, threads=max(1, (os.cpu_count() or 1)))


def _robustness(arguments: argparse.Namespace, console: Console) -> int:
    rows = read_rows(arguments.data)
    model = _model(arguments)

    def flagged(trial: robustness.Trial) -> float:
        found = [one.detection.probability >= model.card.threshold for one in direct.score(model, trial.texts)]
        return sum(found) / len(found)

    attacks = robustness.drawn(rows, 1, robustness.TEXTS, robustness.LONGEST_DISGUISED, _SEED)
    benign = robustness.drawn(rows, 0, robustness.TEXTS, robustness.LONGEST_DISGUISED, _SEED)
    table = Table(
        "disguise", "recall", "change", "false alarms", "change", title=f"{len(attacks)} attacks, {len(benign)} benign texts"
    )
    plain: tuple[float, float] | None = None
    for bad, good in zip(robustness.disguised(attacks, _SEED), robustness.disguised(benign, _SEED), strict=True):
        recall, alarms = flagged(bad), flagged(good)
        plain = plain or (recall, alarms)
        table.add_row(bad.name, f"{recall:.3f}", f"{recall - plain[0]:+.3f}", f"{alarms:.3f}", f"{alarms - plain[1]:+.3f}")
    console.print(table)
    table = Table(
        "place", "flagged", title=f"{arguments.attacks} attacks in documents of {robustness.CARRIER_CHARACTERS} characters"
    )
    attacks = attacks[: arguments.attacks]
    for trial in robustness.placed(attacks, robustness.documents(rows, len(attacks), _SEED)):
        table.add_row(trial.name, f"{flagged(trial):.3f}")
    console.print(table)
    return 0


def _calibrate(arguments: argparse.Namespace, console: Console) -> int:
    rows = [row for row in read_rows(arguments.calibrate) if row.label == 0]
    if arguments.url:
        answers = asyncio.run(remote.score(arguments.url, arguments.key, [row.text for row in rows]))
        scores = np.array([answer.confidence for answer in answers])
    else:
        scores = np.array([one.detection.probability for one in direct.score(_model(arguments), [row.text for row in rows])])
    threshold = metrics.threshold_at(scores, arguments.false_alarms)
    flagged = float((scores >= threshold).mean())
    console.print(f"{len(rows)} benign texts; threshold {threshold:.4f} gives {flagged:.2%} false alarms on them")
    if len(rows) * arguments.false_alarms < 10:
        console.print(
            f"Only {int(len(rows) * arguments.false_alarms)} texts stand above it: the figure is a rough one; "
            f"{int(10 / arguments.false_alarms)} texts or more make it a good one."
        )
    console.print(f'Use it as "config": {{"confidence_threshold": {threshold:.4f}}} in requests.', markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
