"""Telling a caller that a job is over, as Standard Webhooks (https://www.standardwebhooks.com) has it.

The receiver's address is somebody else's choice. A name is resolved here, each of its addresses is checked, and the connection is
made to one of those that were: a name that points elsewhere a moment later changes nothing. No redirect is followed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Protocol
from urllib.parse import urlsplit

import aiohttp
import msgspec
import nats.errors
from aiohttp.abc import AbstractResolver, ResolveResult
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from standardwebhooks.webhooks import Webhook
from yarl import URL

from libs.common import VERSION, tracing
from libs.common.clock import Clock
from libs.common.contracts import JobStatus
from libs.common.errors import PortcullisError
from libs.common.subjects import JOB_HOOKS_STREAM
from services.jobs import core, metrics
from services.jobs.adapters import API_TIMEOUT_SECONDS, HOOKS_CONSUMER, JetStream, translated
from services.jobs.ports import Records
from services.jobs.settings import Settings

log = logging.getLogger(__name__)

MAX_URL_CHARACTERS = 2000
AT_A_TIME = 4
IDLE_SECONDS = 5.0
RETRY_SECONDS = 0.5

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def refusal(url: str, *, allow_private: bool) -> str | None:
    """Why a URL cannot be a webhook's; None when it can. What a name stands for is looked at when it is used."""
    if len(url) > MAX_URL_CHARACTERS or not url.isascii() or any(character <= " " for character in url):
        return f"Expected an http or https URL of at most {MAX_URL_CHARACTERS} ASCII characters"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
        URL(url)
    except ValueError:
        return "Expected an http or https URL"
    if parts.scheme not in ("http", "https") or not host:
        return "Expected an http or https URL"
    if parts.username is not None or parts.password is not None:
        return "Expected a URL without credentials; what is sent is signed"
    if not allow_private and (host == "localhost" or host.endswith(".localhost") or not _may_be_public(host)):
        return "Expected a public address"
    return None


def _may_be_public(host: str) -> bool:
    try:
        # As the resolver reads it: 127.1, 0x7f000001 and 2130706433 are addresses, too.
        return is_public(ipaddress.IPv4Address(socket.inet_aton(host)))
    except OSError:
        pass
    try:
        return is_public(ipaddress.ip_address(host))
    except ValueError:
        return True


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet's, also where it wraps one of IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        if (mapped := address.ipv4_mapped) is not None:
            return is_public(mapped)
        if address in _NAT64 or address in _COMPATIBLE:
            return is_public(ipaddress.IPv4Address(address.packed[-4:]))
        if address.sixtofour is not None or address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")  # deprecated, and read by some systems as the IPv4 address at its end


class PublicResolver(AbstractResolver):
    """Names, as the system resolves them, without the addresses that are not public."""

    def __init__(self, inner: AbstractResolver) -> None:
        self._inner = inner

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        public = [result for result in found if is_public(ipaddress.ip_address(result["host"].partition("%")[0]))]
        if not public:
            raise OSError(None, "no public address")
        return public

    async def close(self) -> None:
        await self._inner.close()


class Sender:
    """`allow_private`: any address will do."""

    def __init__(self, session: aiohttp.ClientSession, *, allow_private: bool) -> None:
        self._session = session
        self._allow_private = allow_private

    async def send(self, url: str, secret: str, message_id: str, at: datetime, body: str) -> str | None:
        """Why it was not delivered, in a word; None when it was."""
        if refusal(url, allow_private=self._allow_private) is not None:
            return "refused"
        headers = {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(int(at.timestamp())),
            "webhook-signature": Webhook(secret).sign(message_id, at, body),
        }
        try:
            async with self._session.post(url, data=body.encode(), headers=headers, allow_redirects=False) as response:
                return None if 200 <= response.status < 300 else str(response.status)
        except TimeoutError:
            return "timeout"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return type(error).__name__


@asynccontextmanager
async def sending(settings: Settings) -> AsyncIterator[Sender]:
    resolver: AbstractResolver = aiohttp.ThreadedResolver()
    if not settings.webhook_allow_private:
        resolver = PublicResolver(resolver)
    # Nothing is kept: neither what a name stood for, nor a connection that was made to it, nor a cookie.
    connector = aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, force_close=True, limit=AT_A_TIME)
    async with aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        timeout=aiohttp.ClientTimeout(total=settings.webhook_timeout_seconds),
        headers={"user-agent": f"Portcullis/{VERSION}"},
        max_line_size=8190,
        max_field_size=8190,
    ) as session:
        yield Sender(session, allow_private=settings.webhook_allow_private)


class Due(Protocol):
    """A webhook in hand. `attempt`: counted from 1."""

    @property
    def key_id(self) -> str: ...

    @property
    def job_id(self) -> str: ...

    @property
    def attempt(self) -> int: ...

    async def done(self) -> None: ...

    async def again(self, seconds: float) -> None: ...


class Hooks(Protocol):
    async def take(self, most: int) -> Sequence[Due]:
        """Waits a while for the first. Raises `PortcullisError`."""
        ...


class Deliverer:
    """Delivers what is due; every replica takes its share."""

    def __init__(self, hooks: Hooks, records: Records, sender: Sender, clock: Clock, attempts: int) -> None:
        self._hooks = hooks
        self._records = records
        self._sender = sender
        self._clock = clock
        self._attempts = attempts

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                due = await self._hooks.take(AT_A_TIME)
                for outcome in await asyncio.gather(*(self.deliver(each) for each in due), return_exceptions=True):
                    if isinstance(outcome, BaseException):
                        raise outcome
            except PortcullisError as error:
                log.info("delivering webhooks is interrupted: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
            except Exception:
                # The one catch-all of this task: a bug in one webhook must not end it silently.
                log.exception("delivering webhooks failed")
                await asyncio.sleep(RETRY_SECONDS)

    async def deliver(self, due: Due) -> None:
        kept = await self._records.get(due.key_id, due.job_id)
        if kept is None or kept.record.webhook_url is None or kept.record.webhook_secret is None:
            await due.done()
            return
        record = kept.record
        assert record.webhook_url is not None
        assert record.webhook_secret is not None
        status = core.status_of(record, int(self._clock.now() * 1000))
        at = datetime.fromtimestamp(self._clock.now(), UTC)
        with tracing.root("POST webhook", tracing.CLIENT, link=record.traceparent) as span:
            span.set("portcullis.job_id", record.job_id)
            failure = await self._sender.send(
                record.webhook_url, record.webhook_secret, f"msg_{record.job_id}", at, document(status)
            )
            if failure is not None:
                span.fail(failure)
        if failure is None:
            metrics.DELIVERED.inc()
            await due.done()
        elif due.attempt >= self._attempts:
            metrics.GIVEN_UP.inc()
            log.warning("the webhook of job %s is given up after %d attempts (%s)", record.job_id, due.attempt, failure)
            await due.done()
        else:
            metrics.FAILED.inc()
            log.info("the webhook of job %s failed (%s)", record.job_id, failure)
            await due.again(core.webhook_pause_seconds(due.attempt))


class _Event(msgspec.Struct):
    type: str
    timestamp: str | None
    data: JobStatus


def document(status: JobStatus) -> str:
    """What is sent: counts and times, and no text."""
    return msgspec.json.encode(_Event(f"job.{status.state}", status.finished_at, status)).decode()


class JetStreamDue:
    """`Due`."""

    def __init__(self, message: Msg) -> None:
        self._message = message
        _, _, self.key_id, self.job_id, *_ = message.subject.split(".")
        self.attempt = message.metadata.num_delivered or 1

    async def done(self) -> None:
        with translated("acknowledging a webhook"):
            await self._message.ack_sync(timeout=API_TIMEOUT_SECONDS)

    async def again(self, seconds: float) -> None:
        with translated("putting a webhook off"):
            await self._message.nak(delay=seconds)


class JetStreamHooks:
    """`Hooks`."""

    def __init__(self, stream: JetStream) -> None:
        self._stream = stream
        self._subscription: JetStreamContext.PullSubscription | None = None

    async def take(self, most: int) -> Sequence[JetStreamDue]:
        with translated("looking for webhooks"):
            if self._subscription is None:
                self._subscription = await self._stream.api.pull_subscribe_bind(durable=HOOKS_CONSUMER, stream=JOB_HOOKS_STREAM)
            with suppress(TimeoutError, nats.errors.TimeoutError):
                return [JetStreamDue(message) for message in await self._subscription.fetch(most, timeout=IDLE_SECONDS)]
        return []
