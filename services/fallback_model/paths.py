"""Where things are."""

from __future__ import annotations

from pathlib import Path
from typing import Final

DEFAULT_MODEL: Final = Path(__file__).parent / "models" / "portcullis-minilm-v1"
