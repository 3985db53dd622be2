"""Services on one machine, under the supervisor of the embedded stack: `python -m tests.cluster.host HOME < JSON`.

What is read: `environment`, as `./run up` would have it, with a URL for each server; `users`: the password of each service's NATS
user; `services`: how many of which. Returns when the supervisor has been started.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

from infra.embedded import control, stack
from infra.embedded.home import HOME_VARIABLE, open_home


def main() -> None:
    given = json.load(sys.stdin)
    home = open_home({HOME_VARIABLE: sys.argv[1]})
    scale: dict[str, int] = given["services"]
    planned = stack.plan(home, given["environment"], {name: count for name, count in scale.items() if count})
    programs = [
        replace(
            program,
            environment={
                **program.environment,
                "PORTCULLIS_NATS_USER": program.name,
                "PORTCULLIS_NATS_PASSWORD": given["users"][program.name],
            },
        )
        for program in planned.programs
        if scale.get(program.name)
    ]
    stack.write(home, replace(planned, programs=tuple(programs)))
    control.start_supervisor(home, die_with_parent=False)


if __name__ == "__main__":
    main()
