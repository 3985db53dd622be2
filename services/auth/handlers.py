"""What auth does with each message: the message first, then what is needed to handle it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

from libs.common import keys, subjects
from libs.common.clock import Clock
from libs.common.context import RequestContext
from libs.common.contracts import (
    AccountRequest,
    AdminCreateKey,
    AdminCredential,
    AdminKey,
    AdminListKeys,
    AdminUpdateKey,
    AdmissionRequest,
    AnsweredAccount,
    AuthenticatedAdmission,
    AuthenticatedDetect,
    AuthenticatedJobRequest,
    BreakersReset,
    BreakersResetRequest,
    DetectRequest,
    IssuedKey,
    JobRequest,
    KeyChanged,
    KeyList,
    KeyRecord,
    Message,
    RegisterRequest,
    Scope,
    TakeRequest,
    raw,
)
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.stages import Answer, Forward
from services.auth import core
from services.auth.cache import Authenticator, Caller, KeyCache
from services.auth.core import Caps, Fields, KeyChanges, Match, Peppers, StoredKey, Usage, utc
from services.auth.door import Door
from services.auth.ports import KeyAnnouncer, KeyStore

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator has decided. `admin_digest`: SHA-256 of the admin token, hex."""

    registration_open: bool
    caps: Caps
    rotate_grace: timedelta
    admin_digest: str | None


class Finisher:
    """Runs work on the store to its end even when the caller's deadline cancels the request.

    A key that was changed must also be announced, and a connection that is given up in the middle of a statement is lost to
    the pool. The work has its own timeouts.
    """

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Wait for what is still running."""
        if self._running:
            await asyncio.wait(self._running)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked for it has gone


@dataclass(frozen=True, slots=True)
class Keys:
    """What the handlers of account and admin calls work with."""

    store: KeyStore
    authenticator: Authenticator
    announcer: KeyAnnouncer
    clock: Clock
    peppers: Peppers
    policy: Policy

    def now(self) -> datetime:
        return utc(self.clock.now())


# --- detection -----------------------------------------------------------------------------------------------------------


async def detect(message: DetectRequest, _: RequestContext, authenticator: Authenticator) -> Forward:
    principal = (await authenticator.authenticate(message.credential)).principal
    core.require_scope(principal, "detect" if message.cost == 1 else "batch")
    return Forward(
        subjects.DETECT_AUTHENTICATED,
        AuthenticatedDetect(principal=principal, payload=message.payload, cost=message.cost),
    )


async def admit(message: AdmissionRequest, _: RequestContext, authenticator: Authenticator) -> Forward:
    """Who asks for units for many texts."""
    principal = (await authenticator.authenticate(message.credential)).principal
    core.require_scope(principal, "batch")
    return Forward(subjects.BATCH_AUTHENTICATED, AuthenticatedAdmission(principal=principal, cost=message.cost))


async def take(message: TakeRequest, _: RequestContext, authenticator: Authenticator) -> Forward:
    """Units for work that was accepted earlier, from a key whose secret was checked then: it must still be valid."""
    principal = await authenticator.identify(message.key_id)
    core.require_scope(principal, "batch")
    return Forward(subjects.BATCH_AUTHENTICATED, AuthenticatedAdmission(principal=principal, cost=message.cost, partial=True))


async def job(message: JobRequest, _: RequestContext, authenticator: Authenticator) -> Forward:
    """Who asks something about jobs."""
    principal = (await authenticator.authenticate(message.credential)).principal
    core.require_scope(principal, "batch")
    return Forward(
        subjects.JOBS_OPERATIONS[message.operation], AuthenticatedJobRequest(principal=principal, payload=message.payload)
    )


async def forget(event: KeyChanged, cache: KeyCache, door: Door | None = None) -> None:
    cache.forget(event.key_id)
    if door is not None:
        door.end(event.key_id)


# --- a caller's own key --------------------------------------------------------------------------------------------------


async def register(message: RegisterRequest, _: RequestContext, use: Keys) -> Answer:
    by_admin = message.admin_digest is not None and _is_admin_token(message.admin_digest, use.policy)
    if not (use.policy.registration_open or by_admin):
        raise PortcullisError(ErrorCode.FORBIDDEN, "Registration needs the admin token.")
    fields = Fields()
    name = fields.name(message.name)
    per_minute, per_day = fields.limits(message.rate_limit_per_minute, message.rate_limit_per_day, use.policy.caps)
    fields.check()
    return Answer(await _issue(use, name, core.SELF_REGISTERED_SCOPES, per_minute, per_day, None))


async def profile(message: AccountRequest, _: RequestContext, use: Keys) -> Forward:
    caller = await use.authenticator.authenticate(message.credential)
    return _answered(caller, await _record(use, caller.principal.key_id))


async def rotate(message: AccountRequest, _: RequestContext, use: Keys) -> Forward:
    """A new secret for the caller's key; the present one keeps working for the grace period.

    Only the current secret may do it: one that has been replaced must not be able to mint its own successor.
    """
    caller = await use.authenticator.authenticate(message.credential)
    key_id = caller.principal.key_id
    _require_current(caller)
    api_key = keys.generate(key_id)
    valid_until = use.now() + use.policy.rotate_grace
    stored = await use.store.replace_secret(
        key_id,
        current=caller.verifiers,
        new=use.peppers.verifier(keys.digest(api_key)),
        pepper_id=use.peppers.current_id,
        previous_valid_until=valid_until,
    )
    await use.announcer.changed(key_id)
    if stored is None:
        # Another call was faster: this secret is refused as one that was replaced, or as that of a revoked key.
        _require_current(await use.authenticator.authenticate(message.credential))
        raise PortcullisError(ErrorCode.STAGE_UNAVAILABLE, internal="the secret was replaced while it was current")
    usage = (await use.store.usage([key_id])).get(key_id, Usage())
    issued = IssuedKey(api_key=api_key, record=core.record_of(stored, usage), previous_valid_until=core.iso(valid_until))
    return _answered(caller, issued)


async def revoke(message: AccountRequest, _: RequestContext, use: Keys) -> Forward:
    caller = await use.authenticator.authenticate(message.credential)
    await use.store.revoke(caller.principal.key_id, use.now())
    await use.announcer.changed(caller.principal.key_id)
    return _answered(caller, None)


def _require_current(caller: Caller) -> None:
    if caller.match is not Match.CURRENT:
        raise PortcullisError(ErrorCode.FORBIDDEN, "This secret has been replaced by a newer one, which must be used to rotate.")


def _answered(caller: Caller, result: KeyRecord | IssuedKey | None) -> Forward:
    return Forward(subjects.ACCOUNT_ANSWERED, AnsweredAccount(principal=caller.principal, result=raw(result)))


# --- administration ------------------------------------------------------------------------------------------------------


async def list_keys(message: AdminListKeys, _: RequestContext, use: Keys) -> Answer:
    await _require_admin(message.admin, use)
    if message.after is not None and not core.is_key_id(message.after):
        page = None
    else:
        # One more than asked for tells whether there is a next page.
        page = await use.store.page(message.after, message.limit + 1)
    if page is None:
        raise PortcullisError(ErrorCode.INVALID_FIELD, fields=(("after", "must be the key_id of an existing key"),))
    shown = page[: message.limit]
    usage = await use.store.usage([key.key_id for key in shown])
    return Answer(
        KeyList(
            keys=tuple(core.record_of(key, usage.get(key.key_id, Usage())) for key in shown),
            next_after=shown[-1].key_id if len(page) > len(shown) else None,
        )
    )


async def create_key(message: AdminCreateKey, _: RequestContext, use: Keys) -> Answer:
    await _require_admin(message.admin, use)
    fields = Fields()
    name = fields.name(message.name)
    scopes = fields.scopes(message.scopes) if message.scopes is not None else core.SELF_REGISTERED_SCOPES
    per_minute, per_day = fields.limits(message.rate_limit_per_minute, message.rate_limit_per_day, core.ADMIN_CAPS)
    expires_at = fields.expiry(message.expires_at, use.now())
    fields.check()
    return Answer(await _issue(use, name, scopes, per_minute, per_day, expires_at))


async def get_key(message: AdminKey, _: RequestContext, use: Keys) -> Answer:
    await _require_admin(message.admin, use)
    return Answer(await _record(use, message.key_id))


async def update_key(message: AdminUpdateKey, _: RequestContext, use: Keys) -> Answer:
    await _require_admin(message.admin, use)
    fields = Fields()
    if message.rate_limit_per_minute is not None:
        fields.limit("rate_limit_per_minute", message.rate_limit_per_minute, core.ADMIN_MAX_PER_MINUTE)
    if message.rate_limit_per_day is not None:
        fields.limit("rate_limit_per_day", message.rate_limit_per_day, core.ADMIN_MAX_PER_DAY)
    changes = KeyChanges(
        name=fields.name(message.name) if message.name is not None else None,
        scopes=fields.scopes(message.scopes) if message.scopes is not None else None,
        limit_minute=message.rate_limit_per_minute,
        limit_day=message.rate_limit_per_day,
        expires_at=fields.expiry(message.expires_at, use.now()),
    )
    fields.check()
    before = await _stored(use, message.key_id)
    if before.revoked_at is not None:
        raise PortcullisError(ErrorCode.INVALID_FIELD, fields=(("key_id", "is that of a revoked key, which cannot be changed"),))
    await use.store.change(message.key_id, changes)
    await use.announcer.changed(message.key_id)
    return Answer(await _record(use, message.key_id))


async def delete_key(message: AdminKey, _: RequestContext, use: Keys) -> Answer:
    """Revoke. Done twice it is as done once."""
    await _require_admin(message.admin, use)
    revoked = await use.store.revoke(message.key_id, use.now()) if core.is_key_id(message.key_id) else None
    if revoked is None:
        raise PortcullisError(ErrorCode.NOT_FOUND)
    await use.announcer.changed(message.key_id)
    return Answer(await _record(use, message.key_id))


async def reset_breakers(message: BreakersResetRequest, _: RequestContext, use: Keys) -> Forward:
    await _require_admin(message.admin, use)
    return Forward(subjects.BREAKERS_RESET, BreakersReset(name=message.name))


def _is_admin_token(digest: str, policy: Policy) -> bool:
    return policy.admin_digest is not None and core.equal_secrets(digest, policy.admin_digest)


async def _require_admin(admin: AdminCredential, use: Keys) -> None:
    if admin.admin_digest is not None and _is_admin_token(admin.admin_digest, use.policy):
        return
    if admin.credential is not None:
        try:
            caller = await use.authenticator.authenticate(admin.credential)
        except PortcullisError as error:
            if error.code is not ErrorCode.INVALID_CREDENTIALS:
                raise
        else:
            if "admin" in caller.principal.scopes:
                return
    raise PortcullisError(ErrorCode.FORBIDDEN, "The admin token is needed.")


# --- common --------------------------------------------------------------------------------------------------------------


async def _issue(
    use: Keys, name: str, scopes: tuple[Scope, ...], per_minute: int, per_day: int, expires_at: datetime | None
) -> IssuedKey:
    key_id = keys.new_key_id()
    api_key = keys.generate(key_id)
    stored = StoredKey(
        key_id=key_id,
        name=name,
        scopes=scopes,
        limit_minute=per_minute,
        limit_day=per_day,
        created_at=use.now(),
        expires_at=expires_at,
        verifier=use.peppers.verifier(keys.digest(api_key)),
        pepper_id=use.peppers.current_id,
    )
    await use.store.add(stored)
    return IssuedKey(api_key=api_key, record=core.record_of(stored, Usage()))


async def _stored(use: Keys, key_id: str) -> StoredKey:
    stored = (await use.store.find([key_id])).get(key_id) if core.is_key_id(key_id) else None
    if stored is None:
        raise PortcullisError(ErrorCode.NOT_FOUND)
    return stored


async def _record(use: Keys, key_id: str) -> KeyRecord:
    stored = await _stored(use, key_id)
    return core.record_of(stored, await use.store.days(key_id, core.first_profile_day(use.now())))


M = TypeVar("M", bound=Message)


def finished(
    handle: Callable[[M, RequestContext, Keys], Coroutine[Any, Any, T]], use: Keys, finisher: Finisher
) -> Callable[[M, RequestContext], Awaitable[T]]:
    """`handle` with its dependencies, run to its end whatever becomes of the caller."""

    async def run(message: M, context: RequestContext) -> T:
        return await finisher.finish(handle(message, context, use))

    return run
