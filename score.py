"""
score.py - what is measured of an answer: its first token, the whole of it, and the margin between two options.

Needs   torch, and fork.py beside it.
Use     pair, why = option_pair(tokenizer, ids, "Red", "red", "blue")
        answer = Answer(ids, pair=pair)
        score(decoder, clean.stream[-1][0, -len(ids):], answer)        {"p": ..., "logp": ..., "margin": ...}
Matches teacher forcing, one whole forward pass per token  (tests/test_score.py)
Paper   https://arxiv.org/abs/2411.18620, Eq. 6, is the first of the three

    p        probability of one token of the answer, its first (Eq. 6) or its last
    logp     log-probability of the whole answer: the sum over its tokens, each given those before it, without the
             end-of-sequence token. In nats; longer answers have lower ones, so compare them per token.
    margin   log p(true option) - log p(false option), in nats, of the first tokens at which the two options differ.
             Below 0, the model prefers the false one. When p is near 1, p hardly changes, but the margin still does.

Shapes  m tokens of an answer  C width  V vocabulary
"""
import os
from dataclasses import dataclass

import torch

from fork import not_finite, unembed


@dataclass(frozen=True)
class Answer:
    """The tokens that are measured. They follow the prompt; the m positions before them predict them."""
    ids: tuple
    measured: int = 0                              # which of them p is about: 0 the first, -1 the last
    pair: tuple | None = None                      # (i, a, b): after i of its tokens, the true option's and the false's

    @property
    def read(self):
        """-m .. -1: the prompt is followed by the answer without its last token, so the last m positions predict it."""
        return list(range(-len(self.ids), 0))


@torch.inference_mode()
def score(decoder, ends, answer):
    """The residual stream after the last layer at the positions that predict an Answer, (..., m, C) -> dict of p, logp
    and margin, (...) each; margin is None without a pair. FloatingPointError: one is not finite."""
    m = len(answer.ids)
    which, parts = torch.tensor(answer.ids).to(ends.device), []     # (m,)
    for some in ends.reshape(-1, *ends.shape[-2:]).split(max(1, 256 // m)):         # logits of all would be gigabytes
        logits = unembed(decoder, some).float()                     # (n, m, V)
        logs = logits.log_softmax(-1)
        i, a, b = answer.pair or (0, 0, 0)
        parts.append(torch.stack((logits[:, answer.measured].softmax(-1)[:, answer.ids[answer.measured]],
                                  logs.gather(-1, which.expand(len(some), m)[..., None]).sum((-2, -1)),
                                  logs[:, i, a] - logs[:, i, b])))
    found = torch.cat(parts, 1).view(3, *ends.shape[:-2])
    if not found.isfinite().all():                                  # only here does the CPU wait for the device
        raise not_finite("probability", ends.dtype)
    return {"p": found[0], "logp": found[1], "margin": found[2] if answer.pair else None}


# Of a CSV: without and with an intervention. The margin is empty without a pair.
COLUMNS = ("answer_tokens", "logp_base", "logp_knockout", "logp_per_token_base", "logp_per_token_knockout",
           "margin_base", "margin_knockout")


def columns(base, ends, answer):
    """Two results of `score`, of one run and of n others -> a row for each of these: p, then what COLUMNS names."""
    m, logp = len(answer.ids), base["logp"].item()
    margin = [base["margin"].item(), ends["margin"].tolist()] if answer.pair else ["", [""] * len(ends["p"])]
    return [[p, m, logp, l, logp / m, l / m, margin[0], d] for p, l, d in zip(
        ends["p"].tolist(), ends["logp"].tolist(), margin[1], strict=True)]


# ---------------------------------------------------------------------------------------------------- two options

NO_OPTIONS = "the question has no second option; pass --options A,B"


def option_pair(tokenizer, ids, prediction, true, false):
    """Where two options part -> ((i, a, b), ""), see Answer; or (None, why there is no such place).

    ids, prediction: the model's answer, as tokens and as text. true, false: the two options, which are spelt as the
    model spells: with a capital if its answer has one. Words that both begin with count if the answer begins with them,
    too; else they are left out ("to the" left or right).
    """
    if not (true and false):
        return None, NO_OPTIONS
    shared = os.path.commonprefix([true.split(), false.split()])
    if shared and prediction.lower().split()[:len(shared)] != [word.lower() for word in shared]:
        true, false = (" ".join(option.split()[len(shared):]) for option in (true, false))
    if prediction[:1].isupper():
        true, false = (option[:1].upper() + option[1:] for option in (true, false))
    a, b = (tokenizer.encode(option, add_special_tokens=False).ids for option in (true, false))
    i = len(os.path.commonprefix([a, b]))
    if i == min(len(a), len(b)):
        return None, f"no token tells {true!r} from {false!r} before one of them ends"
    if tuple(a[:len(ids)]) == tuple(ids) and i >= len(ids):
        return None, f"{true!r} and {false!r} begin with the same {i} tokens: only whole answers tell them apart"
    if tuple(a[:i]) != tuple(ids[:i]) or i >= len(ids):
        return None, f"{true!r} and {false!r} begin alike, and the model's answer {prediction!r} begins otherwise"
    return (i, a[i], b[i]), ""


def options_of(prediction, answer="", true="", false="", options=()):
    """What is known of a question -> (true option, false option), or ("", "") where it has no two.

    options: both, where it is not known which is right; then the model's own answer counts as true. Yes and no are each
    other's second option.
    """
    if true and false:
        return true, false
    if len(options) == 2:
        a, b = options
        return (b, a) if b.strip().lower() == prediction.strip().lower() else (a, b)
    other = {"yes": "no", "no": "yes"}.get((answer or prediction).strip().lower().rstrip("."))
    return ((answer or prediction).strip().lower().rstrip("."), other) if other else ("", "")
