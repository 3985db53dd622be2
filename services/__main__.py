"""`python -m services edge auth limiter detector_proxy`: several services in one process, in the order in which they ask each
other. See docs/adr/0018-stages-may-share-a-process.md.
"""

from __future__ import annotations

import importlib
import sys

from libs.common.service import run
from libs.common.subjects import SERVICES

if __name__ == "__main__":
    names = sys.argv[1:]
    if not names or not set(names) <= set(SERVICES) or len(set(names)) < len(names):
        raise SystemExit(f"usage: python -m services NAME..., each once, of {', '.join(SERVICES)}")
    # By their names, since no service may know of another, and one that is not asked for need not be installed.
    run(*(importlib.import_module(f"services.{name}.app").SERVICE for name in names))
