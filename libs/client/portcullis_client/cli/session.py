"""What all commands share: where the gateway is, exit codes, and the one place where errors become a line."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import click

from portcullis_client import errors
from portcullis_client.cli import terminal
from portcullis_client.client import Client
from portcullis_client.core import ADMIN_VARIABLE, KEY_VARIABLE, URL_VARIABLE
from portcullis_client.errors import PortcullisError
from portcullis_client.retries import Notice, Retry

BENIGN = 0
MALICIOUS = 1
USAGE = 2
NOT_JUDGED = 3
INTERRUPTED = 130

_PATIENT = Retry(attempts=3)
"""People who see nothing happen would rather know why."""
_TOLD_SECONDS = 1.0

EXIT_CODES = """\b
Exit codes:
    0  everything benign       2  usage, or a file that cannot be used
    1  something malicious     3  no verdict: refused, away, or failed
                             130  interrupted"""


class Complaint(click.ClickException):
    """A command cannot go on; the text says why and what to do, in one line."""

    exit_code = USAGE

    def show(self, file: Any = None) -> None:
        terminal.say(f"portcullis: {self.message}", "red")


@dataclass(frozen=True, slots=True)
class Session:
    """`url` None: from the environment."""

    url: str | None
    timeout_seconds: float

    def client(self, *, retry: Retry | None = None, on_wait: Notice | None = None) -> Client:
        """Raises `Complaint` when what the environment says is of no use."""
        try:
            return Client(self.url, timeout_seconds=self.timeout_seconds, retry=retry or _PATIENT, on_wait=on_wait or tell_wait)
        except ValueError as error:
            said = str(error)
            raise Complaint(said[0].lower() + said[1:]) from None


pass_session = click.make_pass_decorator(Session)


def reason(error: PortcullisError) -> str:
    """Why a pause is made, in a word or two."""
    match error:
        case errors.RateLimitedError():
            return "the key's rate limit is used up"
        case errors.OverloadedError():
            return "the gateway is full"
        case errors.ConnectionFailedError():
            return "the gateway cannot be reached"
    return "the gateway cannot judge now"


def tell_wait(error: PortcullisError, seconds: float) -> None:
    if seconds >= _TOLD_SECONDS:
        terminal.say(f"portcullis: {reason(error)}; trying again in {duration(seconds)}", "dim")


def line_of(error: PortcullisError) -> str:
    """An error as one line, with what to do about it."""
    said = terminal.printable(str(error)).rstrip(".")
    match error:
        case errors.InvalidCredentialsError() if not os.environ.get(KEY_VARIABLE):
            said = f"no API key: set {KEY_VARIABLE}; `portcullis keys register NAME` issues one"
        case errors.InvalidCredentialsError():
            said = f"the key in {KEY_VARIABLE} is not valid: mistyped, revoked, expired or of another gateway"
        case errors.ForbiddenError() if not os.environ.get(ADMIN_VARIABLE):
            said += f"; set {ADMIN_VARIABLE}"
        case errors.ConnectionFailedError() if not error.sent:
            said += f"; is the gateway up, and {URL_VARIABLE} right?"
        case errors.RateLimitedError() if error.retry_after:
            said += f"; try again in {duration(error.retry_after)}"
    if error.request_id is None or isinstance(error, errors.InvalidCredentialsError):
        return said
    return f"{said} (request id {error.request_id})"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def run(command: click.Command, arguments: list[str] | None = None) -> int:
    """Run the command line; returns its exit code. No error ends in a traceback, unless it is a bug."""
    try:
        code: object = command.main(arguments, prog_name="portcullis", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.Abort:
        terminal.say("portcullis: interrupted")
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except KeyboardInterrupt:
        terminal.say("portcullis: interrupted")
        return INTERRUPTED
    except PortcullisError as error:
        terminal.say(f"portcullis: {line_of(error)}", "red")
        return NOT_JUDGED
    except SystemExit:  # how click ends when the reader (head, less) has seen enough
        return NOT_JUDGED
    except OSError as error:
        terminal.say(f"portcullis: {error.filename or 'a file'}: {error.strerror}", "red")
        return USAGE
