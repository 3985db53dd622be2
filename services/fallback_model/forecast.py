"""How long what waits will take, by what was done lately. No I/O."""

from __future__ import annotations

from typing import Final

_REMEMBERED: Final = 0.9
"""What a measurement weighs after the next one: some twenty of them count."""


class Speed:
    """Units of work a second: exponentially weighted work over time weighted alike, so that a large piece weighs more.

    Nothing is predicted before the first measurement.
    """

    def __init__(self) -> None:
        self._units = 0.0
        self._seconds = 0.0

    def add(self, units: float, seconds: float) -> None:
        """So many units took so many seconds."""
        self._units = _REMEMBERED * self._units + units
        self._seconds = _REMEMBERED * self._seconds + seconds

    @property
    def per_second(self) -> float:
        """0.0 while nothing is known."""
        return self._units / self._seconds if self._seconds > 0 else 0.0

    def seconds_for(self, units: float) -> float:
        """How long so many units will take; 0.0 while nothing is known."""
        return units * self._seconds / self._units if self._units > 0 else 0.0
