"""What a worker counts, beside what the bus counts of every stage. Lanes: `single` texts, and `bulk` for batches and jobs."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram

MODEL = Gauge("portcullis_model_info", "1; the model that is loaded, and the pool that it serves.", ["model", "pool"])
SESSIONS = Gauge("portcullis_model_sessions", "Batches that are scored side by side at most; both lanes share the processors.")
RELOADS = Counter("portcullis_model_reloads_total", "Exchanges of the model that were asked for.", ["outcome"])
RELOADED, NOT_RELOADED = RELOADS.labels("ok"), RELOADS.labels("failed")

TEXTS = Counter("portcullis_model_texts_total", "Texts judged.", ["lane"])
REFUSED = Counter(
    "portcullis_model_refused_total",
    "Texts turned away at once: the queue was full, or too long for the time that the text had left (late).",
    ["lane", "reason"],
)
TRUNCATED = Counter("portcullis_model_truncated_texts_total", "Texts of which not everything hidden was undone.")
PREPARE = Histogram(
    "portcullis_model_prepare_duration_seconds",
    "Time to make windows of a text, by step: normalise, tokenise.",
    ["step"],
    buckets=(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5),
)
NORMALISE, TOKENISE = PREPARE.labels("normalise"), PREPARE.labels("tokenise")

QUEUED = Gauge("portcullis_model_queue_tokens", "Tokens of the windows that wait to be scored.", ["lane"])
QUEUE_LIMIT = Gauge("portcullis_model_queue_limit_tokens", "Tokens that may wait; then texts are turned away.", ["lane"])
QUEUE_WAIT = Histogram(
    "portcullis_model_queue_wait_seconds",
    "How long a batch's first window had waited when the batch began.",
    ["lane"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
BATCH_WINDOWS = Histogram(
    "portcullis_model_batch_windows", "Windows in a batch.", ["lane"], buckets=(1, 2, 4, 8, 16, 32, 64, 128)
)
TOKENS = Counter("portcullis_model_tokens_total", "Tokens scored, padding excluded.", ["lane"])
PADDED = Counter("portcullis_model_padding_tokens_total", "Tokens of padding scored: work for nothing.", ["lane"])
INFERENCE = Histogram(
    "portcullis_model_inference_duration_seconds",
    "Time of the model on one batch; its sum over time, by sessions, is how busy they are.",
    ["lane"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)


_TEXTS = {bulk: TEXTS.labels("bulk" if bulk else "single") for bulk in (False, True)}


def count_text(*, bulk: bool, truncated: bool) -> None:
    _TEXTS[bulk].inc()
    TRUNCATED.inc(truncated)


class LaneMetrics:
    """Of one batcher. `queued_tokens` tells what waits in it."""

    def __init__(self, lane: str, queue_tokens: int, queued_tokens: Callable[[], int]) -> None:
        QUEUED.labels(lane).set_function(queued_tokens)
        QUEUE_LIMIT.labels(lane).set(queue_tokens)
        self.full, self.late = REFUSED.labels(lane, "full"), REFUSED.labels(lane, "late")
        self._wait = QUEUE_WAIT.labels(lane)
        self._windows = BATCH_WINDOWS.labels(lane)
        self._tokens = TOKENS.labels(lane)
        self._padding = PADDED.labels(lane)
        self._inference = INFERENCE.labels(lane)

    def began(self, lengths: list[int], waited_seconds: float) -> None:
        """A batch of windows of so many tokens; all are padded to the longest."""
        tokens = sum(lengths)
        self._wait.observe(waited_seconds)
        self._windows.observe(len(lengths))
        self._tokens.inc(tokens)
        self._padding.inc(max(lengths) * len(lengths) - tokens)

    def scored(self, seconds: float) -> None:
        self._inference.observe(seconds)
