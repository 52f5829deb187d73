"""python -m pytest tests/test_onevision_own.py

LLaVA-OneVision on our own tiny checkpoints (world_onevision.py): both layouts, scaled-down maps by hand, every
instrument as a command, and bad input.
"""
import json
import shutil

import pytest
import torch
import world
from commands import read, refused
from PIL import Image

import eval_gqa
import knockout
import lens
import llava_onevision
import prune
from groups import token_groups
from harness import hub
from views import best_canvas, tile_map

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["onevision", "onevision-tied"])
def test_both_layouts_are_one_model(checkpoint, kind):
    ours, theirs = (llava_onevision.load(checkpoint(kind, layout)) for layout in ("original", "hf"))
    assert ours.config == theirs.config and ours.config.text.tied == (kind != "onevision")
    a, b = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    p = [m.prompt("Is the cup red or blue?", world.picture(90, 60)) for m in (ours, theirs)]
    assert p[0].ids == p[1].ids and torch.equal(ours.embed(p[0]), theirs.embed(p[1]))


@pytest.mark.parametrize("size", [(90, 60), (200, 300), (64, 400)])
def test_a_scaled_down_map_is_the_mean_of_two_by_two_features_by_hand(model, size):
    """Each token is (1 - f) (1 - e) a + ..., with the weights written out, from the whole map of features."""
    m = model("onevision-tied")
    p = m.prompt("Is it red?", world.picture(*size))
    (rows, cols), n = tile_map(size, p.geometry), p.geometry.side
    with torch.inference_mode():
        features, tokens = m.mm_projector(m.patch_features(p)), m.image_features(p)
    across = best_canvas(size, p.geometry)[0] // p.geometry.image

    def patch(y, x):                                                # of the map, in patches
        y, x = rows.start + y, cols.start + x
        return features[(1 + y // n * across + x // n) * n * n + y % n * n + x % n]
    at = n * n
    assert torch.equal(tokens[:at], features[:at])
    for y in range(rows.out):
        for x in range(cols.out):
            sy, sx = (max((i + 0.5) * a.kept / a.out - 0.5, 0) for i, a in ((y, rows), (x, cols)))
            y0, x0, f, e = int(sy), int(sx), sy % 1, sx % 1
            y1, x1 = min(y0 + 1, rows.kept - 1), min(x0 + 1, cols.kept - 1)
            expected = ((1 - f) * ((1 - e) * patch(y0, x0) + e * patch(y0, x1))
                        + f * ((1 - e) * patch(y1, x0) + e * patch(y1, x1)))
            torch.testing.assert_close(tokens[at], expected, rtol=1e-4, atol=1e-5)
            at += 1
        assert torch.equal(tokens[at], m.image_newline)
        at += 1
    assert at == len(tokens) == len(p.image)


@pytest.mark.parametrize("main, flags, name", [
    (knockout.main, ("--edge", "image->question", "related_patches->question", "--window", 2), "knockout.csv"),
    (knockout.main, ("--edge", "image->last", "--window", 2, "--plain"), "knockout.csv"),
    (lens.main, (), "lens.csv"), (lens.main, ("--modules",), "jaccard.csv"),
    (prune.main, ("--last", 1, "--keep", "attended:3", "--repeats", 1), "prune.csv")])
def test_every_instrument_runs_on_it_and_from_disk_gives_the_same(call, data, checkpoint, tmp_path, main, flags, name):
    texts = []
    for how in ("off", "disk"):
        code, _, err = call(main, "--model", checkpoint("onevision-tied"), *data, "--all", *flags, "--offload", how,
                            "--out", tmp_path / how)
        assert code == 0, err
        texts.append([{k: v for k, v in row.items() if "seconds" not in k} for row in read(tmp_path / how / name)])
        assert (tmp_path / how / name).with_suffix(".png").stat().st_size > 1000
    assert texts[0] == texts[1] and texts[0]


def test_gqa_is_asked_photo_by_photo(call, checkpoint, tmp_path):
    rows = []
    for how in (("off",), ("disk", "--together", 3)):
        code, _, err = call(eval_gqa.main, "--model", checkpoint("onevision"), "--limit", 1, "--offload", *how, "--out",
                            tmp_path / how[0])
        assert code == 0, err
        rows.append(read(tmp_path / how[0] / "eval.csv"))
    assert rows[0] == rows[1] and len(rows[0]) > 5


def test_groups_of_a_scaled_down_photo_are_drawn(call, checkpoint, tmp_path):
    world.picture(400, 300).save(tmp_path / "p.png")
    code, stdout, err = call(knockout.main, "--model", checkpoint("onevision-tied"), "--image", tmp_path / "p.png",
                             "--question", "Is it red?", "--box", "100,100,90,80", "--groups", "--out", tmp_path / "o")
    assert code == 0, err
    assert "related_patches" in stdout and list((tmp_path / "o").glob("*.png"))


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (4000, 3000), (1, 1)])
def test_photos_of_extreme_shapes(model, size):
    m = model("onevision")
    p = m.prompt("Is it red?", Image.new("RGB", size, (200, 30, 30)))
    g = token_groups(p, boxes=[(0, 0, size[0] - 1, size[1] - 1)])
    assert len(g.positions("image")) == len(p.slots) and m.embed(p).isfinite().all()


def change(folder, **keys):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | keys))


@pytest.mark.parametrize("keys, words", [
    ({"image_grid_pinpoints": "one by one"}, "no list of tiles"), ({"image_grid_pinpoints": 7}, "no list"),
    ({"image_aspect_ratio": "pad"}, "anyres_max_N"), ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type"),
    ({"use_sliding_window": True}, "use_sliding_window"), ({"max_position_embeddings": 9}, "the model takes 9"),
    ({"vocab_size": 5}, "tokenizer"), ({"hidden_act": "gelu"}, "hidden_act")])
def test_a_config_that_cannot_be_read_is_one_line(call, checkpoint, tmp_path, photo, keys, words):
    shutil.copytree(checkpoint("onevision"), tmp_path / "m")
    change(tmp_path / "m", **keys)
    refused(call(knockout.main, "--model", tmp_path / "m", "--image", photo, "--question", "Is it red?", "--edge",
                 "image->last", "--out", tmp_path / "o"), words)


def test_another_models_tower_is_refused(call, checkpoint, tmp_path, photo):
    clip = checkpoint("llava-1.5").parent / "clip"
    refused(call(knockout.main, "--model", checkpoint("onevision"), "--vision-tower", clip, "--image", photo,
                 "--question", "Is it red?", "--edge", "image->last", "--out", tmp_path / "o"), "SigLIP")


def test_a_registered_name_without_a_network_is_one_line(monkeypatch, tmp_path):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="llava-hf/llava-onevision-qwen2-0.5b-ov-hf"):
        hub.resolve("llava-onevision-0.5b")
