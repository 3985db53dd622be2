"""Streams and buckets of JetStream: made as configured where they are not there yet, and never altered once they are.

Whoever runs the system may give one another size, another age or other replicas (`nats stream edit`), and finds it so ever after.
What is otherwise than it would be made is told in one line, once; where the service cannot work with it, it does not start.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Final

import nats.js.errors
from nats.js import JetStreamContext, api

from libs.common.service import ConfigurationError

log = logging.getLogger(__name__)

_REPLICAS_NEED_A_CLUSTER: Final = 10074  # these two: nats-server's errors.json
_MADE_BY_SOMEBODY_ELSE: Final = 10058

_STREAM_FIELDS: Final = (
    "subjects",
    "retention",
    "storage",
    "discard",
    "discard_new_per_subject",
    "max_msgs_per_subject",
    "max_bytes",
    "max_age",
    "num_replicas",
)
_CONSUMER_FIELDS: Final = ("ack_wait", "max_ack_pending", "max_deliver")
_BUCKET_DUPLICATES_SECONDS: Final = 120.0


def bucket(name: str, *, ttl_seconds: float, max_bytes: int, replicas: int) -> api.StreamConfig:
    """The stream that is a key-value bucket with a history of one, as NATS ADR-8 has it."""
    return api.StreamConfig(
        name=f"KV_{name}",
        subjects=[f"$KV.{name}.>"],
        storage=api.StorageType.FILE,
        discard=api.DiscardPolicy.NEW,
        max_msgs_per_subject=1,
        max_age=ttl_seconds,
        max_bytes=max_bytes,
        num_replicas=replicas,
        duplicate_window=min(ttl_seconds, _BUCKET_DUPLICATES_SECONDS),
        allow_rollup_hdrs=True,
        allow_msg_ttl=True,
        allow_direct=True,
        deny_delete=True,
    )


def differences(found: object, wanted: object, fields: Collection[str]) -> dict[str, tuple[object, object]]:
    """Where two configurations differ, of what `wanted` sets: field → (found, wanted)."""
    pairs = {name: (getattr(found, name), getattr(wanted, name)) for name in fields}
    return {name: pair for name, pair in pairs.items() if pair[1] is not None and not _same(*pair)}


def _same(found: object, wanted: object) -> bool:
    if isinstance(wanted, list):  # more subjects than are needed do no harm
        return isinstance(found, list) and set(wanted) <= set(found)
    return found == wanted


class Keeper:
    """Makes what is not there; tells of each difference once in the life of a process."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    async def stream(self, jetstream: JetStreamContext, wanted: api.StreamConfig, needs: Collection[str]) -> api.StreamInfo:
        """The stream as it is. `needs`: fields that must be as they would be made.

        Raises ConfigurationError, and nats-py's errors where JetStream cannot be asked or has too few servers yet.
        """
        assert wanted.name is not None
        try:
            info = await jetstream.stream_info(wanted.name)
        except nats.js.errors.NotFoundError:
            info = await self._make(jetstream, wanted)
        found = differences(info.config, wanted, _STREAM_FIELDS)
        if unfit := {name: pair for name, pair in found.items() if name in needs}:
            raise ConfigurationError(
                f"the stream {wanted.name} cannot be used as it is: {_listed(unfit)}; delete it, so that it is made anew, "
                "or edit it (nats stream edit)"
            )
        self._tell(f"stream {wanted.name}", found, f"nats stream edit {wanted.name}")
        return info

    async def consumer(self, jetstream: JetStreamContext, stream: str, wanted: api.ConsumerConfig) -> None:
        """A durable consumer. Raises nats-py's errors."""
        assert wanted.durable_name is not None
        try:
            info = await jetstream.consumer_info(stream, wanted.durable_name)
        except nats.js.errors.NotFoundError:
            await jetstream.add_consumer(stream, wanted)
            return
        name = f"{stream} {wanted.durable_name}"
        self._tell(f"consumer {name}", differences(info.config, wanted, _CONSUMER_FIELDS), f"nats consumer edit {name}")

    @staticmethod
    async def _make(jetstream: JetStreamContext, wanted: api.StreamConfig) -> api.StreamInfo:
        assert wanted.name is not None
        try:
            info = await jetstream.add_stream(wanted)
        except nats.js.errors.APIError as error:
            if error.err_code == _REPLICAS_NEED_A_CLUSTER:
                raise ConfigurationError(
                    f"NATS is one server, and keeps one replica of a stream and not {wanted.num_replicas}; "
                    "set PORTCULLIS_STREAM_REPLICAS to 1, or PORTCULLIS_NATS_URL to a cluster"
                ) from None
            if error.err_code == _MADE_BY_SOMEBODY_ELSE:  # at the same moment, and with another configuration
                return await jetstream.stream_info(wanted.name)
            raise
        log.info("made the stream %s", wanted.name)
        return info

    def _tell(self, what: str, found: dict[str, tuple[object, object]], command: str) -> None:
        new = {name: pair for name, pair in found.items() if (what, name) not in self._told}
        if new:
            self._told |= {(what, name) for name in new}
            log.warning("the %s is left as it is: %s (to change it: %s)", what, _listed(new), command)


def _listed(found: dict[str, tuple[object, object]]) -> str:
    return ", ".join(f"{name} is {_shown(is_)}, configured {_shown(wanted)}" for name, (is_, wanted) in found.items())


def _shown(value: object) -> object:
    return value.value if isinstance(value, api.RetentionPolicy | api.StorageType | api.DiscardPolicy) else value
