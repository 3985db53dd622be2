"""`python -m services.fallback_model`: one worker."""

from libs.common.service import run
from services.fallback_model.app import SERVICE

if __name__ == "__main__":
    run(SERVICE)
