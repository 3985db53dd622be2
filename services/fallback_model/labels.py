"""The names the model knows. The same as the bus's `ThreatType`; written again, since training needs nothing of the bus."""

from __future__ import annotations

from typing import Final, Literal

ThreatName = Literal["jailbreak", "injection", "system_prompt_leak", "data_extraction", "encoding_attack", "delimiter_attack"]
THREATS: Final[tuple[ThreatName, ...]] = (
    "jailbreak",
    "injection",
    "system_prompt_leak",
    "data_extraction",
    "encoding_attack",
    "delimiter_attack",
)
