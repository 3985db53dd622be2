"""One target under atheris, in a process of its own: `python -m tests.fuzz.drive TARGET HOME [options of libFuzzer]`.

Imports nothing of what is fuzzed before it can be instrumented.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import atheris

from tests.fuzz.targets import TARGETS, found


def main() -> None:
    name, home, *options = sys.argv[1:]
    target = TARGETS[name]
    with atheris.instrument_imports(include=list(target.instrument)):
        module = importlib.import_module(target.module)
    for guide in getattr(module, "GUIDES", ()):
        atheris.instrument_func(guide)
    options += [f"-max_len={target.most_bytes}", *_prepare(module, Path(home))]
    if found(name).exists():
        options.append(str(found(name)))
    atheris.Setup([sys.argv[0], *options], module.run)
    atheris.Fuzz()


def _prepare(module: ModuleType, home: Path) -> list[str]:
    """Write down what the fuzzer begins with; what it finds worth keeping goes into the first of the folders named."""
    corpus, seeds, words = home / "corpus", home / "seeds", home / "words"
    for folder in (corpus, seeds):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(module.seeds()):
        (seeds / str(number)).write_bytes(seed)
    options = [f"-artifact_prefix={home}/", str(corpus), str(seeds)]
    if hasattr(module, "words"):
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in module.words()))
        options.append(f"-dict={words}")
    return options


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode())


if __name__ == "__main__":
    main()
