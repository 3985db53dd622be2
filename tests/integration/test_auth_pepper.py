"""The exchange of the pepper on real NATS and PostgreSQL: no valid key is refused at any step, a revoked one at every step."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from infra.embedded.servers import Server
from libs.common import subjects
from libs.common.bus import Bus
from libs.common.contracts import IssuedKey
from libs.common.errors import ErrorCode
from services.auth.app import parts
from services.auth.command import show_left
from tests.integration.auth_kit import Fleet, Kit, code, connect, new_database, result, until

OLD, NEW = "the-pepper-until-now", "the-pepper-from-now-on"

BEFORE: dict[str, Any] = {"key_pepper": OLD}
BOTH: dict[str, Any] = {"key_pepper": OLD, "key_pepper_previous": NEW}
SWAPPED: dict[str, Any] = {"key_pepper": NEW, "key_pepper_previous": OLD}
AFTER: dict[str, Any] = {"key_pepper": NEW}


@pytest.fixture
async def kit(nats_server: Server, nats_passwords: dict[str, str], postgres_server: Server) -> AsyncIterator[Kit]:
    async with new_database(postgres_server) as url:
        yield Kit(nats_server, nats_passwords, url)


class Rollout:
    """Two replicas that are replaced one after the other, as a rolling update does it: the new one first."""

    def __init__(self, kit: Kit, edge: Bus, settings: dict[str, Any]) -> None:
        self.kit = kit
        self.fleet = Fleet(edge, [])
        self.settings = settings
        self._ends: list[AsyncExitStack] = []

    async def start(self) -> None:
        auth = self.kit.bus("auth")
        async with AsyncExitStack() as stack:
            await auth.connect()
            await stack.enter_async_context(parts(auth, self.kit.settings(**self.settings)))
            await auth.start()
            stack.push_async_callback(auth.drain)
            self._ends.append(stack.pop_all())

    async def stop(self) -> None:
        await self._ends.pop(0).aclose()

    async def accepts(self, *api_keys: str) -> None:
        """Every replica lets these keys in: a queue group picks at random, so many times enough."""
        for api_key in api_keys:
            codes = {code(answer) for answer in await asyncio.gather(*(self.fleet.detect(api_key) for _ in range(24)))}
            assert codes == {"ok"}, codes

    async def refuses(self, *api_keys: str) -> None:
        for api_key in api_keys:
            codes = {code(answer) for answer in await asyncio.gather(*(self.fleet.detect(api_key) for _ in range(24)))}
            assert codes == {ErrorCode.INVALID_CREDENTIALS}, codes

    async def rotate(self, api_key: str) -> str:
        return result(await self.fleet.account(subjects.ACCOUNT_ROTATE, api_key), IssuedKey).api_key


@asynccontextmanager
async def rollout(kit: Kit, settings: dict[str, Any], replicas: int = 2) -> AsyncIterator[Rollout]:
    async with kit.players() as edge:
        rolled = Rollout(kit, edge, settings)
        try:
            for _ in range(replicas):
                await rolled.start()
            yield rolled
        finally:
            for end in rolled._ends:
                await end.aclose()


async def left(kit: Kit, settings: dict[str, Any]) -> list[str]:
    """The lines of `./run auth old-pepper`."""
    out = io.StringIO()
    await show_left(kit.settings(**settings), out)
    return out.getvalue().splitlines()


async def test_no_key_is_refused_at_any_step_of_an_exchange(kit: Kit) -> None:
    async with rollout(kit, BEFORE) as rolled:
        issued = [await rolled.fleet.register() for _ in range(3)]
        used = [key.api_key for key in issued]
        used.append(await rolled.rotate(used[0]))  # and the one before stays good for a while
        revoked = (await rolled.fleet.register()).api_key
        await rolled.fleet.account(subjects.ACCOUNT_REVOKE, revoked)
        idle = await rolled.fleet.register("idle")
        connection = await connect(kit.database_url)
        # As the release before wrote them.
        await connection.execute(
            "UPDATE api_keys SET pepper_id = NULL, previous_pepper_id = NULL WHERE key_id = $1", issued[1].record.key_id
        )
        await connection.close()
        for settings in (BOTH, SWAPPED):
            rolled.settings = settings
            for _ in range(2):
                await rolled.start()
                used.append((await rolled.fleet.register()).api_key)
                used.append(await rolled.rotate(used[-1]))
                await rolled.accepts(*used)
                await rolled.refuses(revoked)
                await rolled.stop()
                await rolled.accepts(*used)

        async def is_only_the_idle_one_left() -> bool:
            await rolled.accepts(*used)
            return (await left(kit, SWAPPED))[-1].endswith(": 1")

        await until(is_only_the_idle_one_left, "every key in use to be stored under the new pepper")
        shown = await left(kit, SWAPPED)
        assert shown[0].split() == [idle.record.key_id, "never", "used", "idle"]
        rolled.settings = AFTER
        for _ in range(2):
            await rolled.start()
            await rolled.accepts(*used)
            await rolled.stop()
        await rolled.accepts(*used)
        await rolled.refuses(revoked, idle.api_key)


async def test_a_key_moves_while_other_replicas_still_have_it_as_it_was(kit: Kit) -> None:
    """Nobody is told to forget it, and nobody has to be."""
    async with rollout(kit, BEFORE, replicas=1) as rolled:
        issued = await rolled.fleet.register()
        before = await stored(kit)
        rolled.settings = SWAPPED
        for _ in range(2):
            await rolled.start()
        await rolled.stop()
        # Both replicas have read it once this is done; one stores it anew.
        await rolled.accepts(issued.api_key)

        async def has_moved() -> bool:
            return await stored(kit) != before

        await until(has_moved, "the key to be stored under the new pepper")
        after = await stored(kit)
        for _ in range(5):
            await rolled.accepts(issued.api_key)
        assert await stored(kit) == after
        rotated = await rolled.rotate(issued.api_key)
        await rolled.accepts(issued.api_key, rotated)
        await rolled.fleet.account(subjects.ACCOUNT_REVOKE, rotated)

        async def is_refused() -> bool:
            answers = await asyncio.gather(*(rolled.fleet.detect(key) for key in (issued.api_key, rotated) for _ in range(12)))
            return {code(answer) for answer in answers} == {ErrorCode.INVALID_CREDENTIALS}

        await until(is_refused, "every replica to know of the revocation")
        await rolled.refuses(issued.api_key, rotated)


async def stored(kit: Kit) -> bytes:
    """The verifier of the only key."""
    connection = await connect(kit.database_url)
    verifier: bytes = await connection.fetchval("SELECT verifier FROM api_keys")
    await connection.close()
    return verifier
