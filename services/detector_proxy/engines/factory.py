"""Which class speaks which kind of engine behind HTTP."""

from __future__ import annotations

from services.detector_proxy.engines.detect import DetectEngine
from services.detector_proxy.engines.http import HttpClient
from services.detector_proxy.engines.kserve import KserveEngine
from services.detector_proxy.engines.tei import TeiEngine
from services.detector_proxy.ports import Engine
from services.detector_proxy.settings import DetectorProxySettings

SPARE_CONNECTIONS = 4
"""Beyond the bulkheads, for health checks."""


def http_engine(settings: DetectorProxySettings, url: str) -> Engine:
    """The engine at `url`, of the kind that the settings name."""
    client = HttpClient(
        url,
        token=settings.engine_token.get_secret_value() if settings.engine_token else None,
        max_connections=settings.engine_max_concurrency + settings.engine_batch_concurrency + SPARE_CONNECTIONS,
    )
    if settings.engine_kind == "tei":
        return TeiEngine(client, settings.engine_name, settings.benign_labels)
    if settings.engine_kind == "kserve":
        return KserveEngine(client, settings.engine_name)
    return DetectEngine(client, settings.engine_name, settings.engine_threshold)
