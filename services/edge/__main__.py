"""`python -m services.edge`."""

from libs.common.service import run
from services.edge.app import SERVICE

if __name__ == "__main__":
    run(SERVICE)
