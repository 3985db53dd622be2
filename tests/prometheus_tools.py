"""promtool and prometheus, for the tests of what is given to them.

Neither comes as a wheel. What is on the PATH is used; else Debian's package is fetched from the machine's package index and
unpacked below `.portcullis/debian`, for which nobody has to be root. Where neither can be had the tests that need them are
skipped, unless `PORTCULLIS_TEST_PROMETHEUS=required` says that this must not happen.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNPACKED = ROOT / ".portcullis" / "debian" / "prometheus"
PACKAGE = "prometheus"
VARIABLE = "PORTCULLIS_TEST_PROMETHEUS"


class _NotToBeHadError(Exception):
    """One line that says why."""


def promtool() -> Path:
    return _tool("promtool")


def prometheus() -> Path:
    return _tool("prometheus")


def _tool(name: str) -> Path:
    if found := shutil.which(name):
        return Path(found)
    reason = _unpack()
    if reason is None:
        return UNPACKED / "usr" / "bin" / name
    if os.environ.get(VARIABLE) == "required":
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def _unpack() -> str | None:
    """Unpack Debian's package; None when it is there, else why it is not."""
    if (UNPACKED / "usr" / "bin" / "promtool").exists():
        return None
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return f"there is no promtool on the PATH, and no Debian package index to fetch it from ({PACKAGE})"
    UNPACKED.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=UNPACKED.parent) as folder:
        try:
            archive = _fetch(Path(folder))
        except _NotToBeHadError as error:
            return f"there is no promtool on the PATH, and Debian's package cannot be fetched: {error}"
        whole = Path(folder) / "whole"
        subprocess.run(["dpkg-deb", "-x", str(archive), str(whole)], check=True)
        whole.replace(UNPACKED)
    return None


def _fetch(folder: Path) -> Path:
    """Download the package: by the machine's own lists, or, where it has none, by lists of our own."""
    own = [f"-oDir::State::lists={folder}/lists", f"-oDir::Cache={folder}/cache"]
    for kept in ("lists/partial", "cache/archives/partial"):
        (folder / kept).mkdir(parents=True)
    said = _apt(folder, "download", PACKAGE)
    if said is not None and (said := _apt(folder, *own, "update")) is None:
        said = _apt(folder, *own, "download", PACKAGE)
    if said is not None:
        raise _NotToBeHadError(said)
    return next(folder.glob("*.deb"))


def _apt(folder: Path, *arguments: str) -> str | None:
    """None, or the last line of what went wrong."""
    # As whoever runs the tests: apt's own user cannot write here.
    command = ["apt-get", "-qq", "-oAPT::Sandbox::User=", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["apt-get failed"])[-1]
