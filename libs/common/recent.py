"""Percentiles of the durations of the last seconds, in little memory and with little work for each message."""

from __future__ import annotations

from typing import Final

SLOT_NS: Final = 2_000_000_000
SLOTS: Final = 5
"""Durations of the last 8 to 10 s are kept: the slot that is being filled, and the four before it."""

_PARTS: Final = 8
"""Buckets per doubling: a percentile is off by at most half a bucket, 1/16 of its value."""
_TOP: Final = 239
"""The bucket of an hour and everything above."""


def bucket_of(duration_ns: int) -> int:
    """The bucket of a duration: whole microseconds up to 8, then eight to each power of two."""
    microseconds = duration_ns // 1000
    if microseconds < _PARTS:
        return max(0, microseconds)
    bits = microseconds.bit_length()
    return min(_TOP, _PARTS * (bits - 3) + (microseconds >> (bits - 4)) % _PARTS)


def middle_ms(bucket: int) -> float:
    """The middle of a bucket, in milliseconds."""
    if bucket < _PARTS:
        return (bucket + 0.5) / 1000
    width = 1 << (bucket // _PARTS - 1)
    return ((_PARTS + bucket % _PARTS) + 0.5) * width / 1000


class RecentDurations:
    """Times are of one monotonic clock, in nanoseconds."""

    __slots__ = ("_slots",)

    def __init__(self) -> None:
        self._slots: list[tuple[int, dict[int, int]]] = []  # (which slot, how many in each bucket), oldest first

    def add(self, duration_ns: int, now_ns: int) -> None:
        number = now_ns // SLOT_NS
        slots = self._slots
        if not slots or slots[-1][0] != number:
            slots.append((number, {}))
            if len(slots) > SLOTS:
                del slots[0]
        counts = slots[-1][1]
        bucket = bucket_of(duration_ns)
        counts[bucket] = counts.get(bucket, 0) + 1

    def percentile_ms(self, share: float, now_ns: int) -> float | None:
        """The duration that `share` (0 to 1) of the recent messages did not exceed; None when there were none."""
        oldest = now_ns // SLOT_NS - SLOTS + 1
        counts: dict[int, int] = {}
        for number, slot in self._slots:
            if number >= oldest:
                for bucket, count in slot.items():
                    counts[bucket] = counts.get(bucket, 0) + count
        left = share * sum(counts.values())
        for bucket in sorted(counts):
            left -= counts[bucket]
            if left <= 0:
                return middle_ms(bucket)
        return None
