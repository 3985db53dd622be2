"""docs/operations/metrics.md, made from the metrics that the code declares: `python -m tests.contract.metrics_page` writes it."""

from __future__ import annotations

from tests.metric_labels import CODES, LABELS, OUTCOMES, REASONS
from tests.metrics_kit import EVERY_SERVICE, ROOT, Family, declared

PAGE = ROOT / "docs" / "operations" / "metrics.md"

HEAD = """# Metrics

<!-- Made from the code by `python -m tests.contract.metrics_page`; do not edit. -->

Every process serves its metrics on a port of its own, in Prometheus' text format and, for whoever asks for it, as OpenMetrics
with exemplars: `trace_id` on the buckets of durations leads to a trace that is kept. `./run up` gives every replica a port and
writes them all to `.portcullis/prometheus/targets.json`, which
[`infra/prometheus/prometheus.yml`](../../infra/prometheus/prometheus.yml) reads; Prometheus adds the labels `service` and
`replica` from there. Beside what is listed here each process shows what the client library tells of it: `process_*`, `python_*`.

The same port answers whoever probes the process: `/health/live` (its event loop turns) and `/health/ready` (it takes work).

`/metrics` of the gateway itself needs no key and shows strangers only calls, their durations and how full the edge is, without
those of administrators. Of several edges it shows the one that answers; scrape the processes.

No label holds a key, a text, a path or anything else that callers could make up; `tests/chaos/test_metrics.py` holds a running
stack to the values that are listed [below](#labels).

A *counter* only grows, ask for its `rate()`; a *gauge* is what it is now; a *histogram* has `_bucket`, `_sum` and `_count`.
"""


def render() -> str:
    parts = [HEAD]
    for owner, families in declared().items():
        title = owner[0].upper() + owner[1:] if owner == EVERY_SERVICE else f"`{owner}`"
        parts.append(f"\n## {title}\n\n| metric | kind | labels | |\n|---|---|---|---|\n")
        own = (family for family in families if family.name.startswith("portcullis_"))
        parts += [_row(family) for family in sorted(own, key=lambda each: each.shown_name)]
    parts.append("\n## Labels\n\n| label | what | values |\n|---|---|---|\n")
    for name, bound in sorted(LABELS.items()):
        parts.append(_bound(f"`{name}`", bound.text, bound.values, bound.pattern))
        for family, values in sorted({"outcome": OUTCOMES, "reason": REASONS}.get(name, {}).items()):
            parts.append(_bound(f"… of `{family}_total`", "", values))
    return "".join(parts)


def _bound(name: str, text: str, values: tuple[str, ...], pattern: str = "") -> str:
    codes = set(CODES) <= set(values) and name != "`code`"
    shown = [f"`{value}`" for value in values if not (codes and value in CODES)] + (["a `code`"] if codes else [])
    shown += [f"as `{_cell(pattern)}`"] if pattern else []
    return f"| {name} | {text} | {', '.join(shown)} |\n"


def _row(family: Family) -> str:
    labels = ", ".join(f"`{label}`" for label in family.labels)
    return f"| `{family.shown_name}` | {family.kind} | {labels} | {_cell(family.help)} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render())
