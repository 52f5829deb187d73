"""python -m pytest tests/test_knockout.py

Eq. 7, windows and curves: closed forms, what an intervention must not change, and the sweep against the plain loop.
"""
import copy
import math
import random

import pytest
import torch
import world

import knockout
import llava_min
import vicuna
from fork import causal, clean_pass, probability, to_mask, unembed
from groups import token_groups
from knockout import curve, cut, edge_mask, percent, sweep, token_layers, window

VISUAL = ["llava-1.5", "llava-1.6", "llama3-next"]


@pytest.fixture(scope="module", params=VISUAL)
def case(request, model):
    """(model, prompt, its groups, embeddings, first answer token) of a question with every group."""
    m = model(request.param)
    p = m.prompt("Is the cup red or blue?", world.picture(90, 60))
    g = token_groups(p, true_option="red", false_option="blue", objects=["cup"], boxes=[(20, 10, 40, 30)])
    x = m.embed(p)
    return m, p, g, x, m.prefill(x, p.positions)[0].argmax().item()


def forward(m, p, x, *how):
    """Logits (V,) of the last position."""
    return unembed(m.decoder, knockout.forward(m.decoder, x, p.positions, *how)[0, -1])


def masks(x, source=(), target=()):
    keep = causal(x.shape[1])
    return to_mask(keep), to_mask(cut(keep, list(source), list(target)))


@torch.inference_mode()
def stream_of(m, x, mask=None, layers=()):
    """The residual stream entering every layer and leaving the last, (L + 1, T, C)."""
    cos, sin = m.decoder.rope(torch.arange(x.shape[1]))
    h = [x[0]]
    for i, layer in enumerate(m.decoder.layers):
        x = layer(x, cos, sin, mask if i in layers else to_mask(causal(x.shape[1])))
        h.append(x[0])
    return torch.stack(h)


# ---------------------------------------------------------------------------------------------------- closed forms

@pytest.mark.parametrize("layer, k, L, layers", [
    (0, 9, 40, range(0, 5)), (20, 9, 40, range(16, 25)), (39, 9, 40, range(35, 40)), (3, 1, 8, range(3, 4)),
    (3, 2, 8, range(2, 4)), (0, 2, 8, range(0, 1)), (7, 4, 8, range(5, 8)), (2, 100, 5, range(0, 5))])
def test_a_window_is_the_papers_range_clipped_to_the_model(layer, k, L, layers):
    assert window(layer, k, L) == layers


@pytest.mark.parametrize("k", range(1, 12))
def test_every_window_is_layer_minus_half_k_up_to_layer_plus_the_other_half(k):
    for layer in range(12):
        wanted = [i for i in range(12) if layer - math.floor(k / 2) <= i <= layer + math.ceil(k / 2) - 1]
        assert list(window(layer, k, 12)) == wanted


def test_cut_hides_source_keys_from_target_queries_and_nothing_else():
    keep = cut(causal(5), [0, 1], [3, 4])
    assert keep.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert torch.equal(cut(causal(5), [], [3]), causal(5))
    assert torch.equal(cut(causal(5), [4], [2]), causal(5))         # a key in the future was hidden already


def test_the_mask_is_zero_where_an_edge_is_kept_and_minus_infinity_where_it_is_cut():
    mask = to_mask(cut(causal(3), [0], [2]))
    assert mask.tolist() == [[0, -math.inf, -math.inf], [0, 0, -math.inf], [-math.inf, 0, 0]]


def test_a_query_with_no_key_left_is_refused_by_position():
    with pytest.raises(ValueError, match=r"query position\(s\) \[0, 2\]"):
        to_mask(cut(causal(4), [0, 1, 2], [0, 2]))


def test_a_knocked_out_layer_renormalises_over_the_keys_that_are_left():
    """One head, values equal to the key's number: attention on {1, 2} after cutting 0 is softmax over those two."""
    q = k = torch.zeros(1, 1, 3, 2)
    v = torch.tensor([[[[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]]])
    out = vicuna.attend(q, k, v, to_mask(cut(causal(3), [0], [2])))
    assert out[0, 0, :, 0].tolist() == [0.0, 0.5, 1.5]


def test_percent_is_the_relative_change():
    assert percent(0.5, 0.25) == -50 and percent(0.2, 0.2) == 0 and percent(0.1, 0.3) == pytest.approx(200)


def test_a_probability_that_is_not_a_number_is_refused():
    assert probability(torch.zeros(4), 1) == 0.25
    with pytest.raises(FloatingPointError, match="non-finite .* in float32"):
        probability(torch.tensor([0.0, math.nan]), 0)


# ---------------------------------------------------------------------------------------- what must not change

def test_cutting_nothing_is_the_plain_model_exactly(case):
    m, p, g, x, token = case
    clean, empty = masks(x, [], g.positions("question"))
    base = forward(m, p, x, clean, clean, ())
    assert torch.equal(forward(m, p, x, clean, empty, range(99)), base)
    assert torch.equal(forward(m, p, x, clean, masks(x, [0], [5])[1], ()), base)
    torch.testing.assert_close(base, m.prefill(x, p.positions)[0][0], rtol=1e-5, atol=1e-5)
    assert torch.equal(base, m.prefill(x, p.positions, clean)[0][0])                # an explicit mask: the same kernel


def test_with_the_image_cut_from_everything_after_it_the_answer_does_not_depend_on_it(case):
    m, p, g, x, token = case
    image = g.positions("image")
    after = list(range(image[-1] + 1, len(p)))
    other = x.clone()
    other[:, image] = torch.randn(len(image), x.shape[2], generator=torch.Generator().manual_seed(0))
    clean, blocked = masks(x, image, after)
    everywhere = range(len(m.decoder.layers))
    assert torch.equal(forward(m, p, x, clean, blocked, everywhere),
                       forward(m, p, other, clean, blocked, everywhere))
    assert not torch.equal(forward(m, p, x, clean, clean, ()), forward(m, p, other, clean, clean, ()))


def test_tokens_before_the_target_and_layers_below_the_window_do_not_change(case):
    m, p, g, x, token = case
    question = g.positions("question")
    L = len(m.decoder.layers)
    clean = stream_of(m, x)
    for layer in range(L):
        layers = window(layer, 2, L)
        h = stream_of(m, x, masks(x, g.positions("image"), question)[1], layers)
        assert torch.equal(h[:, :question[0]], clean[:, :question[0]])
        assert torch.equal(h[:layers.start + 1], clean[:layers.start + 1])
        assert not torch.equal(h[layers.start + 1, question], clean[layers.start + 1, question])


def test_image_to_question_in_the_last_layer_alone_cannot_reach_the_answer(case):
    m, p, g, x, token = case
    p_base = probability(forward(m, p, x, *masks(x), ()), token)
    assert curve(m.decoder, x, p.positions, g.positions("image"), g.positions("question"), token, 1)[-1] == p_base


def test_last_to_last_changes_only_the_last_token(case):
    m, p, g, x, token = case
    h = stream_of(m, x, masks(x, *[g.positions("last")] * 2)[1], range(99))
    clean = stream_of(m, x)
    assert torch.equal(h[:, :-1], clean[:, :-1]) and not torch.equal(h[:, -1], clean[:, -1])


def test_cutting_a_union_is_cutting_both_parts_at_once(case):
    m, p, g, x, token = case
    both = masks(x, g.positions("image+question"), g.positions("last"))[1]
    one_by_one = to_mask(cut(cut(causal(x.shape[1]), g.positions("image"), g.positions("last")),
                             g.positions("question"), g.positions("last")))
    assert torch.equal(both, one_by_one)
    newlines = g.named.get("newlines", [])
    parts = g.positions("related_patches") + g.positions("other_patches") + newlines
    assert torch.equal(masks(x, parts, g.positions("question"))[1],
                       masks(x, g.positions("image"), g.positions("question"))[1])


def test_a_window_over_all_layers_is_the_same_point_for_every_layer(case):
    m, p, g, x, token = case
    points = curve(m.decoder, x, p.positions, g.positions("question"), g.positions("last"), token, 99)
    assert len(points) == len(m.decoder.layers) and len(set(points)) == 1


@pytest.mark.parametrize("kernel", ["attend", "attend_fast"])
def test_both_kernels_give_the_same_curve(case, kernel, monkeypatch):
    m, p, g, x, token = case
    ours = curve(m.decoder, x, p.positions, g.positions("image"), g.positions("question"), token, 3)
    file = m.config.decoder_file
    monkeypatch.setattr(file.Block, "kernel", staticmethod(getattr(file, kernel)))
    theirs = curve(m.decoder, x, p.positions, g.positions("image"), g.positions("question"), token, 3)
    assert theirs == pytest.approx(ours, rel=1e-5)


# ---------------------------------------------------------------------------------------------------- the sweep

def both(decoder, x, cuts, token, k, heads=None, **more):
    """The curves of all cuts, by the sweep and by the plain loop, as two tensors (cuts, L)."""
    positions = torch.arange(x.shape[1])
    swept = sweep(decoder, clean_pass(decoder, x, positions), cuts, token, k, heads, **more)
    return torch.tensor(swept), torch.tensor([curve(decoder, x, positions, *c, token, k, heads) for c in cuts])


@pytest.mark.parametrize("k", [3, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 2, 9))])
def test_the_sweep_is_the_plain_loop_for_every_group(case, k):
    """Pairs of named groups that leave every query a key, with different first targets, in one call."""
    m, p, g, x, token = case
    groups, cuts = [g.positions(name) for name in g.named], []
    for source in groups:
        for target in groups:
            if cut(causal(len(p)), source, target).any(-1).all():
                cuts.append((source, target))
    cuts = random.Random(k).sample(cuts, len(cuts) // 4)            # a quarter of them, to keep the suite fast
    fast, slow = both(m.decoder, x, cuts, token, k)
    assert len(cuts) > 10 and len({min(target) for _, target in cuts}) > 4
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(6))
def test_the_sweep_is_the_plain_loop_for_random_edges_windows_heads_and_chunks(case, seed):
    """In float64, where only the softmax rounds to float32: what is left is not rounding of the layers."""
    m, p, g, x, token = case
    decoder, r = copy.deepcopy(m.decoder).double(), random.Random(seed)
    T, L, H = x.shape[1], len(decoder.layers), decoder.config.heads
    cuts = []
    for _ in range(3):
        target = sorted(r.sample(range(2, T), r.randint(1, 6)))
        cuts.append((sorted(r.sample(range(1, T), r.randint(1, T // 2))), target))      # key 0 is left to attend to
    k, heads = r.randint(1, L + 2), r.choice([None, [0], sorted(r.sample(range(H), 2))])
    fast, slow = both(decoder, x.double(), cuts, token, k, heads, at_once=r.choice([1, 100, 8192]))
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=0)


def test_an_edge_cut_for_all_heads_is_the_edge_and_for_some_heads_another(case):
    m, p, g, x, token = case
    clean, cuts = clean_pass(m.decoder, x, p.positions), [(g.positions("image"), g.positions("question"))]
    H = m.decoder.config.heads
    whole, all_heads, one = (sweep(m.decoder, clean, cuts, token, 3, heads)[0] for heads in (None, range(H), [1]))
    assert all_heads == pytest.approx(whole, rel=1e-6) and one != pytest.approx(whole, rel=1e-3)
    with pytest.raises(ValueError, match=f"head {H} .* heads 0 to {H - 1}"):
        sweep(m.decoder, clean, cuts, token, 3, [0, H])


def test_a_sweep_takes_as_many_token_layers_as_it_says(case):
    m, p, g, x, token = case
    T, L = x.shape[1], len(m.decoder.layers)
    cuts = [(g.positions("image"), g.positions("question")), (g.positions("question"), g.positions("last"))]
    tokens, hooks = [], []
    for layer in m.decoder.layers:                                  # every token that goes through a layer's MLP
        count = lambda module, args: tokens.append(args[0].shape[:-1].numel())
        hooks.append(layer.gate_proj.register_forward_pre_hook(count))
    sweep(m.decoder, clean_pass(m.decoder, x, p.positions), cuts, token, 3)
    for hook in hooks:
        hook.remove()
    assert sum(tokens) == pytest.approx(T * L * token_layers(T, L, cuts, 3))


def test_a_sweep_without_edges_is_empty_and_one_without_a_key_or_a_number_is_refused(case):
    m, p, g, x, token = case
    assert sweep(m.decoder, clean_pass(m.decoder, x, p.positions), [], token, 3) == []
    with pytest.raises(ValueError, match=r"query position\(s\) \[0\]"):
        sweep(m.decoder, clean_pass(m.decoder, x, p.positions), [([0], [0])], token, 3)
    x = x.clone()
    x[0, 3] = math.nan
    with pytest.raises(FloatingPointError, match="non-finite .* in float32"):
        sweep(m.decoder, clean_pass(m.decoder, x, p.positions), [([1], [5])], token, 3)


@pytest.mark.parametrize("heads", [None, [0, 2]])
def test_an_edges_mask_can_be_built_for_its_last_queries_alone(case, heads):
    m, p, g, x, token = case
    T, source, target = x.shape[1], g.positions("image"), g.positions("question")
    s = min(target)
    whole = edge_mask(m.decoder, T, source, target, heads)
    assert torch.equal(edge_mask(m.decoder, T, source, target, heads, s), whole[..., s:, :])
    with pytest.raises(ValueError, match=rf"\[{s}, {s + 1}\] would attend to nothing"):
        edge_mask(m.decoder, T, range(T), [s, s + 1], heads, s)


def test_a_sweep_with_heads_never_builds_a_square_mask_for_every_head(case, monkeypatch):
    """(H, T, T) would be gigabytes with AnyRes. The largest mask has the queries from the first target on."""
    m, p, g, x, token = case
    T, H = x.shape[1], m.decoder.config.heads
    source, target, largest = g.positions("image"), g.positions("question"), []
    honest = torch.Tensor.masked_fill
    clean = clean_pass(m.decoder, x, p.positions)
    monkeypatch.setattr(torch.Tensor, "masked_fill", lambda self, *a: largest.append(self.numel()) or honest(self, *a))
    sweep(m.decoder, clean, [(source, target), (source, [T - 1])], token, 3, [0, 2])
    assert largest and max(largest) == 2 * H * (T - min(target)) * T    # nothing cut, and the edge cut


# ---------------------------------------------------------------------------------------------------- dtypes

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_instrument_runs_in_every_dtype_and_an_empty_cut_is_exact_there(checkpoint, dtype):
    m = llava_min.load(checkpoint("llava-1.5"), dtype)
    p = m.prompt("Is the cup red or blue?", world.picture(90, 60))
    g, x = token_groups(p), m.embed(p)
    assert x.dtype == dtype and m.vision_tower.pre_layrnorm.weight.dtype == torch.float32
    clean, empty = masks(x, [], g.positions("question"))
    base = forward(m, p, x, clean, clean, ())
    assert torch.equal(forward(m, p, x, clean, empty, range(99)), base)
    moved = curve(m.decoder, x, p.positions, g.positions("image"), g.positions("question"), base.argmax().item(), 9)
    assert all(math.isfinite(v) for v in moved) and moved[0] != probability(base, base.argmax().item())
