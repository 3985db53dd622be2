"""The names the model knows."""

from __future__ import annotations

from typing import Final

THREATS: Final = ("jailbreak", "injection", "system_prompt_leak", "data_extraction", "encoding_attack", "delimiter_attack")
