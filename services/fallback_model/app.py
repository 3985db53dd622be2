"""A worker of a model pool: loads and warms the model, then takes texts from the pool's subject."""

from __future__ import annotations

import asyncio
import functools
import logging
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from libs.common.bus import Bus
from libs.common.clock import SystemClock
from libs.common.contracts import ModelItems, ModelRequest
from libs.common.micro import BULK_ONLY, LANES, MODEL_NAME, POOL
from libs.common.service import ConfigurationError, Service
from libs.common.subjects import model_pool, model_pool_batch
from services.fallback_model import handlers, metrics, processors
from services.fallback_model.batcher import Batcher, Limits
from services.fallback_model.detector import Detector
from services.fallback_model.engine import ModelError
from services.fallback_model.model import Model
from services.fallback_model.settings import FallbackModelSettings
from services.fallback_model.swap import Slot

log = logging.getLogger(__name__)


_PREPARING_THREADS = 2
_MAX_IN_FLIGHT = 1024
_MAX_BULK_IN_FLIGHT = 16
"""Messages with many texts: enough to find texts of like length for a batch, and no more than a second or two of work."""
_BULK_TURN = 4
"""Batches in one go: the event loop is woken less often, and what the sessions keep in their caches lasts longer."""
_AHEAD = 1
"""A thread that scores would sleep between two batches, which was one twentieth of the time."""
_SWITCH_SECONDS = 0.0005
"""How long a thread that comes back from the network waits for the interpreter's lock before it asks for it. By default it is ten
times as long, and meanwhile a processor has nothing to do."""


async def load_detector(settings: FallbackModelSettings) -> Detector:
    """The detector of the configured directory, warm. Raises `ModelError`."""
    sessions, threads = processors.layout(settings.model_sessions, settings.model_threads, processors.usable())
    # In a thread: the loop goes on answering pings, and on a reload detections too.
    model = await asyncio.to_thread(Model, settings.model_dir, sessions, threads)
    log.info("model %s is loaded, %d sessions of %d threads", model.card.name, sessions, threads)
    limits = Limits(
        batch_tokens=settings.model_batch_tokens,
        queue_tokens=settings.model_queue_tokens,
        wait_seconds=settings.model_wait_ms / 1000,
    )
    bulk_limits = Limits(
        batch_tokens=settings.model_bulk_batch_tokens,
        queue_tokens=settings.model_bulk_queue_tokens,
        wait_seconds=settings.model_wait_ms / 1000,
    )
    return Detector(
        model,
        lambda loaded: Batcher(list(loaded.sessions), limits, SystemClock(), ahead=_AHEAD),
        lambda loaded: Batcher(
            list(loaded.sessions),
            bulk_limits,
            SystemClock(),
            begin_thread=processors.give_way,
            ahead=_AHEAD,
            turn=_BULK_TURN,
            lane="bulk",
        ),
        _PREPARING_THREADS,
    )


@asynccontextmanager
async def parts(bus: Bus, settings: FallbackModelSettings) -> AsyncIterator[None]:
    """Opens the model before the first message is taken; SIGHUP exchanges it for what the directory holds then."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        slot = Slot(await load_detector(settings))
    except ModelError as error:
        raise ConfigurationError(f"{error}; set PORTCULLIS_MODEL_DIR to a model directory") from None
    bus.status.set(POOL, settings.model_pool)
    _show(bus, slot, settings)
    if settings.model_bulk_only:
        bus.status.set(LANES, BULK_ONLY)
    else:
        bus.stage(
            model_pool(settings.model_pool),
            ModelRequest,
            functools.partial(handlers.detect, slot=slot, clock=bus.clock),
            max_in_flight=_MAX_IN_FLIGHT,
            waiting=lambda: slot.detector.waiting,
        )
    bus.stage(
        model_pool_batch(settings.model_pool),
        ModelItems,
        functools.partial(handlers.detect_many, slot=slot, clock=bus.clock),
        max_in_flight=_MAX_BULK_IN_FLIGHT,
        waiting=lambda: slot.detector.waiting_bulk,
    )
    reloads: set[asyncio.Task[None]] = set()

    def reload() -> None:
        if not reloads:  # one at a time; a signal in the middle of a reload asks for nothing new
            task = asyncio.get_running_loop().create_task(_reload(bus, slot, settings))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, reload)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)
        await asyncio.gather(*reloads)
        await slot.close()


async def _reload(bus: Bus, slot: Slot, settings: FallbackModelSettings) -> None:
    try:
        detector = await load_detector(settings)
    except ModelError as error:
        metrics.NOT_RELOADED.inc()
        log.error("the model was not exchanged: %s", error)
        return
    await slot.swap(detector)
    metrics.RELOADED.inc()
    _show(bus, slot, settings)


def _show(bus: Bus, slot: Slot, settings: FallbackModelSettings) -> None:
    """Tell the fleet and the metrics which model is in use."""
    model = slot.detector.model
    bus.status.set(MODEL_NAME, model.card.name)
    metrics.MODEL.clear()
    metrics.MODEL.labels(model.card.name, settings.model_pool).set(1)
    metrics.SESSIONS.set(len(model.sessions))


SERVICE = Service("fallback_model", FallbackModelSettings, parts)
