"""`python -m services.detector_proxy`."""

from libs.common.service import run
from services.detector_proxy.app import SERVICE

if __name__ == "__main__":
    run(SERVICE)
