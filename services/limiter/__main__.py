"""`python -m services.limiter`."""

from libs.common.service import run
from services.limiter.app import SERVICE

if __name__ == "__main__":
    run(SERVICE)
