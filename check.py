"""
check.py - is the cut a cut? Measured on your model and question, with the kernel that the experiment uses.

Run     python check.py                                      the bundled model, the edges of figures 3-5
        python check.py --edge "image->question" --limit 1
        python check.py --model llava-1.5-7b --image photo.jpg --question "Is the cup red or blue?"
Takes   the flags of knockout.py that choose model, questions, edges, window and heads
Paper   https://arxiv.org/abs/2411.18620, Eq. 7

    With the edge cut in the windows around the first, the middle and the last layer:
    - no attention is left on the cut edge;
    - no token before the first target, and no layer below the window, changes by a single bit;
    - an empty cut changes no bit either;
    - the sweep, all layers in one pass, gives the probabilities of the plain loop, one forward pass per layer. In
      16-bit dtypes both round, so the difference is only reported.
    Reported for comparison: how much a random source of the same size matters.

Ends with exit code 1 if a check fails.
"""
import signal
import sys
from dataclasses import replace

if __name__ == "__main__":                         # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

import knockout
from fork import additive, causal, probability, unembed
from groups import random_sets
from harness import errors, experiment, flags
from knockout import edge_mask, forward, percent, sweep, window


@torch.inference_mode()
def selfcheck(decoder, x, positions, clean, source, target, token, k, heads=None, seed=0):
    """Is the cut what Eq. 7 says? -> list of (sentence, number, passed); passed is None where it is only reported.

    x (1, T, C) at positions (T,); clean: its fork.clean_pass; source, target: lists of positions; k: the window.
    """
    T, L = x.shape[1], len(decoder.layers)
    fast = sweep(decoder, clean, [(source, target)], token, k, heads)[0]

    def mask(places):
        return edge_mask(decoder, T, places, target, heads).to(x.device)
    closed = mask(source)
    plain = additive(causal(T, device=x.device)).expand_as(closed)  # of the same shape, so SDPA picks the same kernel
    cos, sin = decoder.rope(positions)
    leaked, before, below, apart = [0.0], [0.0], [0.0], [0.0]
    for l in {0, L // 2, L - 1}:
        layers = window(l, k, L)
        a = b = x                                                   # the clean run, and the one with the cut
        for i, layer in enumerate(decoder.layers):
            if i in layers:
                leaked.append(carried(layer, b, cos, sin, closed, source, heads)[target].max().item())
            a, b = layer(a, cos, sin, plain), layer(b, cos, sin, closed if i in layers else plain)
            moved = (a - b).abs().amax((0, 2))                      # (T,)
            before += moved[:min(target)].tolist()
            below += moved.tolist() if i < layers.start else []
        slow = probability(unembed(decoder, b[0, -1]), token)
        apart.append(abs(fast[l] - slow) / slow)

    def logits_with(mask, layers):
        return unembed(decoder, forward(decoder, x, positions, plain, mask, layers)[0, -1])
    base = logits_with(plain, ())
    empty = (logits_with(mask([]), range(L)) - base).abs().max().item()

    pool = experiment.control_pool(source, target, T)
    drawn, = random_sets(pool, min(len(source), len(pool)), 1, seed)
    p, middle = probability(base, token), window(L // 2, k, L)

    def change(places):
        return percent(p, probability(logits_with(mask(places), middle), token))
    exact = x.dtype in (torch.float32, torch.float64)               # in 16 bits both ways round, but differently
    return [("largest contribution over a cut edge", max(leaked), max(leaked) == 0),
            ("largest change of a token before the first target", max(before), max(before) == 0),
            ("largest change in a layer below the window", max(below), max(below) == 0),
            ("largest change of a logit when the source is empty", empty, empty == 0),
            ("largest relative difference of the sweep and the plain loop", max(apart),
             max(apart) < 1e-4 if exact else None),
            (f"change_percent around layer {L // 2}, source of {len(source)} tokens", change(source), None),
            (f"change_percent around layer {L // 2}, {len(drawn)} random tokens instead", change(drawn), None)]


def carried(layer, x, cos, sin, mask, source, heads=None):
    """The largest contribution of the source keys to each token's attention output (T,), by the layer's own kernel.

    The values are replaced: 1 at the source keys, in the heads that are cut, and 0 elsewhere. If nothing is carried
    from there, the output is the same as for values that are all 0.
    """
    q, k, v = layer.qkv(x, cos, sin)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)            # a key head of its own for each query head
    marked = torch.zeros_like(k)
    for head in range(k.shape[1]) if heads is None else heads:
        marked[:, head, source] = 1
    out = layer.attend(q, k, marked, mask) - layer.attend(q, k, torch.zeros_like(k), mask)
    return out[0].abs().amax(-1)


# ---------------------------------------------------------------------------------------------------- command line

def main(argv=None):
    with errors.one_line_errors():
        sys.exit(run(knockout.parse(flags.Parser(__doc__), argv)))


def run(s):
    """Check every edge of every question -> the exit code. s: knockout.Settings."""
    study, failed, checked = experiment.Study(s.shared), 0, 0
    for question in study.questions:
        asked = study.ask(question, s.paper_spans, s.subword, s.max_norm)
        cuts, lacking = replace(asked, strict=False).edges(s.edges)
        for edge, why in lacking.items():
            print(f"{question.key}  {edge}: skipped, {why}")
        for edge, places in cuts.items():
            print(f"{question.key}  {edge}, window {s.window}")
            for sentence, value, passed in selfcheck(study.model.decoder, asked.x, asked.positions, asked.clean,
                                                     *places, asked.token, s.window, s.heads, s.shared.seed):
                print(f"  {'      ' if passed is None else 'ok    ' if passed else 'FAILED'}  {sentence}: {value:.6g}")
                failed += passed is False
            checked += 1
    if not checked:
        raise ValueError("no edge could be checked: the questions do not have the groups")
    print(f"{checked} edges checked, {failed} checks failed")
    return 1 if failed else 0


if __name__ == "__main__":
    main()
