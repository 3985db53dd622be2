"""`./run bench`: how fast the running stack answers, from a load generator that shares its machine.

A closed loop: each caller sends its next text when the last one has been answered, so a slow answer slows the load as well;
read the percentiles with that in mind. Texts are our own, short and long; nothing is cached between them.

`./run bench normaliser` times the normaliser alone, without a stack. `./run bench tracing` tells what traces and metrics cost.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
import time

import aiohttp
from rich import box
from rich.console import Console
from rich.table import Table

from infra.embedded.home import locate_home
from tests.bench import batch, footprint, normaliser, scale_out, tracing
from tests.bench.load import BenchError, Measured, issued_key, texts

WARM_UP_SECONDS = 1.0


async def measure(session: aiohttp.ClientSession, key: str, callers: int, seconds: float) -> Measured:
    """Load from this many callers for this long, after a warm-up that does not count."""
    measured = Measured(callers)
    supply = texts()
    began = time.perf_counter() + WARM_UP_SECONDS
    end = began + seconds

    async def caller() -> None:
        while (started := time.perf_counter()) < end:
            async with session.post(
                "/v1/detect", json={"text": f"{next(supply)} {secrets.token_hex(4)}"}, headers={"X-API-Key": key}
            ) as response:
                await response.read()
            finished = time.perf_counter()
            if began <= started:
                if response.status == 200:
                    measured.latencies.append((finished - started) * 1000)
                else:
                    measured.failures += 1

    await asyncio.gather(*(caller() for _ in range(callers)))
    measured.seconds = time.perf_counter() - began
    return measured


async def bench(url: str, token: str, levels: list[int], seconds: float) -> list[Measured]:
    """Measure each level with a key of its own, which is deleted afterwards."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector) as session:
        results = []
        for callers in levels:
            async with issued_key(session, token) as key:
                results.append(await measure(session, key, callers, seconds))
        return results


def main() -> int:
    if sys.argv[1:2] == ["normaliser"]:
        return normaliser.main(sys.argv[2:])
    if sys.argv[1:2] == ["batch"]:
        return batch.main(sys.argv[2:])
    if sys.argv[1:2] == ["footprint"]:
        return footprint.main(sys.argv[2:])
    if sys.argv[1:2] == ["scale-out"]:
        return scale_out.main(sys.argv[2:])
    if sys.argv[1:2] == ["tracing"]:
        return tracing.main(sys.argv[2:])
    port = os.environ.get("PORTCULLIS_EDGE_PORT", "8000")
    parser = argparse.ArgumentParser(
        prog="./run bench", description=__doc__, epilog="bench batch: many texts at a time; see bench batch --help"
    )
    parser.add_argument("--url", default=f"http://127.0.0.1:{port}", help="where the gateway is (default: %(default)s)")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 32], help="how many at a time (default: 1 8 32)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each level (default: 10)")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    try:
        token = os.environ.get("PORTCULLIS_ADMIN_TOKEN") or locate_home(dict(os.environ)).admin_token.read_text().strip()
        results = asyncio.run(bench(arguments.url, token, arguments.callers, arguments.seconds))
    except FileNotFoundError:
        print("bench: no admin token; start the stack with ./run up, or set PORTCULLIS_ADMIN_TOKEN", file=sys.stderr)
        return 1
    except (aiohttp.ClientError, BenchError) as error:
        print(f"bench: {error}; is the stack running (./run status)?", file=sys.stderr)
        return 1
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=f"{arguments.url}, {os.cpu_count()} processors, load generator included"
    )
    for title in ("callers", "requests/s", "median ms", "p99 ms", "answered", "failed"):
        table.add_column(title, justify="right")
    for one in results:
        shown = (f"{one.percentile(0.5):.1f}", f"{one.percentile(0.99):.1f}") if one.latencies else ("", "")
        rate = f"{len(one.latencies) / one.seconds:.0f}"
        table.add_row(str(one.callers), rate, *shown, str(len(one.latencies)), str(one.failures))
    console.print(table)
    return 0 if all(one.latencies and not one.failures for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
