"""`python -m services.console`."""

from libs.common.service import run
from services.console.app import front
from services.console.settings import ConsoleSettings

if __name__ == "__main__":
    run("console", ConsoleSettings, front=front)
