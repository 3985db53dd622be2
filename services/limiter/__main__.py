"""`python -m services.limiter`."""

from libs.common.service import run
from services.limiter.app import parts
from services.limiter.settings import Settings

run("limiter", Settings, parts)
