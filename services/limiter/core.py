"""The sliding-window rule, and what follows from it: who is admitted, and when a refused caller may come back.

The rule, for one window of `seconds` W and one key with a limit L:

* Admitted units are counted in slots. A slot opens at an admission, takes every unit admitted within `width` = W / 64 after it,
  and remembers the time of its *last* admission.
* A slot's units are free again `span` = W + guard after that last admission, all at once.
* A call of cost n is admitted when the units in all slots plus n are at most L, in every window; otherwise it costs nothing.
  A partial call takes as much of n as that allows, and is never refused: whoever paces work by it has not overrun anything.

Never more than L in W. Take any half-open span of W that holds admitted units, and let t be the last admission in it. Every
other unit in the span was admitted after t - W, its slot's last admission is no earlier, so its slot had not been freed at t
(that happens `span` > W after). Hence all of them were in the sum that was found to be at most L at t.

At most 2 % less than L per W. Let a call of cost n be refused at t. More than L - n units are in slots whose last admission is
after t - span, so all of them were admitted after t - span - width: every stretch of span + width that ends in a refusal holds
more than L - n units. For single units that is a rate of at least L / (span + width), and with width = W / 64 and guard ≤ W / 400
    (span + width) / W ≤ 1 + 1/64 + 1/400 + 1/1000 < 1.0192,   1 / 1.0192 > 0.981
(1/1000: times are whole milliseconds and W ≥ 1 s). For cost n the one more term is n / L: what no batch of that size could fill.

The guard is there for callers who measure: they see a span between two of *their own* readings, shorter than the limiter's by
what the first answer took longer than the second. 0.15 s in a minute covers that without costing a noticeable share.

Memory is constant. Slots that open are at least `width` apart and live for less than span + width, so there are at most
⌈(span + width) / width⌉ ≤ 68 of them in each window whatever the limit is.

Time is in whole milliseconds. A clock that steps back (a failover to a replica whose clock is behind) makes a state's own time
stand still, then go on from there: nothing is freed early, and nothing is stuck. A clock that jumps ahead frees units early, by
as much as it jumped; there is nothing to tell it from time that has passed.

`lua.py` is this rule again, to be run inside Redis; one suite of tests holds them together.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import random
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

SLOTS_PER_WINDOW = 64
MAX_LIMIT = 2**32 - 1
"""Units are kept as 32-bit numbers; a higher limit counts as this one."""
REFUSALS_KEPT = 31
"""One more than the last band of Retry-After begins with: beyond that, how many more makes no difference."""

_GUARD_MS = 150
_GUARD_SHARE = 400


@dataclass(frozen=True, slots=True)
class Window:
    """A window of whole milliseconds. `span_ms`: after how long a unit is free again. `width_ms`: what a slot covers."""

    span_ms: int
    width_ms: int

    @classmethod
    def of(cls, seconds: float) -> Window:
        """The window of `seconds` (≥ 1)."""
        if seconds < 1:
            raise ValueError("a window is at least one second")
        milliseconds = round(seconds * 1000)
        # One millisecond more, because an admission is recorded up to one millisecond before it happened.
        guard = min(_GUARD_MS, milliseconds // _GUARD_SHARE) + 1
        return cls(milliseconds + guard, max(1, milliseconds // SLOTS_PER_WINDOW))


@dataclass(frozen=True, slots=True)
class Policy:
    """Which windows limit a key, shortest first. Refusals are counted over the first."""

    windows: tuple[Window, ...]

    @classmethod
    def of(cls, *seconds: float) -> Policy:
        return cls(tuple(Window.of(each) for each in seconds))


PER_KEY = Policy.of(60, 86_400)
PER_ADDRESS = Policy.of(3_600)


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of a call, by window where there are several.

    `used`: units that count against the limit after this call. `reset_ms`: milliseconds until a unit is free, 0 when one is.
    `refused`: calls refused within the first window, this one included, up to `REFUSALS_KEPT`. `granted`: units that were taken;
    a partial call may have been granted none and is admitted all the same.
    """

    admitted: bool
    used: tuple[int, ...]
    reset_ms: tuple[int, ...]
    refused: int
    granted: int


class _Slots:
    """The admitted units of one key in one window."""

    __slots__ = ("counts", "last_ms", "opened_ms", "total")

    def __init__(self) -> None:
        self.total = 0
        self.opened_ms = 0
        self.last_ms = array("q")
        self.counts = array("q")

    def expire(self, now_ms: int, window: Window) -> None:
        last = self.last_ms
        limit = now_ms - window.span_ms
        if last and last[0] <= limit:
            gone = bisect_right(last, limit)
            self.total -= sum(self.counts[:gone])
            del last[:gone], self.counts[:gone]

    def add(self, units: int, now_ms: int, window: Window) -> None:
        self.total += units
        if self.last_ms and now_ms - self.opened_ms < window.width_ms:
            self.last_ms[-1] = now_ms
            self.counts[-1] += units
        else:
            self.opened_ms = now_ms
            self.last_ms.append(now_ms)
            self.counts.append(units)

    def reset_ms(self, limit: int, now_ms: int, window: Window) -> int:
        """Milliseconds until the total is below `limit`; a whole span when it can never be."""
        excess = self.total - limit
        if excess < 0:
            return 0
        for last_ms, count in zip(self.last_ms, self.counts, strict=True):
            excess -= count
            if excess < 0:
                return last_ms + window.span_ms - now_ms
        return window.span_ms


class KeyState:
    """Everything that is known of one key. At most 2 · 68 slots and 31 times, whatever the limits are."""

    __slots__ = ("_now_ms", "_refusals", "_skew_ms", "_slots", "apart", "synced")

    def __init__(self, policy: Policy) -> None:
        self._slots = tuple(_Slots() for _ in policy.windows)
        self._refusals = array("q")
        self._now_ms = 0
        self._skew_ms = 0
        self.synced = 0
        """For whoever keeps this state beside another one: up to which turn the two are in line."""
        self.apart = 0
        """Likewise: in which turn this one was last used without the other."""

    def used(self, policy: Policy, clock_ms: int) -> tuple[int, ...]:
        """Units in use now, by window."""
        self._advance(policy, clock_ms)
        return tuple(slots.total for slots in self._slots)

    def record(self, policy: Policy, cost: int, used: Sequence[int], clock_ms: int) -> None:
        """Follow a decision that was made elsewhere: `cost` units were admitted, and with them `used` are in use."""
        now_ms = self._advance(policy, clock_ms)
        if cost:
            for slots, window in zip(self._slots, policy.windows, strict=True):
                slots.add(cost, now_ms, window)
        self._raise_to(policy, used, now_ms)

    def decide(
        self,
        policy: Policy,
        limits: Sequence[int],
        cost: int,
        clock_ms: int,
        known: Sequence[int] | None = None,
        *,
        partial: bool = False,
    ) -> Decision:
        """Admit `cost` units in every window or in none (`partial`: as many of them as fit into all); cost 0 only looks.

        `known`: units that at least are in use, whatever this state says; what is missing counts as admitted now.
        """
        now_ms = self._advance(policy, clock_ms)
        if known is not None:
            self._raise_to(policy, known, now_ms)
        if partial:
            room = min(limit - slots.total for slots, limit in zip(self._slots, limits, strict=True))
            cost = max(0, min(cost, room))
        admitted = cost == 0 or all(slots.total + cost <= limit for slots, limit in zip(self._slots, limits, strict=True))
        if not admitted:
            self._refusals.append(now_ms)
            if len(self._refusals) > REFUSALS_KEPT:
                del self._refusals[0]
        elif cost:
            for slots, window in zip(self._slots, policy.windows, strict=True):
                slots.add(cost, now_ms, window)
        return Decision(
            admitted,
            tuple(slots.total for slots in self._slots),
            tuple(
                slots.reset_ms(limit, now_ms, window)
                for slots, limit, window in zip(self._slots, limits, policy.windows, strict=True)
            ),
            len(self._refusals),
            cost if admitted else 0,
        )

    def _advance(self, policy: Policy, clock_ms: int) -> int:
        """This state's own time, which never goes back; whatever is over by then is gone."""
        now_ms = clock_ms + self._skew_ms
        if now_ms < self._now_ms:
            self._skew_ms += self._now_ms - now_ms
            now_ms = self._now_ms
        self._now_ms = now_ms
        for slots, window in zip(self._slots, policy.windows, strict=True):
            slots.expire(now_ms, window)
        refusals = self._refusals
        if refusals and refusals[0] <= now_ms - policy.windows[0].span_ms:
            del refusals[: bisect_right(refusals, now_ms - policy.windows[0].span_ms)]
        return now_ms

    def _raise_to(self, policy: Policy, used: Sequence[int], now_ms: int) -> None:
        for slots, window, units in zip(self._slots, policy.windows, used, strict=True):
            if units > slots.total:
                slots.add(units - slots.total, now_ms, window)


class KeyStates:
    """The states of the most recently seen keys: at most `max_keys`, some 2 KB each at the worst.

    A key that has been pushed out begins anew.
    """

    def __init__(self, policy: Policy, max_keys: int) -> None:
        self._policy = policy
        self._max_keys = max_keys
        self._states: OrderedDict[str, KeyState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def get(self, key: str) -> KeyState:
        """The state of `key`, made when there is none; it is now the most recently seen."""
        state = self._states.get(key)
        if state is None:
            state = self._states[key] = KeyState(self._policy)
            if len(self._states) > self._max_keys:
                self._states.popitem(last=False)
        else:
            self._states.move_to_end(key)
        return state


# Retry-After, in seconds, by how many calls were refused within the window: up to how many, and the band.
RETRY_BANDS = ((10, 1.0, 3.0), (30, 3.0, 8.0), (None, 8.0, 15.0))
RETRY_JITTER = 0.3


def retry_after_seconds(refused: int, rng: random.Random) -> int:
    """A hint for backing off: anywhere in the band for `refused` calls, ±30 %, in whole seconds, at least 1."""
    low, high = next((low, high) for most, low, high in RETRY_BANDS if most is None or refused <= most)
    seconds = rng.uniform(low, high) * rng.uniform(1 - RETRY_JITTER, 1 + RETRY_JITTER)
    # Rounding must not leave what jitter can reach: 10.4 s is the most of the second band, so 10 and not 11.
    lowest, highest = math.ceil(low * (1 - RETRY_JITTER)), math.floor(high * (1 + RETRY_JITTER))
    return min(max(round(seconds), lowest), highest)


def address_key(address: str) -> str:
    """The name under which an address is counted: a hash, of an IPv6 address' /64, as that is what one subscriber is given."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        network = address
    else:
        if isinstance(parsed, ipaddress.IPv6Address):
            mapped = parsed.ipv4_mapped
            network = str(mapped) if mapped else str(ipaddress.ip_network((int(parsed), 64), strict=False))
        else:
            network = str(parsed)
    return hashlib.sha256(network.encode(errors="replace")).hexdigest()[:32]
