"""What the services share: messages, subjects, errors, the bus, time, settings, logs and metrics."""

import sys

VERSION = "0.1.0"

if "aiohttp" not in sys.modules:
    # nats-py imports aiohttp, where it is installed, for a WebSocket transport that we do not speak: a third of a second of every
    # start. It takes its absence well, and whoever needs aiohttp itself imports it afterwards.
    sys.modules["aiohttp"] = None  # type: ignore[assignment]
    import nats  # noqa: F401

    del sys.modules["aiohttp"]
