"""On the PYTHONPATH of a worker this makes its model sleep instead of computing, so that a benchmark can have more workers than
processors: everything else about it is as ever, its queue, its batches and its saying that it is busy.
"""

from __future__ import annotations

import sys
import time
from typing import Any

SECONDS_PER_ROW = 0.04
"""Of a window: about a model ten times as large as the one that is shipped, on one processor."""

if "services.fallback_model" in sys.orig_argv:  # the other services have no model, and need not load what it needs
    import numpy as np
    import onnxruntime

    def _sleep(_: Any, __: Any, feeds: dict[str, Any], *___: Any) -> list[Any]:
        rows = len(feeds["input_ids"])
        time.sleep(rows * SECONDS_PER_ROW)
        return [np.full(rows, -5.0, np.float32), np.full((rows, 6), -5.0, np.float32)]

    onnxruntime.InferenceSession.run = _sleep
