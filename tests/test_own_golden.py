"""python -m pytest tests/test_own_golden.py

Our models against tests/golden/*.json, which golden/make_golden.py made with transformers (eager attention, float32),
sentencepiece and a few lines of PIL, on the tiny checkpoints of world.py.
"""
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import world

import vicuna
from groups import token_groups
from views import best_canvas

GOLDEN = {kind: json.loads((Path(__file__).parent / "golden" / f"{kind}.json").read_text()) for kind in world.KINDS}
CASES = [pytest.param(kind, case, id=f"{kind}-{i}") for kind in world.KINDS
         for i, case in enumerate(GOLDEN[kind]["cases"])]
every_case = pytest.mark.parametrize("kind, case", CASES)


def prompt(model, case):
    image = world.picture(*case["picture"]) if case["picture"] else None
    return model.prompt(case["question"], image, captions=case["captions"])


def close(ours, theirs, rel=0.0, abs=0.0):
    torch.testing.assert_close(torch.as_tensor(ours, dtype=torch.float32), torch.tensor(theirs), rtol=rel, atol=abs)


def test_every_kind_has_golden_cases_of_every_shape_of_picture():
    for kind, k in world.KINDS.items():
        sizes = [tuple(case["picture"] or ()) for case in GOLDEN[kind]["cases"]]
        assert sizes == world.PICTURES if k.image else sizes == [()] * 3
    assert {case["views"] for case in GOLDEN["llava-1.6"]["cases"]} == {3, 5}
    assert {case["views"] for case in GOLDEN["llama3-next"]["cases"]} == {4, 5}


@pytest.mark.parametrize("size", world.PICTURES)
def test_pillow_draws_the_pictures_the_golden_numbers_were_made_from(size):
    (case, *_) = [case for case in GOLDEN["llava-1.5"]["cases"] if tuple(case["picture"]) == size]
    assert hashlib.sha256(world.picture(*size).tobytes()).hexdigest() == case["picture_sha256"]


@every_case
def test_a_prompt_has_the_reference_token_ids(model, kind, case):
    p = prompt(model(kind), case)
    g = token_groups(p)
    assert p.ids == case["ids"]
    assert p.positions.tolist() == list(range(len(p)))
    assert g.positions("question") == case["question_positions"]
    assert g.positions("last") == [len(p) - 1]


@every_case
def test_image_tokens_are_as_many_and_as_long_as_the_references(model, kind, case):
    m, p = model(kind), prompt(model(kind), case)
    if not case["picture"]:
        assert "image" not in token_groups(p).named and len(p.image) == 0
        return
    assert token_groups(p).positions("image") == list(p.image)
    assert len(p.image) == case["image_tokens"]
    assert len(p.pixels) == case["views"]
    with torch.inference_mode():
        features = m.image_features(p)
    assert len(features) == case["image_tokens"]
    for row, values in case["features"].items():
        close(features[int(row)], values, rel=1e-5, abs=2e-5)


@pytest.mark.parametrize("first", range(5))
def test_of_canvases_that_keep_a_whole_photo_the_least_waste_wins_wherever_it_stands(model, first):
    g = model("llava-1.6").config.geometry
    g = replace(g, pinpoints=g.pinpoints[first:] + g.pinpoints[:first])
    assert best_canvas((100, 37), g) == (112, 56)                   # 112x112 and 168x56 keep every pixel too


@every_case
def test_every_layers_residual_stream_has_the_reference_norms(model, kind, case):
    m, p = model(kind), prompt(model(kind), case)
    x, at = m.embed(p), case["norm_positions"]
    cos, sin = m.decoder.rope(p.positions)
    with torch.inference_mode():
        norms = [x[0, at].norm(dim=-1)]
        for layer in m.decoder.layers:
            x = layer(x, cos, sin, None)
            norms.append(x[0, at].norm(dim=-1))
        norms[-1] = m.decoder.norm(x)[0, at].norm(dim=-1)           # transformers norms its last hidden state
    close(torch.stack(norms), case["norms"], rel=2e-5)


@every_case
def test_the_last_position_has_the_reference_logits(model, kind, case):
    m, p = model(kind), prompt(model(kind), case)
    with torch.inference_mode():
        logits = m(p)[0, -1]
    ids, values = zip(*case["top20"], strict=True)
    assert len(logits) == world.vocab_size(kind)                    # the padded rows take no part in the softmax
    close(logits[list(ids)], values, abs=1e-4)
    close(logits.logsumexp(0), case["logsumexp"], abs=1e-4)
    assert set(logits.topk(5).indices.tolist()) <= set(ids)


@every_case
def test_greedy_decoding_gives_the_reference_ids(model, kind, case):
    m, p = model(kind), prompt(model(kind), case)
    assert m.decode(*m.prefill(m.embed(p), p.positions), len(p), 4) == [case["greedy"]]


@every_case
@pytest.mark.parametrize("kernel", [vicuna.attend, vicuna.attend_fast])
def test_a_loop_over_layers_with_a_cut_mask_gives_the_reference_knockouts(model, kind, case, kernel, monkeypatch):
    m, p = model(kind), prompt(model(kind), case)
    monkeypatch.setattr(type(m.decoder.layers[0]), "kernel", staticmethod(kernel))
    x, L = m.embed(p), len(m.decoder.layers)
    cos, sin = m.decoder.rope(p.positions)

    @torch.inference_mode()
    def probability(source, target, layers):
        keep = vicuna.causal(len(p))
        clean = vicuna.to_mask(keep)
        keep[torch.tensor(target)[:, None], source] = False
        h, cut = x, vicuna.to_mask(keep)
        for i, layer in enumerate(m.decoder.layers):
            h = layer(h, cos, sin, cut if i in layers else clean)
        return m.decoder.lm_head(m.decoder.norm(h[0, -1])).softmax(-1)[case["greedy"][0]].item()

    close(probability([0], [1], ()), case["p_base"], rel=1e-4)      # no layer is cut: nothing changes
    moved = 0.0
    for edge, windows in case["knockout"].items():
        source, target = map(token_groups(p).positions, edge.split("->"))
        for k, theirs in windows.items():
            ours = [probability(source, target, range(max(0, l - int(k) // 2), min(L, l - (-int(k) // 2))))
                    for l in range(L)]
            close(ours, theirs, rel=1e-4)
            moved = max(moved, *(abs(q / case["p_base"] - 1) for q in theirs))
    assert moved > 0.1                                              # a test that could not fail would show nothing
