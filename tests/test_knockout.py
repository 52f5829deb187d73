"""python -m pytest tests/test_knockout.py

Eq. 7, windows and curves: closed forms, and what an intervention must not change.
"""
import ast
import copy
import math
import random
from pathlib import Path

import pytest
import torch
import world

import knockout
import vicuna
from knockout import (
    causal,
    clean_pass,
    curve,
    cut,
    percent,
    probability,
    selfcheck,
    sweep,
    to_mask,
    token_layers,
    window,
)

ROOT = Path(__file__).resolve().parents[1]
VISUAL = ["llava-1.5", "llava-1.6", "llama3-next"]


@pytest.fixture(scope="module", params=VISUAL)
def case(request, model):
    """(model, prompt, embeddings, first answer token) of a question with every group."""
    m = model(request.param)
    p = m.prompt("Is the cup red or blue?", world.picture(90, 60), true_option="red", false_option="blue",
                 objects=["cup"], boxes=[(20, 10, 40, 30)])
    x = m.embed(p)
    return m, p, x, m.prefill(x)[0].argmax().item()


def forward(*args):
    """Logits (V,) of the last position."""
    return knockout.unembed(args[0], knockout.forward(*args)[0, -1])


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


def test_a_query_with_nothing_left_to_see_is_refused_by_position():
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
    with pytest.raises(FloatingPointError, match="--dtype"):
        probability(torch.tensor([0.0, math.nan]), 0)


# ---------------------------------------------------------------------------------------- what must not change

def test_cutting_nothing_is_the_plain_model_exactly(case):
    m, p, x, token = case
    clean, empty = masks(x, [], p.positions("question"))
    base = forward(m.decoder, x, clean, clean, ())
    assert torch.equal(forward(m.decoder, x, clean, empty, range(99)), base)
    assert torch.equal(forward(m.decoder, x, clean, masks(x, [0], [5])[1], ()), base)
    torch.testing.assert_close(base, m.prefill(x)[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(base, m.prefill(x, clean)[0])                # the very kernel of the cut runs


def test_with_the_image_cut_from_everything_after_it_the_answer_does_not_see_the_picture(case):
    m, p, x, token = case
    image = p.positions("image")
    after = list(range(image[-1] + 1, len(p)))
    other = x.clone()
    other[:, image] = torch.randn(len(image), x.shape[2], generator=torch.Generator().manual_seed(0))
    clean, blocked = masks(x, image, after)
    everywhere = range(len(m.decoder.layers))
    assert torch.equal(forward(m.decoder, x, clean, blocked, everywhere),
                       forward(m.decoder, other, clean, blocked, everywhere))
    assert not torch.equal(forward(m.decoder, x, clean, clean, ()), forward(m.decoder, other, clean, clean, ()))


def test_rows_before_the_target_and_layers_below_the_window_do_not_move(case):
    m, p, x, token = case
    question = p.positions("question")
    L = len(m.decoder.layers)
    clean = stream_of(m, x)
    for layer in range(L):
        layers = window(layer, 2, L)
        h = stream_of(m, x, masks(x, p.positions("image"), question)[1], layers)
        assert torch.equal(h[:, :question[0]], clean[:, :question[0]])
        assert torch.equal(h[:layers.start + 1], clean[:layers.start + 1])
        assert not torch.equal(h[layers.start + 1, question], clean[layers.start + 1, question])


def test_image_to_question_in_the_last_layer_alone_cannot_reach_the_answer(case):
    m, p, x, token = case
    p_base = probability(forward(m.decoder, x, *masks(x), ()), token)
    assert curve(m.decoder, x, p.positions("image"), p.positions("question"), token, 1)[-1] == p_base


def test_last_to_last_moves_only_the_last_row(case):
    m, p, x, token = case
    h = stream_of(m, x, masks(x, *[p.positions("last")] * 2)[1], range(99))
    clean = stream_of(m, x)
    assert torch.equal(h[:, :-1], clean[:, :-1]) and not torch.equal(h[:, -1], clean[:, -1])


def test_cutting_a_union_is_cutting_both_parts_at_once(case):
    m, p, x, token = case
    both = masks(x, p.positions("image+question"), p.positions("last"))[1]
    one_by_one = to_mask(cut(cut(causal(x.shape[1]), p.positions("image"), p.positions("last")),
                             p.positions("question"), p.positions("last")))
    assert torch.equal(both, one_by_one)
    newlines = p.groups.get("newlines", [])
    parts = p.positions("related_patches") + p.positions("other_patches") + newlines
    assert torch.equal(masks(x, parts, p.positions("question"))[1],
                       masks(x, p.positions("image"), p.positions("question"))[1])


def test_a_window_over_all_layers_is_the_same_point_for_every_layer(case):
    m, p, x, token = case
    points = curve(m.decoder, x, p.positions("question"), p.positions("last"), token, 99)
    assert len(points) == len(m.decoder.layers) and len(set(points)) == 1


@pytest.mark.parametrize("kernel", ["attend", "attend_fast"])
def test_both_kernels_give_the_same_curve(case, kernel, monkeypatch):
    m, p, x, token = case
    ours = curve(m.decoder, x, p.positions("image"), p.positions("question"), token, 3)
    monkeypatch.setattr(type(m.decoder.layers[0].self_attn), "kernel", staticmethod(getattr(m.decoder_file, kernel)))
    assert curve(m.decoder, x, p.positions("image"), p.positions("question"), token, 3) == pytest.approx(ours, rel=1e-5)


# ---------------------------------------------------------------------------------------------------- the sweep

def both(decoder, x, cuts, token, k, heads=None, **more):
    """The curves of all cuts, by the sweep and by the plain loop, as two tensors (cuts, L)."""
    swept = sweep(decoder, *clean_pass(decoder, x), cuts, token, k, heads, **more)
    return torch.tensor(swept), torch.tensor([curve(decoder, x, *c, token, k, heads) for c in cuts])


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_the_sweep_is_the_plain_loop_for_every_group(case, k):
    """All pairs of named groups that leave every row something to see, each with its own first row, in one call."""
    m, p, x, token = case
    groups, cuts = [p.positions(name) for name in p.groups], []
    for source in groups:
        for target in groups:
            if cut(causal(len(p)), source, target).any(-1).all():
                cuts.append((source, target))
    cuts = random.Random(k).sample(cuts, len(cuts) // 4)            # the others are spared: the suite is to be fast
    fast, slow = both(m.decoder, x, cuts, token, k)
    assert len(cuts) > 10 and len({min(target) for _, target in cuts}) > 4
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(6))
def test_the_sweep_is_the_plain_loop_for_random_edges_windows_heads_and_chunks(case, seed):
    """In float64, where only the softmax rounds to float32: what is left is not rounding of the layers."""
    m, p, x, token = case
    decoder, r = copy.deepcopy(m.decoder).double(), random.Random(seed)
    T, L, H = x.shape[1], len(decoder.layers), decoder.config.heads
    cuts = []
    for _ in range(3):
        target = sorted(r.sample(range(2, T), r.randint(1, 6)))
        cuts.append((sorted(r.sample(range(1, T), r.randint(1, T // 2))), target))      # key 0 is left to look at
    k, heads = r.randint(1, L + 2), r.choice([None, [0], sorted(r.sample(range(H), 2))])
    fast, slow = both(decoder, x.double(), cuts, token, k, heads, rows=r.choice([1, 100, 8192]))
    torch.testing.assert_close(fast, slow, rtol=1e-6, atol=0)


def test_an_edge_cut_for_all_heads_is_the_edge_and_for_some_heads_another(case):
    m, p, x, token = case
    clean, cuts = clean_pass(m.decoder, x), [(p.positions("image"), p.positions("question"))]
    H = m.decoder.config.heads
    whole, all_heads, one = (sweep(m.decoder, *clean, cuts, token, 3, heads)[0] for heads in (None, range(H), [1]))
    assert all_heads == pytest.approx(whole, rel=1e-6) and one != pytest.approx(whole, rel=1e-3)
    with pytest.raises(ValueError, match=f"head {H} .* heads 0 to {H - 1}"):
        sweep(m.decoder, *clean, cuts, token, 3, [0, H])


def test_a_sweep_takes_as_many_token_layers_as_it_says_and_reads_a_cache_that_has_grown(case, monkeypatch):
    m, p, x, token = case
    T, L = x.shape[1], len(m.decoder.layers)
    cuts = [(p.positions("image"), p.positions("question")), (p.positions("question"), p.positions("last"))]
    rows, mlp = [], m.decoder_file.MLP
    honest = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, h: rows.append(h.shape[:-1].numel()) or honest(self, h))
    stream, caches = clean_pass(m.decoder, x)
    fast = sweep(m.decoder, stream, caches, cuts, token, 3)
    assert sum(rows) == pytest.approx(T * L * token_layers(T, L, cuts, 3))
    monkeypatch.undo()
    m.decode(m.decoder.lm_head(m.decoder.norm(stream[-1][0, -1])), caches, 3)
    assert caches[0][0].shape[2] > T and sweep(m.decoder, stream, caches, cuts, token, 3) == fast


def test_the_clean_pass_is_the_model(case):
    m, p, x, token = case
    stream, caches = clean_pass(m.decoder, x)
    assert torch.equal(torch.cat(stream), stream_of(m, x))
    for ours, theirs in zip(caches, m.prefill(x, masks(x)[0])[1], strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_a_sweep_that_would_see_nothing_or_is_not_a_number_is_refused(case):
    m, p, x, token = case
    with pytest.raises(ValueError, match=r"query position\(s\) \[0\]"):
        sweep(m.decoder, *clean_pass(m.decoder, x), [([0], [0])], token, 3)
    x = x.clone()
    x[0, 3] = math.nan
    with pytest.raises(FloatingPointError, match="--dtype"):
        sweep(m.decoder, *clean_pass(m.decoder, x), [([1], [5])], token, 3)


@pytest.mark.parametrize("heads", [None, [0, 2]])
def test_the_masks_of_a_sweep_are_the_lower_rows_of_the_plain_ones_and_no_larger(case, heads, monkeypatch):
    m, p, x, token = case
    T, source, target = x.shape[1], p.positions("image"), p.positions("question")
    s, clean, honest, built = min(target), clean_pass(m.decoder, x), knockout.causal, []
    whole = knockout.blocked(m.decoder, T, source, target, heads)
    assert torch.equal(knockout.blocked(m.decoder, T, source, target, heads, s), whole[..., s:, :])
    with pytest.raises(ValueError, match=rf"\[{s}, {s + 1}\] may look at nothing"):
        knockout.blocked(m.decoder, T, range(T), [s, s + 1], heads, s)
    monkeypatch.setattr(knockout, "causal", lambda *shape, **how: built.append(shape) or honest(*shape, **how))
    sweep(m.decoder, *clean, [(source, target), (source, [T - 1])], token, 3, heads)
    assert set(built) == {(T - s, T), (1, T)}                       # (T, T) for each head is gigabytes with AnyRes


# ---------------------------------------------------------------------------------------------------- selfcheck

@pytest.mark.parametrize("edge", [("image", "question"), ("question", "last"), ("last", "last"), ("system", "image")])
def test_selfcheck_passes_on_every_kind_of_edge(case, edge):
    m, p, x, token = case
    for heads in (None, [1, 2]):
        results = selfcheck(m.decoder, x, clean_pass(m.decoder, x), *map(p.positions, edge), token, 3, heads)
        assert [passed for _, _, passed in results] == [True] * 5 + [None] * 2
        assert all(math.isfinite(value) for _, value, _ in results)


def test_selfcheck_catches_a_kernel_that_leaks(case, monkeypatch):
    """A mask of -5 instead of -inf: attention over cut edges is small, and must not pass for zero."""
    m, p, x, token = case
    attend = m.decoder_file.attend
    monkeypatch.setattr(type(m.decoder.layers[0].self_attn), "kernel",
                        staticmethod(lambda q, k, v, mask: attend(q, k, v, mask.clamp(min=-5.0))))
    results = selfcheck(m.decoder, x, clean_pass(m.decoder, x), p.positions("image"), p.positions("question"), token, 3)
    assert results[0][1] > 0 and results[0][2] is False


def test_selfcheck_catches_a_cut_that_reaches_other_rows(case, monkeypatch):
    m, p, x, token = case
    honest = knockout.blocked
    monkeypatch.setattr(knockout, "blocked", lambda decoder, T, source, target, heads=None, first=0: honest(
        decoder, T, source, [source[-1], *target] if source and not first else target, heads, first))
    results = selfcheck(m.decoder, x, clean_pass(m.decoder, x), p.positions("image"), p.positions("question"), token, 3)
    assert results[1][2] is False


def test_selfcheck_catches_a_sweep_that_is_not_the_plain_loop(case, monkeypatch):
    m, p, x, token = case
    honest = knockout.sweep
    monkeypatch.setattr(knockout, "sweep", lambda *a: [[1.01 * v for v in curve] for curve in honest(*a)])
    results = selfcheck(m.decoder, x, clean_pass(m.decoder, x), p.positions("image"), p.positions("question"), token, 3)
    assert [passed for _, _, passed in results] == [True] * 4 + [False] + [None] * 2
    assert results[4][1] == pytest.approx(0.01, rel=1e-2)


def test_the_random_control_is_of_the_same_size_and_drawn_by_seed(case):
    m, p, x, token = case
    source, target = p.positions("related_patches"), p.positions("question")
    clean = clean_pass(m.decoder, x)
    runs = [selfcheck(m.decoder, x, clean, source, target, token, 3, seed=seed)[-1] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] and runs[0][1] != runs[2][1]
    assert f"{len(source)} random tokens" in runs[0][0]


# ---------------------------------------------------------------------------------------------------- copies

@pytest.mark.parametrize("name", ["causal", "to_mask"])
def test_the_masks_of_knockout_are_the_decoders(name):
    def body(file):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        return next(ast.dump(node) for node in tree.body if getattr(node, "name", None) == name)
    assert body("knockout.py") == body("vicuna.py") == body("llama3.py")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_instrument_runs_in_every_dtype_and_an_empty_cut_is_exact_there(checkpoint, dtype):
    import llava_min
    m = llava_min.load(str(checkpoint("llava-1.5")), dtype=dtype, device="cpu")
    p = m.prompt("Is the cup red or blue?", world.picture(90, 60))
    x = m.embed(p)
    assert x.dtype == dtype and m.vision_tower.pre_layrnorm.weight.dtype == torch.float32
    clean, empty = masks(x, [], p.positions("question"))
    base = forward(m.decoder, x, clean, clean, ())
    assert torch.equal(forward(m.decoder, x, clean, empty, range(99)), base)
    moved = curve(m.decoder, x, p.positions("image"), p.positions("question"), base.argmax().item(), 9)
    assert all(math.isfinite(v) for v in moved) and moved[0] != probability(base, base.argmax().item())
