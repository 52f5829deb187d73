"""python -m pytest tests/test_maps.py

Attention against its definition, maps of cuts against knockout's own curves, blocks against the patches of the photo.
"""
import math

import pytest
import torch
import world
from commands import read, refused

import knockout
import maps
from fork import clean_pass
from groups import token_groups
from knockout import sweep, window
from maps import attention, blocks_of, cut_blocks
from score import Answer
from views import patch_boxes

KINDS = ["llava-1.5", "llava-1.6", "llama3-next", "onevision"]


@pytest.fixture(scope="module", params=KINDS)
def case(request, model):
    """(model, prompt, groups, clean pass)."""
    m = model(request.param)
    p = m.prompt("Is the cup red or blue?", world.picture(90, 60))
    return m, p, token_groups(p), clean_pass(m.decoder, m.embed(p), p.positions)


def test_attention_is_the_softmax_of_a_layers_own_queries_and_keys(case):
    m, p, g, clean = case
    d, queries = m.decoder, g.positions("question")
    for i in (0, len(d.layers) - 1):
        layer = d.layers[i]
        q, k, _ = layer.qkv(clean.stream[i], clean.cos, clean.sin)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))[0]
        scores = scores.masked_fill(~torch.ones(len(p), len(p), dtype=torch.bool).tril(), -math.inf)
        wanted = scores.softmax(-1)[:, queries]                     # (H, m, T)
        torch.testing.assert_close(attention(d, clean, i, queries), wanted.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(attention(d, clean, i, queries, 1), wanted[1], rtol=1e-5, atol=1e-6)
    rows = attention(d, clean, 1, queries)
    torch.testing.assert_close(rows.sum(-1), torch.ones(len(queries)))
    assert not rows[0, queries[0] + 1:].any()                       # a query attends to nothing after it
    with pytest.raises(ValueError, match="layers 0 to"):
        attention(d, clean, len(d.layers), queries)
    with pytest.raises(ValueError, match="heads 0 to"):
        attention(d, clean, 0, queries, d.config.heads)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_every_patch_is_in_one_block_and_a_block_is_side_by_side_in_one_view(case, side):
    m, p, g, clean = case
    blocks = blocks_of(p.slots, side)
    patches = [i for i, (view, *_) in enumerate(p.slots.tolist()) if view >= 0]
    assert sorted(i for block in blocks for i in block) == patches
    for block in blocks:
        view, row, column = p.slots[block].unbind(1)
        assert len(view.unique()) == 1 and len(block) <= side * side
        assert (row // side).unique().numel() == (column // side).unique().numel() == 1
    if side == 1:
        assert all(len(block) == 1 for block in blocks)


def test_a_map_of_patches_is_the_sweep_of_their_edges_and_one_block_of_all_is_image_to_question(case, monkeypatch):
    m, p, g, clean = case
    d, L, question = m.decoder, len(m.decoder.layers), g.positions("question")
    monkeypatch.setattr(maps, "TOGETHER", 3)                        # several passes
    answer = Answer((5,), pair=(0, 5, 6))
    patches = [[p.image.start + i for i in block] for block in blocks_of(p.slots)][:8]
    place = dict.fromkeys(window(1, 3, L))
    found = cut_blocks(d, clean, patches, question, [place, dict.fromkeys(range(L))], answer)
    wanted = [points[1] for points in sweep(d, clean, [(patch, question) for patch in patches], 5, 3)]
    assert found["p"][:, 0].tolist() == pytest.approx(wanted, rel=1e-5) and found["margin"].shape == (8, 2)
    whole = cut_blocks(d, clean, [g.positions("image")], question, [place], answer)
    assert whole["p"][0].tolist() == pytest.approx([sweep(d, clean, [(g.positions("image"), question)], 5, 3)[0][1]])


@pytest.mark.parametrize("kind", ["llava-1.5", "llava-1.6"])
def test_the_command_writes_a_row_per_block_with_its_place_and_the_numbers_of_knockout(call, checkpoint, model, photo,
                                                                                      tmp_path, kind):
    own = ("--model", checkpoint(kind), "--image", photo, "--question", "Is the cup red or blue?", "--options",
           "red,blue")
    code, stdout, err = call(maps.main, *own, "--tgt", "question", "--layer", 1, "--window", 3, "--measure", "margin",
                             "--out", tmp_path)
    assert code == 0 and "100%" in err and "pass/s" in err, err    # a bar over the cuts
    assert "Is the cup red or blue? " in stdout and (tmp_path / "map.png").exists()
    rows, m = read(tmp_path / "map.csv"), model(kind)
    p = m.prompt("Is the cup red or blue?", photo)
    boxes, blocks = patch_boxes(p.size, p.geometry), blocks_of(p.slots)
    assert tuple(rows[0]) == (*maps.COLUMNS, "model", "dtype") and len(rows) == len(blocks)
    for row, (i,) in zip(rows, blocks, strict=True):
        place = [float(row[name] or "nan") for name in ("x0", "y0", "x1", "y1")]
        assert place == pytest.approx(boxes[i].tolist(), nan_ok=True)
        assert int(row["view"]) == p.slots[i, 0]
    code, _, err = call(knockout.main, *own, "--src", "image", "--tgt", "question", "--window", 3, "--out",
                        tmp_path / "whole")
    assert code == 0, err
    code, _, err = call(maps.main, *own, "--tgt", "question", "--layer", 1, "--window", 3, "--block", 99, "--map",
                        "knockout", "--out", tmp_path / "one")
    assert code == 0, err
    one = read(tmp_path / "one" / "map.csv")
    if kind == "llava-1.5":                                         # one view: one block is the whole image
        edge = read(tmp_path / "whole" / "knockout.csv")[1]
        assert len(one) == 1 and float(one[0]["p_knockout"]) == pytest.approx(float(edge["p_knockout"]), rel=1e-5)
        assert float(one[0]["change_percent"]) == pytest.approx(float(edge["change_percent"]), abs=1e-3)
    assert {r["attention"] for r in one} == {""}


def test_a_map_that_cannot_be_made_is_one_line(call, checkpoint, photo, tmp_path):
    own = ("--model", checkpoint("llava-1.5"), "--image", photo, "--question", "What is it?", "--out", tmp_path)
    refused(call(maps.main, *own, "--measure", "margin"), "--measure margin", "--options A,B")
    refused(call(maps.main, *own, "--layer", 9), "--layer 9", "layers 0 to 3")
    refused(call(maps.main, *own, "--layer", -1, "--map", "knockout"), "--layer -1", "layers 0 to 3")
    refused(call(maps.main, *own, "--head", 9), "head 9", "heads 0 to 3")
    refused(call(maps.main, *own, "--tgt", "sky"), "unknown token group")
    refused(call(maps.main, *own, "--tgt", "system"), "--tgt system comes before the image")
    text = ("--model", checkpoint("vicuna"), "--question", "What is it?", "--out", tmp_path)
    refused(call(maps.main, *text), "text-only")
