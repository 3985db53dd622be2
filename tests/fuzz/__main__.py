"""The long form: `just fuzz [SECONDS] [NAME …]`, so many seconds for each target and each state machine.

What the targets find worth keeping stays below `.portcullis/fuzz` (or `PORTCULLIS_HOME`), and the next run begins with it.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from tests.fuzz.budget import FACTOR_VARIABLE
from tests.fuzz.targets import ROOT, TARGETS, fuzz

MACHINES: Final = {
    "limiter": "tests/unit/limiter/test_limiter_machine.py",
    "breaker": "tests/unit/detector_proxy/test_breaker.py::TestBreakerMachine",
    "jobs": "tests/unit/jobs/test_jobs_machine.py",
    "http": "tests/chaos/test_openapi_stateful.py",
}
"""State machines of hypothesis and schemathesis, as pytest knows them."""
FACTOR: Final = 10
"""How many times the ordinary number of examples one round has. Rounds, each with a seed of its own, follow one another."""
LAST_LINES: Final = 40
SLICE_SECONDS: Final = 60
"""How long one process fuzzes: atheris keeps the result of every comparison of arrays for ever, and grows by it."""


def run_target(name: str, seconds: int) -> bool:
    """Whether nothing failed."""
    home = Path(os.environ.get("PORTCULLIS_HOME", ROOT / ".portcullis")) / "fuzz" / name
    home.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + seconds
    while (left := round(ends - time.monotonic())) > 0:
        ended = fuzz(name, home, f"-max_total_time={min(left, SLICE_SECONDS)}", f"-seed={random.randrange(1, 2**31)}")
        lines = ended.stdout.splitlines()
        if ended.returncode:
            print("\n".join(lines[-LAST_LINES:]))
            return False
        print("\n".join(line for line in lines if "DONE" in line), flush=True)
    return True


def run_machine(name: str, seconds: int) -> bool:
    """Whether nothing failed."""
    environment = os.environ | {FACTOR_VARIABLE: str(FACTOR)}
    ends = time.monotonic() + seconds
    rounds = 0
    while time.monotonic() < ends:
        seed = random.randrange(2**31)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "--no-header",
            "--show-capture=no",
            f"--hypothesis-seed={seed}",
            MACHINES[name],
        ]
        ended = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
        rounds += 1
        if ended.returncode:
            print(f"{ended.stdout}\nagain with {FACTOR_VARIABLE}={FACTOR} {' '.join(command[1:])}")
            return False
    print(f"{rounds} rounds of {FACTOR} times the ordinary examples")
    return True


def main() -> int:
    names = [*(name for name in TARGETS if name != "planted"), *MACHINES]
    parser = argparse.ArgumentParser(prog="just fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", nargs="?", type=int, default=180, help="for each (180)")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all, or some of: {', '.join(names)}")
    given = parser.parse_args()
    if unknown := set(given.names) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    failed = []
    for name in given.names or names:
        print(f"{name}:", flush=True)
        if not (run_target if name in TARGETS else run_machine)(name, given.seconds):
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
