"""
fork.py - many interventions on one prompt, all in one pass over the decoder's layers.

Needs   torch. Nothing else of this repo: copy it and it works with any decoder that has vicuna.py's Decoder and Block.
Use     clean = clean_pass(decoder, x, positions)
        ends = run_branches(decoder, clean, masks, [{0: 1, 1: 1}, {1: 1, 2: 1}], read=[-1])
Matches the plain way, one whole forward pass per intervention  (tests/test_fork.py, test_knockout.py)

Attention is causal. A change at position s therefore changes nothing before s, in any layer; one in layer l changes
nothing below l. What it does change is a *branch*: it forks off the clean pass at its first layer, with the tokens
from s on alone. Their queries attend to the clean pass's keys and values before s, and to their own from s on.

Four layers, six tokens. The edge from positions 1 and 2 to position 4 is cut in two neighbouring layers at a time.
Read upwards:

                 clean pass        branches: tokens 4 and 5
    layer 3      o o o o o o         + +      + +      + +      x x       o  computed once, for all
    layer 2      o o o o o o         + +      + +      x x      x x       x  computed for a branch, the edge is cut
    layer 1      o o o o o o         + +      x x      x x       |        +  computed for a branch, nothing is cut
    layer 0      o o o o o o         x x      x x       |        |        |  not computed: as in the clean pass
                 0 1 2 3 4 5         cut      cut      cut      cut
                                    in 0     in 0, 1  in 1, 2  in 2, 3

A branch enters its first layer with the clean stream of tokens 4 and 5. In each layer these two attend to the clean
keys and values of tokens 0 to 3, and to the branch's own keys and values of tokens 4 and 5. So the layers are applied
to 24 + 26 tokens in all, instead of 24 + 4 * 24 for four whole runs. (In the last layer, only the tokens that are read
are computed.) The branches go through a layer in chunks of up to AT_ONCE tokens; its weights are read once per chunk.

Shapes  T tokens  s first token of the branches  n = T - s tokens of a branch  m of them are read  B branches
        M interventions
        C width  H heads  K key heads  D head size  V vocabulary  L layers
"""
import math
from dataclasses import dataclass
from functools import partial

import torch

AT_ONCE = 512                                      # tokens of branches that go through a layer together
IN_SEQUENCE = 256                                  # of them, in attention: see `branch_layer`


def causal(T, S=None, device=None):
    """keep (T, S), True = may attend, for T queries that are the last of S positions.

    causal(3) is  1 0 0
                  1 1 0
                  1 1 1
    """
    S = T if S is None else S
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def additive(keep):
    """keep (..., T, S), True = may attend -> the paper's additive M (Eq. 4, 7): 0 keeps an edge, -inf cuts it."""
    return torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, -math.inf)


def to_mask(keep):
    """`additive`, for masks that somebody made: combine them as bools and convert once, here.

    A query without a key is noticed before its softmax is NaN. ValueError names such query positions. To look, the CPU
    waits for the device that keep is on.
    """
    blind = ~keep.any(-1)
    if blind.any():
        first = keep.shape[-1] - keep.shape[-2]                     # the queries are the last T of S positions
        positions = sorted({first + t for t in blind.nonzero()[:, -1].tolist()})
        raise ValueError(f"query position(s) {positions[:4]} would attend to nothing: every key is cut")
    return additive(keep)


# ---------------------------------------------------------------------------------------------------- the clean pass

@dataclass(frozen=True)
class Clean:
    """A prompt's pass through the decoder with nothing changed."""
    stream: list                                   # residual stream (1, T, C) before each layer, after the last: L + 1
    caches: list                                   # each layer's [keys, values], (1, K, T, D) both: L
    cos: torch.Tensor                              # the rotation of each token, (T, D)
    sin: torch.Tensor


@torch.inference_mode()
def clean_pass(decoder, x, positions, store=list):
    """Embeddings x (1, T, C) at `positions` (T,), for rope, -> Clean. FloatingPointError names the first layer with
    a value that is not finite.

    store: makes the lists of streams and caches; offload.Shelf's items lie on disk.
    """
    cos, sin = decoder.rope(positions)
    stream, caches, good = store(), store(), []
    # An explicit mask: with it, SDPA picks the same kernel as in the runs with a cut.
    mask = additive(causal(x.shape[1], device=x.device))
    for layer in decoder.layers:
        stream.append(x)
        good.append(x.isfinite().all())
        cache = []
        x = layer(x, cos, sin, mask, cache)
        caches.append(cache)
    stream.append(x)
    good = torch.stack([*good, x.isfinite().all()]).tolist()        # the device is waited for once
    if not all(good):
        layer = good.index(False) - 1
        raise not_finite("embeddings" if layer < 0 else f"residual stream after layer {layer}", x.dtype)
    return Clean(stream, caches, cos, sin)


@torch.inference_mode()
def extend(decoder, clean, x, positions, store=list):
    """A clean pass over T tokens, and embeddings x (1, m, C) of m more at `positions` -> the Clean of all T + m."""
    cos, sin = decoder.rope(positions)
    stream, caches = store(), store()
    m, T = x.shape[1], clean.stream[0].shape[1]
    mask = additive(causal(m, T + m, x.device))
    for i, layer in enumerate(decoder.layers):
        stream.append(torch.cat((clean.stream[i], x), 1))
        cache = list(clean.caches[i])
        x = layer(x, cos, sin, mask, cache)
        caches.append(cache)
    stream.append(torch.cat((clean.stream[len(decoder.layers)], x), 1))
    return Clean(stream, caches, torch.cat((clean.cos, cos)), torch.cat((clean.sin, sin)))


@torch.inference_mode()
def unembed(decoder, x):
    """Residual stream after the last layer (..., C) -> logits (..., V)."""
    return decoder.lm_head(decoder.norm(x))


def probability(logits, token):
    """Logits (V,) -> the probability of one token (Eq. 6), softmax in float32. FloatingPointError: it is not finite."""
    return finite(logits.float().softmax(-1)[token].item(), logits.dtype)


def finite(p, dtype=torch.float32):
    """The number p, computed in `dtype`, as it is. FloatingPointError: it is NaN or infinite."""
    if not math.isfinite(p):
        raise not_finite("probability", dtype)
    return p


def not_finite(what, dtype):
    """The error about a value that is NaN or infinite, with what helps in that dtype."""
    wider = {torch.float16: "bfloat16 or float32", torch.bfloat16: "float32"}.get(dtype)
    advice = f"try --dtype {wider}" if wider else "are these weights the published ones?"
    return FloatingPointError(f"non-finite {what} in {str(dtype).removeprefix('torch.')}: {advice}")


# ---------------------------------------------------------------------------------------------------- branches

@torch.inference_mode()
def run_branches(decoder, clean, masks, branches, read, change=None, at_once=AT_ONCE):
    """Run B branches -> the residual stream after the last layer at the positions `read` of each, (B, len(read), C).

    An intervention is a mask and, with `change`, whatever that does; number 0 is none. A branch is a run that has
    interventions in some layers: {layer: number}, and none in the others. It forks off at the first of these layers.
    masks (M, 1 or H, n, T): additive, one for each intervention, for the last n tokens of the prompt. masks[0] must be
    plain causal.
    change(layer, site, x, which, at) -> x: what else an intervention does, None for nothing. It is called with x
    (B, m, C) at the site "stream", before a layer (after the last one: layer L), and with what "attention" and "mlp"
    add to it; which (B,) is each branch's intervention in this layer; `at` picks the m of the n tokens that x holds.
    read: positions among the n tokens. at_once: how many tokens of branches go through a layer together. With fewer,
    weights are read more often; with more, memory grows, and on CPUs a token takes longer (bench.py tree).
    Memory holds all branches' tokens, (B, n, C).
    """
    n, T = masks.shape[2:]
    s, L, device = T - n, len(decoder.layers), masks.device
    cos, sin = clean.cos[s:], clean.sin[s:]
    order = sorted(range(len(branches)), key=lambda b: min(branches[b], default=0))
    first = [min(branches[b], default=0) for b in order]
    # What each branch has in each layer, (L + 1, B). Sent to the device here: the loop never waits for it.
    which = torch.tensor([[branches[b].get(i, 0) for b in order] for i in range(L + 1)]).to(device)
    read = torch.tensor(read).to(device)
    x = clean.stream[0][:, s:].expand(0, -1, -1)                    # (B, n, C), no branch yet
    for i, layer in enumerate(decoder.layers):
        if new := first.count(i):                                   # branches that fork off here
            x = torch.cat((x, clean.stream[i][:, s:].expand(new, -1, -1)))
        here, changed = which[i, :len(x)], change and partial(change, i)
        x = changed("stream", x, here, slice(None)) if change else x
        past = [t[:, :, :s] for t in clean.caches[i]]
        read_here = read if i + 1 == L else slice(None)             # above the last layer nothing attends to the rest
        chunks = max(1, math.ceil(len(x) / max(1, at_once // n)))   # of equal size: a small last one is inefficient
        x = torch.cat([branch_layer(layer, some, cos, sin, past, masks, w, changed, read_here) if len(some) else
                       some[:, read_here] for some, w in zip(x.tensor_split(chunks), here.tensor_split(chunks),
                                                             strict=True)])
    if change:
        if new := first.count(L):
            x = torch.cat((x, clean.stream[L][:, s:][:, read].expand(new, -1, -1)))
        x = change(L, "stream", x, which[L], read)
    return x[torch.tensor(order).argsort().to(device)]              # in the order of `branches`


def branch_layer(layer, x, cos, sin, past, masks, which, change=None, read=slice(None)):
    """One layer for B branches x (B, n, C) with a common past, [keys, values] (1, K, s, D) -> (B, m, C), those to read.

    masks (M, 1 or H, n, T); which (B,): the intervention that each branch has here; change, read: see run_branches,
    where change has this layer's number already.

    In attention, IN_SEQUENCE tokens at a time are lined up as one sequence, see `attend_lined_up`: a batch would need a
    copy of the past for every branch, and one sequence of all branches would mostly compute what its mask hides.
    """
    per_sequence = max(1, IN_SEQUENCE // x.shape[1])
    q, k, v = layer.qkv(x, cos, sin)                                # (B, H, n, D), (B, K, n, D)
    parts = zip(*(t.split(per_sequence) for t in (q[:, :, read], k, v, which)), strict=True)
    out = torch.cat([attend_lined_up(layer, *qkv, past, masks[w][:, :, read]) for *qkv, w in parts])
    x, a = x[:, read], layer.output(out)                            # (B, m, C), both
    x = x + (change("attention", a, which, read) if change else a)
    f = layer.mlp(x)
    return x + (change("mlp", f, which, read) if change else f)


def attend_lined_up(layer, q, k, v, past, mask):
    """Attention of B branches to the past and to themselves, as one sequence with a mask that keeps them apart.

    q (B, H, m, D)  k, v (B, K, n, D)  past 2 x (1, K, s, D)  mask (B, 1 or H, m, s + n)  ->  (B, H, m, D)

    Two branches of two tokens, each with its own causal mask:

                  keys  past      branch 0   branch 1
        branch 0        1 1 1 1   1 0        . .         . is hidden: a branch attends to the past and to itself
        branch 0        1 1 1 1   1 1        . .
        branch 1        1 1 1 1   . .        1 0
        branch 1        1 1 1 1   . .        1 1
    """
    B, H, m, D = q.shape
    heads, s, n = mask.shape[1], past[0].shape[2], k.shape[2]       # heads: 1 or H

    def line_up(t):                                                 # (B, heads, tokens, D) -> (1, heads, B tokens, D)
        return t.transpose(0, 1).reshape(1, t.shape[1], -1, t.shape[3])
    k, v = (torch.cat((old, line_up(new)), 2) for old, new in zip(past, (k, v), strict=True))      # (1, K, s + B n, D)
    apart = mask.new_full((heads, B, m, B, n), -math.inf)
    apart.diagonal(0, 1, 3).copy_(mask[..., s:].permute(1, 2, 3, 0))  # the diagonal: a branch's queries, its own keys
    mask = torch.cat((mask[..., :s].transpose(0, 1).reshape(heads, B * m, s), apart.reshape(heads, B * m, B * n)), -1)
    return layer.each_head(line_up(q), k, v, mask[None]).view(H, B, m, D).transpose(0, 1)
