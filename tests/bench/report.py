"""What a part of the benchmark found: a table for people, JSON for programs, and a plot as PNG and as a page."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from infra.embedded.home import ROOT, locate_home
from services.fallback_model import processors
from tests.bench.figures import Spread, Stretch

RATE, P50, P99, CPU, GENERATOR, FAILED, LATE = "req/s", "p50 ms", "p99 ms", "CPU ms", "load ms", "failed", "late ms"
STAGE = "CPU ms, "
"""Before a stage's name: kept in the JSON, and shown in tables of their own."""
_FORMATS = {"req/s": ".0f", "failed": ".0f", "texts/s": ".0f"}


def values_of(stretches: Sequence[Stretch]) -> dict[str, list[float]]:
    """The measured values of repeats, by what they are; processor time by stage as well."""
    stages = sorted({stage for stretch in stretches for stage in stretch.cpu})
    return {
        RATE: [stretch.rate for stretch in stretches],
        P50: [stretch.p50 for stretch in stretches],
        P99: [stretch.p99 for stretch in stretches],
        CPU: [stretch.cpu_total for stretch in stretches],
        GENERATOR: [stretch.generator for stretch in stretches],
        LATE: [stretch.late for stretch in stretches],
        FAILED: [float(stretch.failed + stretch.degraded) for stretch in stretches],
        **{STAGE + stage: [stretch.cpu.get(stage, 0.0) for stretch in stretches] for stage in stages},
    }


def callers_setting(number: int) -> str:
    return f"{number} caller{'s' if number > 1 else ''}"


@dataclass(frozen=True, slots=True)
class Row:
    """What one system did in one setting; `values`: a list for each figure, one value for each repeat."""

    system: str
    setting: str
    values: dict[str, list[float]]

    def spread(self, figure: str) -> Spread:
        return Spread.of(self.values[figure])


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure should be: `at_least` or else at most `bound`."""

    what: str
    value: Spread
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value.median >= self.bound if self.at_least else self.value.median <= self.bound


@dataclass(slots=True)
class Report:
    """`part`: also the name of the files. `plotted`: which figures the plot shows."""

    part: str
    title: str
    plotted: Sequence[str] = (RATE, P50, CPU)
    rows: list[Row] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.time)
    load_at_start: float = field(default_factory=lambda: os.getloadavg()[0])

    def add(self, system: str, setting: str, values: dict[str, list[float]]) -> Row:
        row = Row(system, setting, values)
        self.rows.append(row)
        return row

    def row(self, system: str, setting: str) -> Row:
        return next(row for row in self.rows if (row.system, row.setting) == (system, setting))

    def show(self, console: Console) -> None:
        """The tables, on a terminal or in a file."""
        console.print(self._table([figure for row in self.rows for figure in row.values if not figure.startswith(STAGE)]))
        stages = [figure for row in self.rows for figure in row.values if figure.startswith(STAGE)]
        if stages:
            console.print(self._table(stages, medians=True))
        for bar in self.bars:
            sign = "≥" if bar.at_least else "≤"
            verdict = "met" if bar.met else "not met"
            console.print(f"{bar.what}: {bar.value:.2f}, should be {sign} {bar.bound:g}: {verdict}", soft_wrap=True)
        for note in self.notes:
            console.print(note, soft_wrap=True)

    def _table(self, figures: list[str], *, medians: bool = False) -> Table:
        shown = list(dict.fromkeys(figures))
        title = "processor time by stage, ms for each request" if medians else f"{self.title}; median (lowest–highest)"
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
        table.add_column("", no_wrap=True)
        table.add_column("", no_wrap=True)
        for figure in shown:
            table.add_column(figure.removeprefix(STAGE) if medians else figure, justify="right", no_wrap=True)
        last = ""
        for row in self.rows:
            cells = [_cell(row, figure, medians=medians) for figure in shown]
            if any(cells):
                table.add_row(row.setting if row.setting != last else "", row.system, *cells)
                last = row.setting
        return table

    def save(self, folder: Path) -> list[Path]:
        """Writes `part`.json, .png and .html; returns which."""
        folder.mkdir(parents=True, exist_ok=True)
        document = {
            "part": self.part,
            "title": self.title,
            "machine": machine(),
            "revision": revision(ROOT),
            "began": self.began,
            "seconds": time.time() - self.began,
            "load": {"start": self.load_at_start, "end": os.getloadavg()[0]},
            "rows": [asdict(row) for row in self.rows],
            "bars": [{**asdict(bar), "met": bar.met} for bar in self.bars],
            "notes": self.notes,
        }
        written = [folder / f"{self.part}.json"]
        written[0].write_text(json.dumps(document, indent=1) + "\n")
        if (chart := self._chart()) is not None:
            for ending, options in (("png", {"scale_factor": 2}), ("html", {"inline": True})):
                written.append(folder / f"{self.part}.{ending}")
                chart.save(str(written[-1]), **options)
        return written

    def _chart(self) -> Any:
        import altair  # takes a second

        charts = []
        for figure in self.plotted:
            points = [
                {"system": row.system, "setting": row.setting, **asdict(row.spread(figure))}
                for row in self.rows
                if figure in row.values
            ]
            if not points:
                continue
            base = altair.Chart({"values": points}, title=figure).encode(
                x=altair.X("setting:N", sort=None, title=None, axis=altair.Axis(labelAngle=-30)),
                xOffset=altair.XOffset("system:N", sort=None),
                color=altair.Color("system:N", sort=None, title=None, legend=altair.Legend(orient="bottom")),
            )
            # Systems are orders of magnitude apart, and it is ratios that count.
            axis = altair.Y("median:Q", title=None, scale=altair.Scale(type="log"))
            medians = base.mark_point(filled=True, size=60).encode(y=axis)
            spans = base.mark_rule().encode(y="low:Q", y2="high:Q")
            charts.append((medians + spans).properties(height=260))
        return altair.hconcat(*charts, title=self.title) if charts else None


def _cell(row: Row, figure: str, *, medians: bool) -> str:
    if figure not in row.values:
        return ""
    spread = row.spread(figure)
    plain = medians or spread.low == spread.high
    spec = _FORMATS.get(figure, ".2f" if spread.median < 100 else ".0f")
    return f"{spread.median:{spec}}" if plain else f"{spread.median:{spec}} ({spread.low:{spec}}–{spread.high:{spec}})"


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "processor": _processor(),
        "processors": processors.usable(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def revision(root: Path) -> str:
    """The commit of a checkout, `+` when something was changed since; empty when it is none."""
    said = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True)
    return said.stdout.strip()


def default_folder() -> Path:
    return locate_home(dict(os.environ)).path / "bench"
