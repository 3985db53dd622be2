"""`python -m services.edge`."""

from libs.common.service import run
from services.edge.app import front
from services.edge.settings import EdgeSettings

if __name__ == "__main__":
    run("edge", EdgeSettings, front=front)
