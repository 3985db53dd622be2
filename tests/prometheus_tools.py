"""promtool and prometheus, for the tests of what is given to them.

Neither comes as a wheel. What is on the PATH is used; else Debian's package (`tests/debian.py`). Where neither can be had the
tests that need them are skipped, unless `PORTCULLIS_TEST_PROMETHEUS=required` says that this must not happen.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests import debian

PACKAGE = "prometheus"
VARIABLE = "PORTCULLIS_TEST_PROMETHEUS"


def promtool() -> Path:
    return _tool("promtool")


def prometheus() -> Path:
    return _tool("prometheus")


def _tool(name: str) -> Path:
    if found := shutil.which(name):
        return Path(found)
    try:
        return debian.unpacked(PACKAGE) / "usr" / "bin" / name
    except debian.NotToBeHadError as error:
        reason = f"there is no {name} on the PATH, and {error}"
    if os.environ.get(VARIABLE) == "required":
        pytest.fail(reason)
    pytest.skip(reason)
