"""Which targets there are, and how one is run. Imports none of them: that is for the process which instruments them."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
HANGS_AFTER_SECONDS: Final = 30
"""On one input, which takes milliseconds: a machine that is busy with other things is not slower by so much."""
MOST_MEMORY_MB: Final = 1024


@dataclass(frozen=True, slots=True)
class Target:
    """A module with `run(bytes)`, which fails on what must not be, `seeds()`, and perhaps `words()` and `GUIDES`.

    `instrument`: packages and modules whose branches guide the fuzzer. `most_bytes`: of an input. `short_runs`: how many inputs
    the ordinary test run tries, in a few seconds.
    """

    module: str
    instrument: tuple[str, ...]
    most_bytes: int
    short_runs: int


TARGETS: Final = {
    "messages": Target("tests.fuzz.messages", ("libs.common", "tests.fuzz.messages"), 4096, 30_000),
    "envelopes": Target(
        "tests.fuzz.envelopes", ("libs.common", "nats.protocol", "nats.aio.client", "tests.fuzz.envelopes"), 4096, 4_000
    ),
    "normaliser": Target(
        "tests.fuzz.normaliser",
        (
            "services.fallback_model.normalise",
            "services.fallback_model.fragments",
            "services.fallback_model.characters",
            "services.fallback_model.lexicon",
            "tests.fuzz.views",
        ),
        2048,
        1_000,
    ),
    # Not of the product: it fails on what no seed holds, so that a fuzzer which finds nothing is one that works.
    "planted": Target("tests.fuzz.planted", ("tests.fuzz.planted",), 64, 200_000),
}


def found(name: str) -> Path:
    """Where the inputs are kept that have failed once; not there when none has."""
    return ROOT / "tests" / "fuzz" / "found" / name


def fuzz(name: str, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a target with options of libFuzzer. What it finds on the way, and what fails, stays in `home`.

    The exit status is 0 when nothing failed; else the last lines of `stdout` say what did, and which file in `home` does it.
    """
    command = [sys.executable, "-m", "tests.fuzz.drive", name, str(home)]
    bounds = [f"-timeout={HANGS_AFTER_SECONDS}", f"-rss_limit_mb={MOST_MEMORY_MB}"]
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    return subprocess.run(
        [*command, *bounds, *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
