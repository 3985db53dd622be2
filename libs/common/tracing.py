"""Which trace the present work belongs to."""

from __future__ import annotations


def current_trace_id() -> str | None:
    """The id (32 hexadecimal digits) of the trace that the present work belongs to, if that trace is kept; else None."""
    return None
