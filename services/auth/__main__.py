"""`python -m services.auth` serves; `… migrate` only brings the database to the newest schema; `… old-pepper` lists the keys that
are not known to be stored under the current pepper.
"""

from __future__ import annotations

import asyncio
import sys

from libs.common import service
from libs.common.settings import load
from services.auth.app import SERVICE, migrate_only
from services.auth.settings import AuthSettings

if sys.argv[1:] == ["migrate"]:
    try:
        asyncio.run(migrate_only(load(AuthSettings)))
    except service.ConfigurationError as error:
        raise SystemExit(f"portcullis auth: {error}") from None
elif sys.argv[1:]:
    from services.auth.command import main

    raise SystemExit(main(sys.argv[1:]))
else:
    service.run(SERVICE)
