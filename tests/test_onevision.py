"""python -m pytest tests/test_onevision.py

LLaVA-OneVision against ../shared/golden/onevision: numbers that the original (LLaVA-NeXT) and the paper's hooks made on
two tiny random checkpoints, in the original's and in transformers' layouts; token counts at the published size. Skipped
where the folder is absent; tests/test_contract.py and test_views.py cover the same ground with checkpoints of our own.
"""
import functools
import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import read

import fork
import knockout
import lens
import llava_onevision
import qwen2
from harness import hub
from harness.questions import read_csv
from views import best_canvas, patch_slots, tile_map

G = Path(__file__).resolve().parents[2] / "shared" / "golden"
O = G / "onevision"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not O.is_dir(), reason="../shared/golden/onevision is not here")]
NAMES = ["tiny-onevision", "tiny-onevision-tied"]
LAYOUTS = ["", "-hf-4.45", "-hf"]
every_name = pytest.mark.parametrize("name", NAMES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["original", "hf-4.45", "hf"])


@functools.cache
def model(name, layout="", dtype=torch.float32):
    folder = O / name / "checkpoint" if not layout else O / f"{name}{layout}"
    return hub.load(hub.resolve(str(folder), vision_tower=None if layout else str(O / name / "siglip")),
                    dtype=str(dtype).removeprefix("torch."), device="cpu")


@functools.cache
def golden(name):
    return json.loads((O / name / "golden.json").read_text())


@functools.cache
def tensors(name):
    from safetensors.torch import load_file
    return load_file(O / name / "golden.safetensors")


@functools.cache
def questions():
    found = {}
    for file in sorted((O / "rows").glob("*.csv")):
        folder = O / "images" if "Extreme" in file.name else G / "setA" / "images"
        found |= {q.key: q for q in read_csv(file, folder)}
    return found


@functools.cache
def prompt(name, key, layout=""):
    return questions()[key].prompt(model(name, layout))


@every_layout
@every_name
def test_prompts_counts_and_positions_are_the_originals(name, layout):
    for row in golden(name)["rows"][::3 if layout else 1]:
        p = prompt(name, row["key"], layout)
        assert (p.text, p.ids) == (row["prompt"], row["input_ids"]), row["key"]
        assert (len(p), len(p.image)) == (row["sequence_length"], row["num_image_tokens"])
        g = questions()[row["key"]].groups(p, paper_spans=True)
        assert [g.positions("image")[0], g.positions("image")[-1] + 1] == row["ranges"]["image"]
        assert g.positions("newlines") == row["ranges"]["newline"]
        for group in ("question", "last"):
            assert g.positions(group) == row["ranges"][group], (row["key"], group)
        x = row["image_layout"]
        rows, cols = tile_map(p.size, p.geometry)
        assert [rows.start, rows.start + rows.kept] == x["kept_rows"] and [rows.out, cols.out] == x["out_hw"]
        assert [cols.start, cols.start + cols.kept] == x["kept_cols"]


@every_name
def test_pixels_features_embeddings_and_streams_are_the_originals(name):
    m, t = model(name), tensors(name)
    keys = {row["key"]: row["key"].replace("/", ".") for row in golden(name)["rows"]}
    checked = 0
    for key, dotted in keys.items():
        if f"{dotted}.views_uint8" not in t:
            continue
        p = prompt(name, key)
        u8 = t[f"{dotted}.views_uint8"].numpy()
        pixels = ((u8 * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
        assert torch.equal(p.pixels, torch.from_numpy(pixels))
        with torch.inference_mode():
            features = m.vision_tower.features(p.pixels, m.config.layer)
            torch.testing.assert_close(features, t[f"{dotted}.vision_features"], atol=1e-4, rtol=0)
            torch.testing.assert_close(m.mm_projector(features), t[f"{dotted}.projected_features"], atol=1e-4, rtol=0)
        x = m.embed(p)
        torch.testing.assert_close(x[0], t[f"{dotted}.inputs_embeds"], atol=1e-4, rtol=0)
        states = t[f"{dotted}.hidden_states"]
        clean = fork.clean_pass(m.decoder, x, p.positions)
        for ours, theirs in zip(clean.stream[:-1], states[:-1], strict=True):
            torch.testing.assert_close(ours[0], theirs, atol=1e-4, rtol=0)
        torch.testing.assert_close(m.decoder.norm(clean.stream[-1])[0], states[-1], atol=1e-4, rtol=0)
        logits = t[f"{dotted}.last_logits"]
        torch.testing.assert_close(fork.unembed(m.decoder, clean.stream[-1][0, -1]), logits[:m.config.text.vocab],
                                   atol=1e-4, rtol=0)
        checked += 1
    assert checked == 3


def test_the_pixels_of_every_row_are_the_originals():
    from PIL import __version__ as pillow
    for name in NAMES:
        for row in golden(name)["rows"]:
            if pillow < "13" or row["pillow13_identical"]:
                data = prompt(name, row["key"]).pixels.numpy().tobytes()
                assert hashlib.sha256(data).hexdigest() == row["pixel_values_sha256"], row["key"]


PAPERS = {"Question->Last": ("question", "last"), "Image->Last": ("image", "last"),
          "Image->Question": ("image", "question"), "Last->Last": ("last", "last")}


@every_layout
@every_name
def test_answers_and_every_edge_window_and_layer_are_the_papers(name, layout):
    """A softmax is over the words that the layout knows of: the tokenizer's, or those below <image> (HF)."""
    m, compared, part = model(name, layout), 0, "_text_rows" if layout else ""
    for row in golden(name)["rows"][::2 if layout == "" else 8]:
        p, base = prompt(name, row["key"], layout), row["base"]
        x, g = m.embed(p), questions()[row["key"]].groups(p, paper_spans=True)
        clean = fork.clean_pass(m.decoder, x, p.positions)
        logits, token = fork.unembed(m.decoder, clean.stream[-1][0, -1]), base["first_token_id"]
        assert logits.argmax().item() == token
        assert fork.probability(logits, token) == pytest.approx(base[f"p1{part}"], rel=1e-4)
        words = m.decode(logits[None], clean.caches, len(p), 5)[0]
        assert words == base["greedy_ids"][:len(words)]
        assert len(words) == 5 or base["greedy_ids"][len(words)] in m.stop
        cuts = [[g.positions(group) for group in PAPERS[edge]] for edge in PAPERS]
        for k in (1, 3, 9):
            curves = knockout.sweep(m.decoder, clean, cuts, token, k)
            for edge, ours in zip(PAPERS, curves, strict=True):
                theirs = row["flows"][edge][str(k)]
                assert ours == pytest.approx(theirs[f"p2{part}"], rel=1e-4), (row["key"], edge, k)
                compared += 1
    assert compared >= 48


@every_name
def test_the_lens_is_the_papers(name):
    m = model(name)
    for row in golden(name)["rows"][::2]:
        p, official = prompt(name, row["key"]), row["logit_lens"]
        clean = fork.clean_pass(m.decoder, m.embed(p), p.positions)
        shares = lens.lens(m.decoder, clean.stream, [-1], "raw")[:, 0]
        for theirs in official["words"].values():
            assert (100 * shares[:, theirs["token_id"]]).tolist() == pytest.approx(theirs["percent"], rel=2e-4)
        for layer, top in enumerate(official["top5"]):
            assert shares[layer].topk(5).values.tolist() == pytest.approx([value for _, value in top], rel=2e-4)


@every_name
def test_every_layout_fills_the_same_parameters(name):
    ours = dict(model(name).named_parameters())
    assert ("decoder.lm_head.weight" in ours) == ("tied" not in name)
    for layout in LAYOUTS[1:]:
        theirs = dict(model(name, layout).named_parameters())
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():                          # below <image>, the rows are the same words
            assert torch.equal(ours[key][:len(tensor)], tensor), key


def real():
    """A shell of the published 0.5B, without weights, with the published tokenizer."""
    config = llava_onevision.Config.from_hf({"model_type": "llava_onevision", "text_config": {"hidden_size": 896,
                                             "num_attention_heads": 14, "num_key_value_heads": 2}})
    with torch.device("meta"):
        return llava_onevision.LLaVA(config)


def test_at_real_geometry_grids_maps_and_counts_are_the_originals():
    found, g = json.loads((O / "real_geometry.json").read_text()), real().config.geometry
    for size, theirs in (found["sizes_of_the_5525_rows"] | found["other_sizes"]).items():
        size = tuple(map(int, size.split("x")))
        rows, cols = tile_map(size, g)
        assert [side // 384 for side in best_canvas(size, g)] == theirs["grid_wh"]
        assert [rows.kept, cols.kept] == theirs["kept_hw"] and [rows.out, cols.out] == theirs["out_hw"], size
        assert len(patch_slots(size, g)) == theirs["num_image_tokens"]


def test_at_real_geometry_ids_and_positions_are_the_originals(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes(gzip.decompress((O / "qwen2-tokenizer" / f"{name}.gz").read_bytes()))
    m = real()
    m.tokenizer = qwen2.load_tokenizer(tmp_path)
    assert m.tokenizer.get_vocab_size() == 151646
    for theirs in json.loads((O / "real_geometry.json").read_text())["prompts"]:
        q = questions()[theirs["key"]]
        p = q.prompt(m)
        assert (p.text, p.ids) == (theirs["prompt"], theirs["input_ids"])
        assert (len(p.image), len(p)) == (theirs["num_image_tokens"], theirs["sequence_length"])
        g = q.groups(p, paper_spans=True)
        for group in ("image", "question"):
            start, end = theirs["ranges"][group]
            assert g.positions(group) == list(range(start, end))
        assert g.positions("last") == [theirs["ranges"]["last"]]


@every_name
def test_knockout_as_a_command_gives_the_golden_numbers(name, call, tmp_path):
    code, _, err = call(knockout.main, "--model", O / name / "checkpoint", "--vision-tower", O / name / "siglip",
                        "--data", *sorted((O / "rows").glob("GQA*.csv")), "--images", G / "setA" / "images", "--all",
                        "--limit", 1, "--edge", "image->question", "question->last", "--window", 3, "--out", tmp_path)
    assert code == 0, err
    official = {row["key"]: row["flows"] for row in golden(name)["rows"]}
    papers = {"image->question": "Image->Question", "question->last": "Question->Last"}
    rows = read(tmp_path / "knockout.csv")
    for row in rows:
        theirs = official[f"{row['task']}/{row['question_id']}"][papers[row["edge"]]]["3"]
        assert float(row["p_knockout"]) == pytest.approx(theirs["p2"][int(row["layer"])], rel=1e-4)
    assert len(rows) == 6 * 2 * 6


def test_transformers_own_prompt_has_no_system_turn():
    m = hub.load(str(O / "tiny-onevision-hf"), dtype="float32", device="cpu", preprocess="hf")
    p = m.prompt("Is it red?", O / "images" / "extreme-wide.jpg")
    assert p.text.startswith("<|im_start|>user\n<image>\nIs it red?") and p.geometry.preprocess == "hf"
