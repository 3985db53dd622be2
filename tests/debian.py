"""Programs and libraries that do not come as wheels, from Debian's packages: unpacked below `.portcullis/debian`.

They are fetched from the machine's package index, for which nobody has to be root.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

UNPACKED = Path(__file__).parents[1] / ".portcullis" / "debian"


class NotToBeHadError(Exception):
    """One line that says why."""


@functools.cache
def unpacked(package: str) -> Path:
    """The folder in which the package lies unpacked. Raises `NotToBeHadError`."""
    found = UNPACKED / package
    if found.exists():
        return found
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise NotToBeHadError(f"there is no Debian package index to fetch {package} from")
    UNPACKED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=UNPACKED) as folder:
        archive = _fetch(Path(folder), package)
        whole = Path(folder) / "whole"
        subprocess.run(["dpkg-deb", "-x", str(archive), str(whole)], check=True)
        whole.replace(found)
    return found


def _fetch(folder: Path, package: str) -> Path:
    """Download the package: by the machine's own lists, or, where it has none, by lists of our own."""
    own = [f"-oDir::State::lists={folder}/lists", f"-oDir::Cache={folder}/cache"]
    for kept in ("lists/partial", "cache/archives/partial"):
        (folder / kept).mkdir(parents=True)
    said = _apt(folder, "download", package)
    if said is not None and (said := _apt(folder, *own, "update")) is None:
        said = _apt(folder, *own, "download", package)
    if said is not None:
        raise NotToBeHadError(f"Debian's package {package} cannot be fetched: {said}")
    return next(folder.glob("*.deb"))


def _apt(folder: Path, *arguments: str) -> str | None:
    """None, or the last line of what went wrong."""
    # As whoever runs the tests: apt's own user cannot write here.
    command = ["apt-get", "-qq", "-oAPT::Sandbox::User=", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["apt-get failed"])[-1]
