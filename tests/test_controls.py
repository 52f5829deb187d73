"""python -m pytest tests/test_controls.py

Random sources and targets, heads one by one and together: what they are, and that they are cut as they say.
"""
import itertools

import pytest
import torch
import world
from commands import read, refused

import heads
import knockout
from fork import additive, causal, clean_pass, unembed
from groups import EmptyGroup, random_sets
from harness.experiment import control_layers, control_pool
from knockout import Cut, curve, cut_ends, sweep, windows


@pytest.fixture(scope="module", params=["llava-1.5", "llama3-next"])
def case(request, model):
    """(decoder, embeddings, positions, clean pass, positions of image and question)."""
    m = model(request.param)
    p = m.prompt("Is the cup red or blue?", world.picture(90, 60))
    x = m.embed(p)
    start, end = p.parts["question"]
    question = [i for i, span in enumerate(p.spans) if span and start <= span[0] < end]
    return m.decoder, x, p.positions, clean_pass(m.decoder, x, p.positions), list(p.image), question


def test_random_sets_are_different_sorted_and_the_same_for_the_same_seed():
    sets = random_sets(range(50), 6, 20, "a")
    assert sets == random_sets(range(50), 6, 20, "a") != random_sets(range(50), 6, 20, "b")
    assert len({tuple(s) for s in sets}) == 20 and all(s == sorted(set(s)) and len(s) == 6 for s in sets)
    every = {tuple(s) for s in random_sets("abcde", 2, 10, 0)}      # as many as there are: each one once
    assert every == set(itertools.combinations("abcde", 2))
    with pytest.raises(EmptyGroup, match="5 positions hold 10 different sets of 2, not 11"):
        random_sets("abcde", 2, 11, 0)


def test_controls_are_drawn_from_what_the_edge_leaves():
    assert control_pool([3, 4], [6, 7], 9) == [1, 2, 3, 4, 5]
    assert control_pool([3, 4], [6, 7], 9, "target") == [5, 6, 7, 8]
    assert control_layers(32) == [9, 20, 31] and control_layers(10) == [2, 5, 9]
    assert control_layers(10, 4) == [0, 4, 8] and control_layers(2) == [0, 1]


def controlled(call, out, *argv):
    code, stdout, err = call(knockout.main, *argv, "--out", out)
    assert code == 0, err
    return read(out / "knockout.csv"), stdout


def test_the_mean_over_all_sources_of_a_size_is_the_enumerated_mean(call, checkpoint, model, photo, tmp_path):
    """Sources of one token: as many controls as there are positions to draw from, each one is cut once."""
    m = model("llava-1.5")
    p = m.prompt("Is it red?", photo)
    last, x = len(p) - 1, m.embed(p)
    pool = control_pool([last], [last], len(p))
    own = ("--model", checkpoint("llava-1.5"), "--image", photo, "--question", "Is it red?", "--window", 2,
           "--edge", "text:red->last", "--control-step", 2)
    rows, _ = controlled(call, tmp_path / "a", *own, "--control", len(pool))
    token = m.prefill(x, p.positions)[0].argmax().item()
    clean = clean_pass(m.decoder, x, p.positions)
    every = torch.tensor(sweep(m.decoder, clean, [([i], [last]) for i in pool], token, 2))       # (sources, L)
    for layer in (0, 2):
        mine = [float(r["p_knockout"]) for r in rows if "random source" in r["edge"] and int(r["layer"]) == layer]
        assert len(mine) == len(pool)
        assert sum(mine) / len(mine) == pytest.approx(every[:, layer].mean().item(), rel=1e-4)
    refused(call(knockout.main, *own, "--control", len(pool) + 1, "--out", tmp_path / "b"),
            f"--control {len(pool) + 1} of text:red->last", f"{len(pool)} positions hold {len(pool)} different sets")


def test_controls_do_not_depend_on_the_order_of_edges_nor_on_other_edges_and_plain_gives_the_same(
        call, checkpoint, data, tmp_path):
    base = ("--model", checkpoint("llava-1.5"), *data, "--all", "--window", 3, "--control", 3)
    both, _ = controlled(call, tmp_path / "a", *base, "--edge", "image->last", "objects->last")
    other, _ = controlled(call, tmp_path / "b", *base, "--edge", "objects->last", "image->last")
    one, _ = controlled(call, tmp_path / "c", *base, "--edge", "objects->last", "--plain")
    assert both == other
    mine = [r for r in both if r["edge"].startswith("objects->last")]
    assert [(r["question_id"], r["edge"], r["layer"]) for r in mine] == [
        (r["question_id"], r["edge"], r["layer"]) for r in one]
    names = list(dict.fromkeys(r["edge"] for r in mine))
    assert names == ["objects->last", *(f"objects->last, random source {i}" for i in (1, 2, 3))]
    for a, b in zip(mine, one, strict=True):
        assert float(a["p_knockout"]) == pytest.approx(float(b["p_knockout"]), rel=1e-5)
        assert float(a["logp_knockout"]) == pytest.approx(float(b["logp_knockout"]), rel=1e-4, abs=1e-5)
    seed, _ = controlled(call, tmp_path / "d", *base, "--edge", "objects->last", "--seed", 1)
    assert [r["p_knockout"] for r in seed] != [r["p_knockout"] for r in one]


def test_random_targets_keep_the_source(call, checkpoint, photo, tmp_path):
    rows, _ = controlled(call, tmp_path / "a", "--model", checkpoint("llava-1.5"), "--image", photo, "--question",
                         "Is it red?", "--edge", "image->last", "--control", 2, "--control-of", "target")
    assert {r["edge"] for r in rows} == {"image->last", *(f"image->last, random target {i}" for i in (1, 2))}


def test_a_question_without_enough_positions_has_no_control_and_the_run_says_so(call, checkpoint, data, tmp_path):
    rows, stdout = controlled(call, tmp_path / "a", "--model", checkpoint("llava-1.5"), *data, "--all", "--edge",
                              "last->last", "--control", 3, "--control-of", "target")
    assert {r["edge"] for r in rows} == {"last->last"}
    assert "control of last->last: no row for" in stdout and "not 3" in stdout


# ---------------------------------------------------------------------------------------------------- heads

def test_heads_alone_are_the_curves_of_these_heads(case):
    d, x, positions, clean, image, question = case
    L, H = len(d.layers), d.config.heads
    cuts = [Cut(image, question, heads.alone(windows(2, L), h)) for h in range(H)]
    ends = cut_ends(d, clean, cuts)
    for h, end in enumerate(ends):
        p = unembed(d, end[:, 0]).softmax(-1)[:, 5].tolist()
        assert p == pytest.approx(curve(d, x, positions, image, question, 5, 2, [h]), rel=1e-5)


def test_several_heads_in_several_layers_are_cut_together(case):
    """One branch against a loop with a mask of its own in each layer; an edge for all heads beside it."""
    d, x, positions, clean, image, question = case
    T, L, H = x.shape[1], len(d.layers), d.config.heads
    place = heads.together(windows(1, L), [(0, 1), (2, 0), (0, 0)])
    assert place == {0: (0, 1), 2: (0,)}
    ends, whole = cut_ends(d, clean, [Cut(image, question, [place]), Cut(image, question, windows(9, L))])
    h, (cos, sin) = x, d.rope(positions)
    for i, layer in enumerate(d.layers):
        blocked = i in place
        mask = knockout.edge_mask(d, T, image, question, place[i]) if blocked else additive(causal(T)).expand(H, T, T)
        h = layer(h, cos, sin, mask)
    torch.testing.assert_close(ends[0, 0], h[0, -1], rtol=1e-4, atol=1e-5)
    p = unembed(d, whole[:, 0]).softmax(-1)[:, 5].tolist()
    assert p == pytest.approx(curve(d, x, positions, image, question, 5, 9), rel=1e-5)


def test_windows_of_heads_overlap_once():
    assert heads.together(windows(3, 4), [(1, 2), (2, 2), (3, 0)]) == {0: (2,), 1: (2,), 2: (0, 2), 3: (0, 2)}


def test_per_head_ranks_heads_and_cuts_the_first_ones_beside_random_sets(call, checkpoint, data, model, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--per-head", 3, "--measure", "answer", "--out",
            tmp_path)
    code, stdout, err = call(knockout.main, *argv, "--edge", "image->last")
    assert code == 0, err
    rows, (L, H) = read(tmp_path / "heads.csv"), (4, 4)
    assert len(rows) == 3 * L * H and {r["window"] for r in rows} == {"1"}
    change = {}
    for r in rows:
        change.setdefault((int(r["layer"]), int(r["head"])), []).append(
            float(r["logp_per_token_knockout"]) - float(r["logp_per_token_base"]))
    top = sorted(change, key=lambda place: -abs(sum(change[place])))[:3]
    listed = [tuple(map(int, line.split()[1:3])) for line in stdout.splitlines() if line[:4].strip() in ("1", "2", "3")]
    assert listed == top and (tmp_path / "heads.png").exists()
    joint = read(next(tmp_path.glob("joint_answer_3_*.csv")))
    assert len(joint) == 3 * 11 and joint[0]["edge"] == "image->last, top 3 heads" and joint[0]["layer"] == ""
    assert "the top 3 heads together" in stdout and "10 random sets of as many" in stdout
    code, again, err = call(knockout.main, *argv, "--edge", "image->last")         # all questions are done: drawn again
    assert code == 0 and again == stdout, err
    few = ("--model", checkpoint("llava-1.5"), *data, "--all", "--per-head", 2, "--edge", "image->last", "--out",
           tmp_path / "few")
    for limit in (1, 3):                                            # a larger run may rank other heads first
        assert call(knockout.main, *few, "--limit", limit)[0] == 0
    every = (*few[:-1], tmp_path / "heads", "--heads", "1", "--limit", 1)
    refused(call(knockout.main, *every, "--per-head", 5), "--per-head 5: there are 4 heads to rank")
    code, stdout, err = call(knockout.main, *every, "--per-head", 4)
    assert code == 0 and "1 random sets of as many" in stdout, err   # all four: there is one set of them
    first, *others = read(next((tmp_path / "heads").glob("joint_first_4_*.csv")))
    assert len(others) == 1 and float(others[0]["p_knockout"]) == pytest.approx(float(first["p_knockout"]), rel=1e-5)
    refused(call(knockout.main, *argv, "--edge", "image->last", "--shard", "0/2"), "--per-head", "shards")
    refused(call(knockout.main, *data, "--control", 100_000_000, "--out", tmp_path / "no"), "--control", "1,000")
    refused(call(knockout.main, *argv), "--per-head", "one edge")
    refused(call(knockout.main, *argv, "--edge", "image->last", "question->last"), "one edge")
    refused(call(knockout.main, *argv, "--edge", "image->last", "--plain"), "--per-head and --plain")
    refused(call(knockout.main, *argv, "--edge", "image->last", "--control", 3), "--per-head and --control")


def test_a_margin_that_no_question_has_is_one_line(call, checkpoint, photo, tmp_path):
    own = ("--model", checkpoint("llava-1.5"), "--image", photo, "--question", "What is it?", "--edge", "image->last")
    refused(call(knockout.main, *own, "--measure", "margin", "--out", tmp_path), "--measure margin", "--options A,B")
    code, _, err = call(knockout.main, *own, "--options", "red,blue", "--measure", "margin", "--out", tmp_path / "b")
    assert code == 0, err
    rows = read(tmp_path / "b" / "knockout.csv")
    assert all(float(r["margin_base"]) and r["margin_knockout"] for r in rows)
