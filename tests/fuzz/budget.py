"""How much the state machines try: little in the ordinary test run, much where `just fuzz` asks for it."""

from __future__ import annotations

import os
from typing import Final

FACTOR_VARIABLE: Final = "PORTCULLIS_TEST_FUZZ_FACTOR"


def examples(short: int) -> int:
    """As many runs of a machine as the ordinary test run has, times what the long one asks for."""
    return short * int(os.environ.get(FACTOR_VARIABLE, "1"))
