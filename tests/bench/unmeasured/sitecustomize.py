"""On a service's PYTHONPATH this makes its metrics cost nothing, so that a benchmark can tell what they cost."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from prometheus_client import Counter, Gauge, Histogram


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _itself(metric: Any, *_: Any, **__: Any) -> Any:
    return metric


def _in_progress(_: Any) -> AbstractContextManager[None]:
    return nullcontext()


Gauge.track_inprogress = _in_progress  # type: ignore[method-assign,assignment]
for kind, methods in ((Counter, ("inc",)), (Gauge, ("inc", "dec", "set", "set_function")), (Histogram, ("observe",))):
    for method in methods:
        setattr(kind, method, _nothing)
    kind.labels = _itself  # type: ignore[method-assign,assignment]
