"""How much the state machines try: little in the ordinary test run, much where `just fuzz` asks for it."""

from __future__ import annotations

import os
from typing import Final

FACTOR_VARIABLE: Final = "PORTCULLIS_TEST_FUZZ_FACTOR"


_FACTOR: Final = int(os.environ.get(FACTOR_VARIABLE, "1"))
SHORT: Final = _FACTOR == 1


def examples(short: int) -> int:
    """As many runs of a machine as the ordinary test run has, times what the long one asks for."""
    return short * _FACTOR
