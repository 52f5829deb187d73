"""python -m pytest tests/test_fork.py

The fork: branches against whole forward passes, what they share with the clean pass, and what they cost.
"""
import random

import pytest
import torch
import world

import llama3
import vicuna
from fork import branch_layer, causal, clean_pass, extend, finite, probability, run_branches, to_mask, unembed
from knockout import cut, forward

SIZES = {"vocab": 40, "width": 32, "layers": 4, "heads": 4, "hidden": 48}
DECODERS = {"vicuna": (vicuna, vicuna.Config(**SIZES, kv_heads=4)),
            "llama3": (llama3, llama3.Config(**SIZES, kv_heads=2))}
T, S = 9, 5                                        # tokens of the prompt, and the first one that a branch computes


@pytest.fixture(scope="module", params=DECODERS)
def case(request):
    """(decoder in float64, embeddings, positions, clean pass)."""
    file, c = DECODERS[request.param]
    d, g = file.Decoder(c).double().eval().requires_grad_(False), torch.Generator().manual_seed(3)
    for p in d.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.double) / p.shape[-1] ** 0.5 + (p.dim() == 1)
    x = torch.randn(1, T, c.width, generator=g, dtype=torch.double)
    return d, x, torch.arange(T), clean_pass(d, x, torch.arange(T))


def interventions(*keeps):
    """(M, 1, n, T) masks: nothing, then each of the given ones, of which the last T - S queries are taken."""
    return torch.stack([to_mask(keep[S:]) for keep in (causal(T), *keeps)])[:, None].double()


CUTS = [([1, 2], [5, 6]), ([6], [8]), ([0, 3, 4], [7])]


def test_the_clean_pass_keeps_every_layers_input_and_the_last_output(case):
    d, x, positions, clean = case
    assert torch.equal(clean.stream[0], x) and len(clean.stream) == len(clean.caches) + 1 == 5
    mask = to_mask(causal(T)).double()
    for before, after, layer, (k, v) in zip(clean.stream, clean.stream[1:], d.layers, clean.caches, strict=False):
        assert torch.equal(layer(before, clean.cos, clean.sin, mask), after)
        assert all(map(torch.equal, layer.qkv(before, clean.cos, clean.sin)[1:], (k, v)))


@pytest.mark.parametrize("at_once", [1, 7, 512])
def test_every_branch_ends_as_a_whole_pass_with_its_intervention(case, at_once):
    """All ranges of layers, each with one of three cuts: equal to the decoder's own loop with another mask there."""
    d, x, positions, clean = case
    r = random.Random(at_once)
    ranges = [range(a, b) for a in range(4) for b in range(a, 5)] + [range(0, 0)]
    branches = [(1 + r.randrange(3), layers) for layers in ranges]
    r.shuffle(branches)                                             # they need not be sorted
    ends = run_branches(d, clean, interventions(*(cut(causal(T), *c) for c in CUTS)),
                        [dict.fromkeys(layers, m) for m, layers in branches], [0, 3], at_once=at_once)
    assert ends.shape == (len(branches), 2, 32)
    for end, (m, layers) in zip(ends, branches, strict=True):
        whole = forward(d, x, positions, to_mask(causal(T)), to_mask(cut(causal(T), *CUTS[m - 1])), layers)
        torch.testing.assert_close(end, whole[0, [S, S + 3]], rtol=1e-6, atol=1e-6)


def test_masks_may_differ_from_head_to_head(case):
    d, x, positions, clean = case
    keep = causal(T).expand(4, -1, -1).clone()
    keep[1, 7, :3] = keep[3, 8, 2:6] = False
    masks = torch.stack([to_mask(k[:, S:]) for k in (causal(T).expand(4, -1, -1), keep)]).double()
    end = run_branches(d, clean, masks, [{1: 1, 2: 1}], [2, 3])
    whole = forward(d, x, positions, to_mask(causal(T)), to_mask(keep), range(1, 3))
    torch.testing.assert_close(end[0], whole[0, [7, 8]], rtol=1e-6, atol=1e-6)


def test_an_intervention_may_differ_from_layer_to_layer(case):
    """One branch that has the first cut in layer 0, none in layer 1, and the second one in layers 2 and 3."""
    d, x, positions, clean = case
    masks = [to_mask(keep).double() for keep in (causal(T), *(cut(causal(T), *c) for c in CUTS))]
    end = run_branches(d, clean, torch.stack(masks)[:, None, S:], [{0: 1, 2: 2, 3: 2}], [0, 1, 2, 3])
    h = x
    for layer, m in zip(d.layers, (1, 0, 2, 2), strict=True):
        h = layer(h, clean.cos, clean.sin, masks[m])
    torch.testing.assert_close(end[0], h[0, S:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("read", [[0, 1, 2, 3], [3], [2, 0]])
def test_a_change_is_made_at_its_site_in_its_layers_token_by_token(case, read):
    """Every site, each with another factor for each token: 3 branches, as whole passes written out."""
    d, x, positions, clean = case
    factors = torch.rand(4, T - S, 1, generator=torch.Generator().manual_seed(5)).double()
    factors[0] = 1
    sites, branches = ("stream", "attention", "mlp"), [{1: 1, 4: 1}, {2: 2, 1: 2}, {3: 3}]

    def change(layer, site, h, which, at):
        mine = (which == 1 + sites.index(site))[:, None, None]      # the intervention that acts at this site
        return torch.where(mine, h * factors[which][:, at], h)
    ends = run_branches(d, clean, interventions(*[causal(T)] * 3), branches, read, change)
    mask = to_mask(causal(T)).double()
    for b, branch in enumerate(branches):
        def scale(i, site, h, b=b, branch=branch):
            whole = torch.ones(T, 1).double()
            whole[S:] = factors[b + 1] if i in branch and sites[b] == site else 1
            return h * whole
        h = x
        for i, layer in enumerate(d.layers):
            h = scale(i, "stream", h)
            h = h + scale(i, "attention", layer.attend(*layer.qkv(h, clean.cos, clean.sin), mask))
            h = h + scale(i, "mlp", layer.mlp(h))
        h = scale(4, "stream", h)                                   # after the last layer
        torch.testing.assert_close(ends[b], h[0, [S + i for i in read]], rtol=1e-6, atol=1e-6)


def test_a_branch_may_fork_off_after_the_last_layer(case):
    d, x, positions, clean = case
    ends = run_branches(d, clean, interventions(causal(T)), [{4: 1}], [1, 3],
                        lambda i, site, h, which, at: 2 * h if i == 4 else h)
    assert torch.equal(ends[0], 2 * clean.stream[-1][0, [S + 1, S + 3]])


def test_a_clean_pass_that_is_extended_is_the_clean_pass_of_all_tokens(case):
    d, x, positions, clean = case
    short = clean_pass(d, x[:, :6], positions[:6])
    whole = extend(d, short, x[:, 6:], positions[6:])
    assert len(short.stream) == len(whole.stream) and short.stream[0].shape[1] == 6 and short.caches[0][0].shape[2] == 6
    for ours, theirs in zip(whole.stream, clean.stream, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(whole.caches, clean.caches, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    assert torch.equal(whole.cos, clean.cos) and torch.equal(whole.sin, clean.sin)


def test_an_empty_intervention_gives_the_bits_of_none_and_the_clean_pass_up_to_rounding():
    file, c = DECODERS["vicuna"]
    d = file.Decoder(c).eval().requires_grad_(False)
    x = torch.randn(1, T, c.width, generator=torch.Generator().manual_seed(1))
    clean = clean_pass(d, x, torch.arange(T))
    masks = interventions(causal(T)).float()
    nothing, empty = (run_branches(d, clean, masks, [branch], [3]) for branch in ({}, dict.fromkeys(range(4), 1)))
    assert torch.equal(nothing, empty)
    torch.testing.assert_close(nothing[0, 0], clean.stream[-1][0, -1], rtol=1e-5, atol=1e-6)


def test_branches_are_kept_apart_when_they_are_lined_up(case):
    """Another branch's tokens beside it change nothing, whatever they hold."""
    d, x, positions, clean = case
    masks, past = interventions(cut(causal(T), *CUTS[0])), [t[:, :, :S] for t in clean.caches[1]]
    own = clean.stream[1][:, S:]
    others = 100 * torch.randn(3, T - S, 32, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    cos, sin = clean.cos[S:], clean.sin[S:]
    alone = branch_layer(d.layers[1], own, cos, sin, past, masks, torch.tensor([1]))
    together = branch_layer(d.layers[1], torch.cat((others[:2], own, others[2:])), cos, sin, past, masks,
                            torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(together[2:3], alone, rtol=1e-6, atol=1e-6)


def test_what_decoding_appends_to_a_cache_does_not_change_a_branch(model):
    """`clean` holds the prompt's keys alone; longer caches, as after decoding, give the same ends."""
    m = model("llava-1.5")
    p = m.prompt("Is it red?", world.picture(90, 60))
    x, n = m.embed(p), len(p)
    clean = clean_pass(m.decoder, x, p.positions)
    masks = torch.stack([to_mask(keep[n - 4:]) for keep in (causal(n), cut(causal(n), [3], [n - 1]))])[:, None]
    before = run_branches(m.decoder, clean, masks, [{0: 1, 1: 1}], [-1])
    more = m.decoder.embed_tokens(torch.tensor([[7]]))
    m.decoder(more, torch.tensor([n]), None, clean.caches)
    assert clean.caches[0][0].shape[2] == n + 1
    assert torch.equal(run_branches(m.decoder, clean, masks, [{0: 1, 1: 1}], [-1]), before)


def test_a_probability_is_the_softmax_in_float32_and_must_be_finite():
    logits = torch.tensor([1.0, 3.0, 2.0], dtype=torch.bfloat16)
    assert probability(logits, 1) == pytest.approx(torch.tensor([1.0, 3.0, 2.0]).softmax(0)[1].item())
    for bad in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match="in float32: are these weights"):
            finite(bad)


def test_unembedding_is_the_final_norm_and_the_head(case):
    d, x, positions, clean = case
    assert torch.equal(unembed(d, x), d.lm_head(d.norm(x)))
