"""Systems are measured by turns, round by round, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass

from tests.bench.figures import Stretch, arrivals
from tests.bench.generator import Work
from tests.bench.load import made
from tests.bench.systems import DISTINCT_REQUESTS, Stack, System, key_of, loaded

WARM_UP_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Options:
    """`seconds` of each stretch, `repeats` of each; `levels`: callers at a time, empty for those of the part; `together`: the
    stages share processes."""

    seconds: float = 3.0
    repeats: int = 3
    levels: tuple[int, ...] = ()
    together: bool = False


def closed(callers: int, seconds: float, connections: int = 0) -> Work:
    return lambda load: load.closed(callers, seconds, connections)


def opened(rate: float, seconds: float, seed: int = 7) -> Work:
    due = arrivals(rate, seconds, seed)
    return lambda load: load.open(due)


def rotated(count: int, number: int) -> list[int]:
    """In which order so many go in this round: each is first in turn, so that none always follows the same one."""
    return [(at + number) % count for at in range(count)]


async def in_turn(
    systems: Sequence[System],
    work: Mapping[str, Work],
    repeats: int,
    warm_up: Work,
    each_round: Callable[[], Awaitable[None]] | None = None,
) -> dict[str, list[Stretch]]:
    """What each system's `work` came to, `repeats` times, by its name; each time after a warm-up that does not count.

    Those whose turn it is not are at rest. `each_round`: what else is measured before every round and after the last, while all
    are.
    """
    found: dict[str, list[Stretch]] = {system.name: [] for system in systems}

    async def around() -> None:
        if each_round is not None:
            with _at_rest(systems):
                await each_round()

    for number in range(repeats):
        await around()
        for at in rotated(len(systems), number):
            system = systems[at]
            with _at_rest([other for other in systems if other is not system]):
                await warm_up(system.load)
                found[system.name].append(await system.measure(work[system.name]))
    await around()
    return found


@contextmanager
def _at_rest(systems: Sequence[System]) -> Iterator[None]:
    with ExitStack() as resting:
        for system in systems:
            resting.enter_context(system.at_rest())
        yield


async def side_by_side(stacks: Mapping[str, Stack], callers: int, seconds: float, repeats: int) -> dict[str, list[Stretch]]:
    """What came of two stacks under the same closed loop, by turns, by their names."""
    supply = made(DISTINCT_REQUESTS)
    async with AsyncExitStack() as entered:
        systems = []
        for name, stack in stacks.items():
            key = await entered.enter_async_context(key_of(stack))
            systems.append(await entered.enter_async_context(loaded(name, stack.port, stack.cpu, supply, [key])))
        work = dict.fromkeys(stacks, closed(callers, seconds))
        return await in_turn(systems, work, repeats, closed(callers, WARM_UP_SECONDS))
