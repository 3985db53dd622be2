"""Configuration of a worker, from `PORTCULLIS_MODEL_*`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from libs.common.settings import CommonSettings
from libs.common.subjects import DEFAULT_POOL
from services.fallback_model.paths import DEFAULT_MODEL


class FallbackModelSettings(CommonSettings):
    """What a worker of a model pool reads, beside what every service does."""

    model_config = SettingsConfigDict(protected_namespaces=())

    model_dir: Path = DEFAULT_MODEL
    """A directory of this project's form, or a Hugging Face export for sequence classification. SIGHUP reads it again."""
    model_pool: Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,32}$")] = DEFAULT_POOL
    """The pool that this worker belongs to: it takes texts from `model.v1.<pool>`."""
    model_bulk_only: bool = False
    """Take the texts of batches and jobs only, beside workers of the same pool that take both."""
    model_sessions: Annotated[int, Field(ge=0, le=64)] = 0
    """Sessions that score batches side by side; 0: by the processors that this container may use."""
    model_threads: Annotated[int, Field(ge=0, le=64)] = 0
    """Threads of each session; 0: what is left of the processors."""
    model_batch_tokens: Annotated[int, Field(ge=128)] = 256
    """Tokens of one batch, padding included."""
    model_queue_tokens: Annotated[int, Field(ge=1024)] = 65_536
    """Tokens that may wait; from then on the worker answers that it is busy."""
    model_bulk_batch_tokens: Annotated[int, Field(ge=128)] = 512
    """As `model_batch_tokens`, for the texts of batches and jobs, whose threads give way to single texts."""
    model_bulk_queue_tokens: Annotated[int, Field(ge=1024)] = 65_536
    """As `model_queue_tokens`, for the texts of batches and jobs, which have a queue of their own."""
    model_wait_ms: Annotated[float, Field(ge=0, le=100)] = 0.5
    """How long a free session waits for more texts when those at hand do not fill a batch."""
