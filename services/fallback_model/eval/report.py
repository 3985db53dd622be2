"""Figures of one run over several sets, as tables in the terminal and as one HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.table import Table

from services.fallback_model.eval import metrics
from services.fallback_model.eval.corpus import Row
from services.fallback_model.labels import THREATS

mpl.use("Agg")
from matplotlib import pyplot as plt  # the backend is chosen before pyplot is loaded

_WORST = 25
_SHOWN = 400
_LENGTHS = ((0, 100), (100, 400), (400, 1500), (1500, 6000), (6000, 10**9))


@dataclass(frozen=True)
class SetResult:
    """One set and what the detector said: the probability, the flag at the threshold in use, the threat types."""

    name: str
    rows: list[Row]
    probabilities: metrics.Array
    flagged: np.ndarray
    threats: list[tuple[str, ...]]

    @property
    def labels(self) -> metrics.Array:
        return np.array([row.label for row in self.rows], dtype=np.float64)

    def without(self, sources: frozenset[str]) -> SetResult:
        keep = [index for index, row in enumerate(self.rows) if row.source not in sources]
        return SetResult(
            f"{self.name} (without noisy labels)",
            [self.rows[i] for i in keep],
            self.probabilities[keep],
            self.flagged[keep],
            [self.threats[i] for i in keep],
        )


@dataclass(frozen=True)
class Group:
    """A part of a set: how many texts of each class, and the shares of them that were flagged."""

    kind: str
    name: str
    malicious: int
    recall: float | None
    benign: int
    false_alarms: float | None


COLUMNS = ("set", "texts", "malicious", "ROC AUC", "AP", "recall @1%", "recall @5%", "recall", "false alarms", "ECE", "threat F1")


def figures(result: SetResult) -> dict[str, str]:
    """One line of the overview.

    `recall @`: at that share of false alarms on the same set; `recall`, `false alarms`: at the threshold in use.
    """
    labels, scores = result.labels, result.probabilities
    counts = metrics.confusion(labels, result.flagged)
    both = 0 < labels.sum() < len(labels)
    truth = [row.threat for row in result.rows if row.label and row.threat]
    named = [given for row, given in zip(result.rows, result.threats, strict=True) if row.label and row.threat]
    return dict(
        zip(
            COLUMNS,
            (
                result.name,
                str(len(labels)),
                str(int(labels.sum())),
                _number(metrics.auc(labels, scores), 4),
                _number(metrics.average_precision(labels, scores) if both else None, 4),
                _number(metrics.recall_at(labels, scores, 0.01)),
                _number(metrics.recall_at(labels, scores, 0.05)),
                _number(counts.recall),
                _number(counts.false_alarms),
                _number(metrics.reliability(labels, scores).ece if both else None),
                _number(metrics.macro_f1(truth, named, THREATS)[0] if len(set(truth)) > 1 else None),
            ),
            strict=True,
        )
    )


def groups(result: SetResult) -> list[Group]:
    """By source, language, threat type and length."""
    found = []
    keys_of: dict[str, Callable[[Row], str]] = {
        "source": lambda row: row.source,
        "language": lambda row: row.lang,
        "threat": lambda row: row.threat or "(benign)",
        "length": lambda row: _length(len(row.text)),
    }
    for kind, key in keys_of.items():
        keys = np.array([key(row) for row in result.rows])
        for name in sorted(set(keys)):
            here = keys == name
            counts = metrics.confusion(result.labels[here], result.flagged[here])
            found.append(
                Group(
                    kind,
                    str(name),
                    counts.true_positive + counts.false_negative,
                    counts.recall,
                    counts.false_positive + counts.true_negative,
                    counts.false_alarms,
                )
            )
    return found


def _length(characters: int) -> str:
    low, high = next(pair for pair in _LENGTHS if pair[0] <= characters < pair[1])
    return f"{low:>5}+ characters" if high == _LENGTHS[-1][1] else f"{low:>5} to {high} characters"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def show(results: list[SetResult], title: str) -> None:
    """Prints the overview, and the confusion at the threshold."""
    console = Console(width=None if Console().is_terminal else 150)
    overview = Table(title=title)
    for index, column in enumerate(COLUMNS):
        overview.add_column(column, justify="left" if index == 0 else "right")
    confusion = Table(title="Confusion at the threshold")
    confusion.add_column("set")
    for column in ("malicious, flagged", "malicious, passed", "benign, flagged", "benign, passed"):
        confusion.add_column(column, justify="right")
    for result in results:
        overview.add_row(*figures(result).values())
        counts = metrics.confusion(result.labels, result.flagged)
        cells = (counts.true_positive, counts.false_negative, counts.false_positive, counts.true_negative)
        confusion.add_row(result.name, *map(str, cells))
    console.print(overview)
    console.print(confusion)


def write_html(results: list[SetResult], title: str, path: Path) -> None:
    """One self-contained page. It shows texts of the sets (the worst mistakes), unlike anything that the services log."""
    parts = [f"<h1>{html.escape(title)}</h1>", _table(COLUMNS, [tuple(figures(result).values()) for result in results])]
    for result in results:
        parts.append(f"<h2>{html.escape(result.name)}</h2>")
        counts = metrics.confusion(result.labels, result.flagged)
        parts.append(
            _table(
                ("", "flagged", "passed"),
                [
                    ("malicious", str(counts.true_positive), str(counts.false_negative)),
                    ("benign", str(counts.false_positive), str(counts.true_negative)),
                ],
            )
        )
        if 0 < result.labels.sum() < len(result.labels):
            area = metrics.interval(result.labels, result.probabilities, metrics.auc)
            if area:
                parts.append(f"<p>ROC AUC, 95 % interval: {area[0]:.4f} to {area[1]:.4f}</p>")
            parts.append(_plot(result))
        parts.append(
            _table(
                ("by", "", "malicious", "recall", "benign", "false alarms"),
                [
                    (g.kind, g.name, str(g.malicious), _number(g.recall), str(g.benign), _number(g.false_alarms))
                    for g in groups(result)
                ],
            )
        )
        parts.append(_mistakes(result))
    style = (
        "body{font:14px sans-serif;margin:2em}td,th{padding:2px 8px;border-bottom:1px solid #ddd;text-align:right}"
        "td:first-child,th:first-child,td.text{text-align:left}td.text{font-family:monospace;max-width:70em}"
    )
    page = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{style}</style>{''.join(parts)}"
    path.write_text(page, encoding="utf-8", errors="replace")


def _table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><tr>{head}</tr>{body}</table>"


def _mistakes(result: SetResult) -> str:
    """The benign texts with the highest probability and the malicious ones with the lowest, of those on the wrong side."""
    wrong = [index for index, row in enumerate(result.rows) if bool(row.label) != bool(result.flagged[index])]
    parts = []
    for label, name in ((0, "false alarms"), (1, "missed")):
        order = sorted(
            (index for index in wrong if result.rows[index].label == label),
            key=lambda index: result.probabilities[index] * (1 if label else -1),
        )
        lines = "".join(
            f"<tr><td>{result.probabilities[i]:.3f}</td><td>{html.escape(result.rows[i].source)}</td>"
            f"<td class=text>{html.escape(result.rows[i].text[:_SHOWN])}</td></tr>"
            for i in order[:_WORST]
        )
        parts.append(f"<h3>Worst {name}: {len(order)} in all</h3><table>{lines}</table>")
    return "".join(parts)


def _plot(result: SetResult) -> str:
    bins = metrics.reliability(result.labels, result.probabilities)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4))
    left.plot([0, 1], [0, 1], color="#bbb", linewidth=1)
    left.plot(bins.predicted, bins.observed, marker="o", markersize=4)
    left.set(xlabel="probability said", ylabel="share malicious", title=f"reliability, ECE {bins.ece:.3f}")
    for label, name in ((0, "benign"), (1, "malicious")):
        right.hist(result.probabilities[result.labels == label], bins=30, range=(0, 1), alpha=0.6, label=name, log=True)
    right.set(xlabel="probability said", ylabel="texts")
    right.legend()
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return f'<img alt="reliability" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
