"""docs/operations/faults.md, made from the matrix: `python -m tests.chaos.faults_page` writes it."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.matrix import CELLS, COMPONENTS, FAULTS, NAMES, NOT_SENSIBLE

PAGE = Path(__file__).parents[2] / "docs" / "operations" / "faults.md"

HEAD = """# What breaks, and what happens then

Every component by every fault: what callers see, what whoever operates it does, and the test that shows it. In every one of these
tests a steady load of texts with known right answers runs, and this holds:

- no wrong verdict, and no verdict of another text; every answer carries the id of its own request;
- no answer later than 100 ms after the caller's deadline (the tests grant 400 ms more to a caller on the same two processors);
- no status but those of the contract; every 429 and 503 says when to come back (`Retry-After`);
- 5 s after the fault all is as before (the tests grant 2 s more for the start of a Python process, and
  as many times that as there are others who want each processor);
- a job that was accepted before the fault has every one of its results afterwards (†).

While answers come at the deadline only, some callers get 429 `overloaded` at once instead: what waits takes the room.

The whole matrix was last played on two processors with nothing else on them: one scenario of it failed,
`detector_proxy-clock_skew`, where all was as before only 16 s after the clock was right again (the promise is 5). Since then
no stage's clock decides how much time a request has ([ADR 12](../adr/0012-the-time-left-travels-beside-the-deadline.md)). The
scenarios with wrong clocks were played again on two processors that others used as well (a load of 4 to 6): with a proxy
whose clock was an hour slow there were verdicts, and all was as before 5.1 s after the clock was right, the start of the
process included. Of the seven one failed, `auth-clock_skew`: 3 of 300 calls got 429 while auth had just been started, which it
did not allow then and does now. Played again it passed: as before after 3.3 s.

Of the storms ten minutes each were played, 50 requests a second, two of each service, one harm every 5 s on the stroke, on the
same two processors with a little other work beside them. 120 kills: of 30 100 calls nine lost their connection with an edge, and
all others had their verdict; there were two of each again after 2.6 s in the median and 5.0 s at most. 120 pauses of 3 s: 30 100
calls, none failed, 1.2 % of them judged by the fallback model; nothing was executed after its deadline. A rolling restart of
everything: 2 544 calls, none failed. PostgreSQL away: known keys noticed nothing for 29 s, and were refused then. NATS restarted,
once with notice and once without: whole again after 0.4 s, and nothing executed late. On a machine with a load of 12 and more,
where a process takes up to a minute to start, a storm of kills for 90 s gave 6.4 % of 503 where at most 1 % is promised, and a
rolling restart many failures.

Of 10 000 callers who left in the middle, 100 at a time on the same two processors, nothing stayed: open files, connections and
tasks of each process were what they had been, but for the limiter's connections to Redis, of which it keeps up to five.

What is said here is of one replica of each. Of two, the other one goes on: a killed replica is not noticed by callers ([ADR
2](../adr/0002-a-request-is-sent-again-when-a-stage-dies.md)), and a hung one only by those whose requests it had.

Tests in *italics* run by `./run chaos` alone, which plays the whole matrix and then the storms (two replicas of each service,
a random one killed, or paused for 3 s, every 5 s, whether or not all is whole again by then; a rolling restart of everything;
PostgreSQL away for longer than keys are believed; NATS restarted), and lets 10 000 callers leave in the middle of what they
do. They are scenarios of `tests/chaos/matrix.py`: `./run chaos -k nats-partition`. `./run soak` uses a stack for half an
hour, in which no process may grow by 1 MB a minute.

The soak was played with other work beside it: no service grew by more than 0.12 MB a minute in its second half, PostgreSQL and
Redis by less than 0.1, NATS by 0.75 (28 to 40 MB): **met**. A heap profile showed what the first of its steps was, after five
minutes: the block of a stream that it writes to is in memory as a whole, in buffers of 1, 4 and 8 MB as it fills up; after 8 MB
a new one begins. The embedded NATS runs with `GOGC=25`, so that there is not as much garbage beside; with Go's 100 it was
1.07 MB a minute.

What callers send that they should not has a list of its own, with what comes back of it: `tests/bad_inputs.py`, of which
every row is played against a running stack in every test run.

<!-- Made from tests/chaos/matrix.py by `python -m tests.chaos.faults_page`; do not edit. -->
"""

TAIL = """
## Not tried

| component | fault | why |
|---|---|---|
"""


def render() -> str:
    parts = [HEAD]
    for component in COMPONENTS:
        name = NAMES.get(component, component)
        parts.append(f"\n## {name}\n\n| fault | callers see | do | test |\n|---|---|---|---|\n")
        for fault in FAULTS:
            scenario = CELLS.get((component, fault))
            if scenario is None:
                continue
            test = f"`{scenario.name}`"
            test = test if scenario.short else f"*{test}*"
            parts.append(f"| {fault} | {scenario.callers} | {scenario.operator} | {test}{' †' if scenario.job else ''} |\n")
    parts.append(TAIL)
    parts += [f"| {NAMES.get(component, component)} | {fault} | {why} |\n" for (component, fault), why in NOT_SENSIBLE.items()]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render())
