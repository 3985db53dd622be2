# ruff: noqa: E501  # the card is prose, wrapped as its reader will see it
"""The model card: what the model is, what it was made from, what it can and cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from services.fallback_model.training.release import Figures

_TEXT = """# {name}

Tells whether a text tries to take over, jailbreak or pump out the language model it is meant for, and names the kind of
attempt. It is the engine of Portcullis' fallback pool.

- **Form**: all-MiniLM-L6-v2 (a BERT of 6 layers, 384 wide, 22.7 million parameters; of its English WordPiece vocabulary 9 500
  unused pieces gave way to pieces of 26 other languages), aligned on translations, then fine-tuned; the first
  token's state, the mean and the maximum over tokens go into two linear heads: malicious or not, and six threat types. The logit of a
  linear model on hashed n-grams of tokens (a million weights) is added to that for malicious. ONNX, weights
  rounded to 7 bits of int8 per channel, activations to 8 bits with fixed scales: a text's result does not depend on its neighbours.
- **Input**: windows of {max_tokens} tokens that overlap by {overlap}. Every text is spelt in ASCII first (look-alikes folded, other
  scripts transliterated by `anyascii`), as the vocabulary is.
- **Output**: `logit` [rows] and `threats` [rows, 6]. A text's logit is that of its worst window less {window_penalty} x ln(windows).
- **Probability**: sigmoid({scale:.4f} x logit + {shift:.4f}), Platt scaling fitted on `valid`.
- **Threshold**: {threshold:.4f}, the probability that at most 1 % of the benign texts of `valid` reach. It is used when a request names
  none. A request's own `confidence_threshold` (say 0.5) is compared with the same probability.

## Figures
At the shipped threshold; `valid` is from the sources of the training data, the others are not.

| set | recall | false alarms | ROC AUC | int8 less float32, AUC |
|---|---|---|---|---|
{lines}

Fitted and judged on different fifths of `valid`: calibration error (ECE, 15 bins) {ece:.4f}, false alarms {false_alarms:.4f}, recall
{recall:.4f}, macro F1 of the threat types on malicious texts {threat_f1:.4f}. Benign documents of 20 000 characters, each put
together from texts of one source of `valid`: {long:.3f} of them raise a false alarm.

## Data and licences
Trained on 50 902 labelled texts of 42 sources, among them: deepset prompt-injections (Apache-2.0), HackAPrompt, gandalf, mosscap, garak,
spikee, SPML, in-the-wild jailbreaks, LLMail-Inject, neuralchemy (MIT or Apache-2.0), WildGuardMix (ODC-BY 1.0); benign: Dolly (CC BY-SA
3.0), UltraChat (MIT), OASST1, XQuAD (CC BY-SA 4.0), CLINC150 (CC BY 3.0), BANKING77, Taskmaster (CC BY 4.0), awesome-chatgpt-prompts
(CC0-1.0) and software documentation (BSD-3-Clause, Apache-2.0, MIT); and on texts made for this project during training: a grammar of English
attacks and harmless look-alikes, texts written by hand in English and 29 other languages and translations into 21 of them (`training/texts`),
carriers with and without an attack, small damage and encodings. The encoder was aligned on 370 000 translated sentences of the help and
the interface of LibreOffice (MPL-2.0), GNOME (CC BY-SA 3.0, GPL-2+) and MediaWiki (GPL-2+), of the Debian Administrator's Handbook (GPL-2+ or
CC BY-SA 3.0), of the descriptions of Debian's packages and of Element's interface (Apache-2.0). No text is contained in the release. The base model is Apache-2.0; the weights are released under Apache-2.0.

Training: `python -m services.fallback_model.training`, plan: {plan}.

## Limits
- Made to be a second line when a larger engine is away. A determined attacker who can try often will find texts that pass.
- "Malicious" means an attempt on the model. A harmful question without such an attempt is benign here, and so is a text about attacks.
- Languages other than English are read through transliteration; their recall is lower, most of all in scripts whose spelling in
  Latin letters is ambiguous.
- The labels of mosscap, neuralchemy and WildGuardMix are noisy; part of what counts as a mistake there is none.
- An attack spread over more than one window ({max_tokens} tokens) with nothing odd in any single one is not seen.
- Images, files and the conversation around the text are not seen.
"""


def write(name: str, config: dict[str, Any], figures: Figures, plan: Path) -> str:
    """The card in Markdown. `plan` is the training plan as JSON."""
    lines = []
    for set_name, found in figures.sets.items():
        cells = [f"{found[key]:.3f}" if key in found else "–" for key in ("recall", "false_alarms")]
        cells.append(f"{found['auc']:.4f}" if "auc" in found else "–")
        delta = figures.delta_auc[set_name]
        cells.append(f"{delta:+.4f}" if delta == delta else "–")  # NaN where a set has no malicious texts
        lines.append(f"| {set_name} | " + " | ".join(cells) + " |")
    fitted = figures.cross_fitted
    return _TEXT.format(
        name=name,
        max_tokens=config["max_tokens"],
        overlap=config["overlap"],
        window_penalty=config["window_penalty"],
        scale=config["calibration"]["scale"],
        shift=config["calibration"]["shift"],
        threshold=config["threshold"],
        lines="\n".join(lines),
        ece=fitted.ece,
        false_alarms=fitted.false_alarms,
        recall=fitted.recall,
        threat_f1=fitted.threat_f1,
        long=figures.long_false_alarms,
        plan=json.dumps(json.loads(plan.read_text(encoding="utf-8"))) if plan.is_file() else "defaults",
    )
