"""The shipped model behind LitServe, with its batching on: `python -m tests.bench.lit PORT WORKERS BATCH WAIT`.

Runs in an environment of its own (tests/bench/litserve.txt). The normaliser, the tokenizer, the windows, the network and the
judgement are those of Portcullis; only what brings a text to them and the answer back is LitServe's. Texts of a batch are sorted
by length and cut by tokens before the network, as Portcullis does it.
"""

import sys
from typing import Any

import litserve
import numpy as np

from services.fallback_model.engine import Scores
from services.fallback_model.model import Detection, Model, Prepared
from services.fallback_model.paths import DEFAULT_MODEL
from tests.bench.alone import by_tokens

TOKENS = 1024
THRESHOLD = 0.5


class Judge(litserve.LitAPI):
    """One worker: one session of one thread."""

    def setup(self, device: Any) -> None:
        self.model = Model(DEFAULT_MODEL, 1, 1)

    def decode_request(self, request: dict[str, Any]) -> Prepared:
        return self.model.prepare(request["text"])

    def batch(self, inputs: list[Prepared]) -> list[Prepared]:
        return inputs

    def predict(self, x: list[Prepared]) -> list[Detection]:
        session = self.model.sessions[0]
        owners = sorted(
            ((at, row) for at, one in enumerate(x) for row in range(len(one.rows))), key=lambda o: len(x[o[0]].rows[o[1]])
        )
        batches = by_tokens([x[at].rows[row] for at, row in owners], TOKENS)
        found = [session.run(rows) for rows in batches]
        logits, threats = np.concatenate([one.logits for one in found]), np.concatenate([one.threats for one in found])
        places: list[list[int]] = [[0] * len(one.rows) for one in x]
        for where, (at, row) in enumerate(owners):
            places[at][row] = where
        return [self.model.judge(one, Scores(logits[mine], threats[mine])) for one, mine in zip(x, places, strict=True)]

    def unbatch(self, output: list[Detection]) -> list[Detection]:
        return output

    def encode_response(self, output: Detection) -> dict[str, Any]:
        return {
            "is_malicious": output.probability >= THRESHOLD,
            "confidence": output.probability,
            "threat_types": list(output.threats),
        }


if __name__ == "__main__":
    port, workers, most, wait = sys.argv[1:]
    api = Judge(max_batch_size=int(most), batch_timeout=float(wait))
    litserve.LitServer(api, accelerator="cpu", workers_per_device=int(workers), timeout=30).run(
        host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning"
    )
