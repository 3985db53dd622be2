"""`python -m services.jobs` serves; `python -m services.jobs dead-letters` lists and replays what was given up."""

from __future__ import annotations

import sys

from libs.common import service
from services.jobs.app import SERVICE

if len(sys.argv) > 1:
    from services.jobs.command import main

    raise SystemExit(main(sys.argv[1:]))
service.run(SERVICE)
