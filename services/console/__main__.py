"""`python -m services.console`."""

from libs.common.service import run
from services.console.app import SERVICE

if __name__ == "__main__":
    run(SERVICE)
