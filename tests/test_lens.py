"""python -m pytest tests/test_lens.py

Logit lens, module knockout and Jaccard: closed forms, the plain loops, and the command line.
"""
import copy
import csv
import math

import pytest
import torch
import world
from commands import read, refused
from PIL import Image

import lens
from fork import causal, clean_pass, run_branches, to_mask, unembed
from groups import token_groups
from knockout import edge_mask, forward, window
from views import open_image

VISUAL = ["llava-1.5", "llava-1.6", "llama3-next"]


@pytest.fixture(scope="module", params=VISUAL)
def case(request, model):
    """(float64 decoder, prompt, its groups, embeddings and clean pass): no tie between words is decided by rounding."""
    m = model(request.param)
    p = m.prompt("Is the cup red or blue?", world.picture(90, 60))
    g = token_groups(p, true_option="red", false_option="blue", objects=["cup"], boxes=[(20, 10, 40, 30)])
    x, decoder = m.embed(p).double(), copy.deepcopy(m.decoder).double()
    return decoder, p, g, x, clean_pass(decoder, x, p.positions)


# ---------------------------------------------------------------------------------------------------- the lens

def test_the_last_layers_lens_is_the_models_output_whatever_the_norm(case):
    decoder, p, g, x, clean = case
    output = unembed(decoder, decoder(x, p.positions))[0].float().softmax(-1)
    for norm in ("raw", "final"):
        got = lens.lens(decoder, clean.stream, [3, len(p) - 1], norm)
        assert got.shape == (len(decoder.layers) + 1, 2, decoder.config.vocab)
        torch.testing.assert_close(got[-1], output[[3, -1]])
        torch.testing.assert_close(got.sum(-1), torch.ones(got.shape[:2]))


def test_below_the_top_raw_reads_the_residual_stream_itself_and_final_its_norm(case):
    decoder, p, g, x, clean = case
    raw, final = (lens.lens(decoder, clean.stream, [-1], norm)[:, 0] for norm in ("raw", "final"))
    for layer, h in enumerate(clean.stream[:-1]):
        torch.testing.assert_close(raw[layer], (decoder.lm_head.weight @ h[0, -1]).float().softmax(-1))
        unit = h[0, -1] / (h[0, -1].square().mean() + decoder.config.norm_eps).sqrt() * decoder.norm.weight
        torch.testing.assert_close(final[layer], (decoder.lm_head.weight @ unit).float().softmax(-1))


def test_top_words_are_those_of_the_lens_at_any_number_of_positions(case):
    decoder, p, g, x, clean = case
    values, ids = lens.top_words(decoder, clean.stream, list(range(len(p))), 3, "final")
    whole = lens.lens(decoder, clean.stream, list(range(len(p))), "final").topk(3)
    assert torch.equal(ids, whole.indices) and torch.equal(values, whole.values)


# ---------------------------------------------------------------------------------------------------- Jaccard

def test_jaccard_is_the_shared_part():
    assert lens.jaccard({1, 2, 3}, {2, 3, 4}) == 0.5
    assert lens.jaccard({1}, {1}) == 1 and lens.jaccard({1}, {2}) == 0


def test_a_word_set_is_the_union_of_the_most_probable_words_over_positions(case):
    decoder, p, g, x, clean = case
    last = clean.stream[-1][0]
    several = torch.stack([last[:4], last[2:6]] * 6)                # more than go in one step
    for got, part in zip(lens.word_sets(decoder, several, 3), several, strict=True):
        assert got == {i for logits in unembed(decoder, part) for i in logits.topk(3).indices.tolist()}


def test_an_intervention_that_is_none_has_jaccard_1(case):
    decoder, p, g, x, clean = case
    question = g.positions("question")
    L, T, s = len(decoder.layers), len(p), min(question)
    assert lens.edge_curve(decoder, clean, [], question, question, 3) == [1] * L
    assert lens.edge_curve(decoder, clean, g.positions("image"), g.positions("last"), question, 3) == [1] * L
    mask = to_mask(causal(T))[s:].double().expand(2, 1, -1, -1)
    assert lens.compare(decoder, clean, mask, [dict.fromkeys(range(L), 1)], question,
                        lambda layer, site, x, which, at: 1 * x) == [1]


def test_without_both_modules_in_all_layers_the_embeddings_words_are_left(case):
    decoder, p, g, x, clean = case
    question = g.positions("question")
    s, T, L = min(question), len(p), len(decoder.layers)
    read, gate = [i - s for i in question], torch.ones(T - s, 1).double()
    gate[read] = 0
    mask = to_mask(causal(T))[s:].double().expand(2, 1, -1, -1)
    left = run_branches(decoder, clean, mask, [dict.fromkeys(range(L), 1)], read,
                        lambda layer, site, x, which, at: x if site == "stream" else x * gate[at])
    assert torch.equal(left[0], x[0, question])
    for module in lens.MODULES:                                     # the plain way: one module, then the other
        assert not torch.equal(lens.without(decoder, x, p.positions, list(range(T)), module, range(L)), x)


def test_the_plain_way_without_a_module_leaves_only_the_other_ones_outputs(case):
    """In layer 0 alone, at all tokens: x + f(x) without attention, x + a(x) without the MLP; then the other layers."""
    decoder, p, g, x, _ = case
    first, mask = decoder.layers[0], to_mask(causal(len(p)))
    cos, sin = decoder.rope(torch.arange(len(p)))
    rest = decoder.layers[1:]
    for module, h in (("attention", x + first.mlp(x)), ("mlp", x + first.attend(*first.qkv(x, cos, sin), mask))):
        for layer in rest:
            h = layer(h, cos, sin, mask)
        got = lens.without(decoder, x, p.positions, list(range(len(p))), module, range(1))
        torch.testing.assert_close(got, h)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_module_curves_are_the_plain_loops(case, k):
    decoder, p, g, x, clean = case
    question, L = g.positions("question"), len(decoder.layers)
    words, = lens.word_sets(decoder, clean.stream[-1][:, question])
    curves = lens.module_curves(decoder, clean, question, k)
    for module in lens.MODULES:
        plain = [lens.without(decoder, x, p.positions, question, module, range(l, min(l + k, L))) for l in range(L)]
        assert curves[module] == [lens.jaccard(words, lens.word_sets(decoder, h[:, question])[0]) for h in plain]
    assert curves["attention"] != curves["mlp"] and min(curves["mlp"]) < 1


@pytest.mark.parametrize("edge", [("image", "question"), ("system", "image"), ("question", "question"),
                                  ("true_option", "last")])
def test_edge_curves_are_the_plain_loops(case, edge):
    decoder, p, g, x, clean = case
    source, target = map(g.positions, edge)
    question, L, T = g.positions("question"), len(decoder.layers), len(p)
    if edge == ("question", "question"):
        target = target[1:]
    words, = lens.word_sets(decoder, clean.stream[-1][:, question])
    whole, cut = to_mask(causal(T)), edge_mask(decoder, T, source, target)
    plain = [forward(decoder, x, p.positions, whole, cut, window(l, 3, L))[:, question] for l in range(L)]
    wanted = [lens.jaccard(words, lens.word_sets(decoder, h)[0]) for h in plain]
    assert lens.edge_curve(decoder, clean, source, target, question, 3) == wanted
    assert (min(wanted) < 1) == (edge != ("true_option", "last"))


def test_a_module_window_starts_at_its_layer():
    assert lens.onward(0, 9, 40) == range(0, 9) and lens.onward(35, 9, 40) == range(35, 40)


# ---------------------------------------------------------------------------------------------------- command line

@pytest.mark.parametrize("norm", ["raw", "final"])
def test_lens_writes_a_row_per_question_layer_and_word(call, data, checkpoint, model, tmp_path, norm):
    out = tmp_path / "out"
    code, stdout, err = call(lens.main, "--model", checkpoint("llava-1.5"), *data, "--all", "--norm", norm, "--dtype",
                             "float32", "--out", out)
    assert code == 0, err
    rows, m = read(out / "lens.csv"), model("llava-1.5")
    L = len(m.decoder.layers)
    kinds = ["answer_lower", "answer_capitalized", "false_lower", "false_capitalized"]
    assert tuple(rows[0]) == (*lens.COLUMNS["lens.csv"], "model", "dtype")
    assert [(r["question_id"], r["kind"], int(r["layer"])) for r in rows] == [
        (q, kind, l) for q in ("01", "02", "03") for kind in kinds for l in range(L + 1)]
    first = {r["kind"]: r["word"] for r in rows if r["question_id"] == "01"}
    assert first == dict(zip(kinds, ("red", "Red", "blue", "Blue"), strict=True))
    assert {r["norm"] for r in rows} == {norm}
    p = m.prompt("Is the cup red or blue?", Image.open(tmp_path / "a.jpg"))
    output = m(p)[0, -1].softmax(-1)
    top = next(r for r in rows if r["kind"] == "answer_capitalized" and r["layer"] == str(L))
    assert float(top["probability"]) == pytest.approx(output[m.tokenizer.token_to_id(top["token"])].item(), rel=1e-5)
    assert Image.open(out / "lens.png").size[0] > 300 and "highest mean probability" in stdout
    refused(call(lens.main, "--model", checkpoint("llava-1.5"), *data, "--all", "--dtype", "float32", "--norm",
                 "raw" if norm == "final" else "final", "--out", out), "norm", out)


def test_jaccard_of_modules_and_edges_and_their_plain_way(call, data, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.6"), *data, "--all", "--modules", "--edge", "image->question",
            "Image->Last", "--window", 2, "--dtype", "float32")
    code, stdout, err = call(lens.main, *argv, "--out", tmp_path / "fast")
    assert code == 0, err
    assert call(lens.main, *argv, "--plain", "--out", tmp_path / "slow")[0] == 0
    fast, slow = (read(tmp_path / d / "jaccard.csv") for d in ("fast", "slow"))
    assert fast == slow and tuple(fast[0]) == (*lens.COLUMNS["jaccard.csv"], "model", "dtype")
    assert {r["intervention"] for r in fast} == {"no attention", "no mlp", "image->question", "image->last"}
    assert {r["jaccard"] for r in fast if r["intervention"] == "image->last"} == {"1.0"}
    assert all(0 <= float(r["jaccard"]) <= 1 for r in fast) and "lowest mean Jaccard" in stdout
    assert Image.open(tmp_path / "fast" / "jaccard.png").size[0] > 300


@pytest.mark.parametrize("kind, at, places", [("llava-1.5", "last", 1), ("llava-1.6", "question", 9),
                                              ("llava-1.6", "image", None), ("llama3-next", "base_patches", None)])
def test_top_shows_the_most_probable_words_as_table_file_and_picture(call, photo, checkpoint, model, tmp_path, kind,
                                                                 at, places):
    out = tmp_path / "out"
    code, stdout, err = call(lens.main, "--model", checkpoint(kind), "--image", photo, "--question",
                             "Is the cup red or blue?", "--top", 2, "--at", at, "--dtype", "float32", "--out", out)
    assert code == 0, err
    m = model(kind)
    p = m.prompt("Is the cup red or blue?", open_image(photo))
    positions, L = token_groups(p).positions(at), len(m.decoder.layers)
    assert places in (None, len(positions))
    with open(out / "top.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == (L + 1) * len(positions) * 2 and tuple(rows[0]) == (*lens.COLUMNS["top.csv"], "model", "dtype")
    stream = clean_pass(m.decoder, m.embed(p), p.positions).stream
    ours = lens.lens(m.decoder, stream, positions, "raw").topk(2)
    assert [float(r["probability"]) for r in rows] == pytest.approx(ours.values.flatten().tolist(), rel=1e-4)
    assert [int(r["position"]) for r in rows[:2 * len(positions):2]] == positions
    assert len([line for line in stdout.splitlines() if line[:5].strip().isdecimal()]) == L + 1
    assert min(Image.open(out / "top.png").size) > 200


def test_what_cannot_be_shown_is_refused(call, photo, data, checkpoint, tmp_path):
    own = ("--model", checkpoint("llava-1.5"), "--image", photo, "--question", "Is the cup red or blue?", "--out",
           tmp_path / "out")
    refused(call(lens.main, *own, "--top", 2, "--modules"), "--top", "cannot be combined")
    refused(call(lens.main, *own, "--at", "question"), "--at goes with --top")
    refused(call(lens.main, *own, "--top", 2, "--at", "true_option"), "true_option")
    refused(call(lens.main, *own, "--top", 2, "--at", "quest"), "quest")
    refused(call(lens.main, *own, "--top", 2, "--at", "image", "--layer", 99), "--layer takes 0 to")
    refused(call(lens.main, *own, "--top", 2, "--layer", 1), "--layer is for patches")
    refused(call(lens.main, *own, "--top", 10 ** 6), "--top", "vocabulary")
    refused(call(lens.main, *own, "--edge", "objects->question"), "objects")
    refused(call(lens.main, *own, "--norm", "both"), "--norm")


def test_without_a_known_answer_the_lens_follows_the_models_own(call, photo, checkpoint, tmp_path):
    code, stdout, err = call(lens.main, "--model", checkpoint("llava-1.5"), "--image", photo, "--question",
                             "What is this?", "--out", tmp_path / "out")
    assert code == 0, err
    rows = read(tmp_path / "out" / "lens.csv")
    assert {r["kind"] for r in rows} == {"answer_lower", "answer_capitalized"}
    assert {r["word"].lower() for r in rows} == {rows[0]["prediction"].lower()} and rows[0]["answer"] == ""
    assert all(math.isfinite(float(r["probability"])) for r in rows)
