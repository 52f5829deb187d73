"""python -m pytest tests/test_prune.py

Dropping image tokens: against the attention mask that hides them, against full recomputation, and the command line.
"""
import ast
import copy
import csv
import json
from pathlib import Path

import pytest
import torch
import world
from commands import HEADER, ROWS, read, refused
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import fork
import knockout
import prune
from fork import causal, to_mask, unembed
from groups import token_groups
from knockout import cut, forward
from views import open_image

VISUAL = ["llava-1.5", "llava-1.6", "llama3-next"]


@pytest.fixture(scope="module", params=VISUAL)
def case(request, model):
    """(model with a float64 decoder, prompt, its groups, embeddings)"""
    m = copy.copy(model(request.param))                             # nn.Module: the copy has its own table of modules
    m._modules = dict(m._modules) | {"decoder": copy.deepcopy(m.decoder).double()}
    p = m.prompt("Is the cup red or blue?", world.picture(90, 60))
    g = token_groups(p, boxes=[(20, 10, 40, 30)], objects=["cup"])
    return m, p, g, model(request.param).embed(p).double()


def hidden(T, image):
    """The mask under which no token after the image attends to it; to keep a part of it, leave that out of `image`."""
    return to_mask(cut(causal(T), image, list(range(max(image) + 1, T))))


def test_dropping_the_image_from_a_layer_on_is_hiding_it_from_every_later_token(case):
    m, p, g, x = case
    d, image, T = m.decoder, g.positions("image"), len(p)
    for first in range(len(d.layers) + 1):
        h, caches, left = prune.prefill(d, x, p.positions, image, first)
        whole = forward(d, x, p.positions, to_mask(causal(T)), hidden(T, image), range(first, len(d.layers)))
        torch.testing.assert_close(unembed(d, h[0, -1]), unembed(d, whole[0, -1]), rtol=1e-10, atol=1e-10)
        assert [c[0].shape[2] for c in caches] == [T if i < first else T - len(image) for i in range(len(d.layers))]
        assert left == (image if first == len(d.layers) else [])


def test_image_tokens_that_stay_are_attended_to_and_attend_to_each_other_alone(case):
    """Of the image, that is: the rest of it is hidden from them, too."""
    m, p, g, x = case
    d, image, T = m.decoder, g.positions("image"), len(p)
    keep = g.positions("related_patches")
    gone = [i for i in image if i not in keep]
    h, caches, left = prune.prefill(d, x, p.positions, image, 1, keep)
    mask = to_mask(cut(causal(T), gone, [i for i in range(T) if i not in gone]))
    whole = forward(d, x, p.positions, to_mask(causal(T)), mask, range(1, len(d.layers)))
    torch.testing.assert_close(unembed(d, h[0, -1]), unembed(d, whole[0, -1]), rtol=1e-10, atol=1e-10)
    assert left == keep and caches[-1][0].shape[2] == T - len(gone)


def test_with_nothing_dropped_it_is_plain_generation(case):
    m, p, g, x = case
    h, caches, left = prune.prefill(m.decoder, x, p.positions, g.positions("image"), len(m.decoder.layers))
    logits, theirs = m.prefill(x, p.positions)
    ours = unembed(m.decoder, h[:, -1])
    torch.testing.assert_close(ours, logits)
    assert m.decode(ours, caches, len(p), 8) == m.decode(logits, theirs, len(p), 8)
    assert left == g.positions("image")


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_every_decoding_step_is_a_full_recomputation_with_the_image_hidden(case, monkeypatch, share):
    m, p, g, x = case
    d, image, T, logits = m.decoder, g.positions("image"), len(p), []
    monkeypatch.setattr(m, "stop", set())                           # random weights may end at once
    first = round(share * len(d.layers))
    h, caches, _ = prune.prefill(d, x, p.positions, image, first)
    hook = d.lm_head.register_forward_hook(lambda *call: logits.append(call[2][0]))     # of every step, in order
    ids, = m.decode(unembed(d, h[:, -1]), caches, T, 5)
    hook.remove()
    assert len(ids) == len(logits) == 5
    for n in range(5):
        y = torch.cat((x, d.embed_tokens(torch.tensor([ids[:n]], dtype=torch.long))), 1)
        whole = forward(d, y, torch.arange(T + n), to_mask(causal(T + n)), hidden(T + n, image),
                        range(first, len(d.layers)))
        torch.testing.assert_close(logits[n], unembed(d, whole[0, -1]), rtol=1e-10, atol=1e-10)
        assert ids[n] == logits[n].argmax()


def test_the_most_attended_are_those_the_attention_matrix_says(case, monkeypatch):
    m, p, g, x = case
    d, image, first = m.decoder, g.positions("image"), 2
    kernel, paid = m.config.decoder_file.attend, []

    def watch(q, k, v, mask):                                       # identity as values: the output is the attention
        eye = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1)
        paid.append(kernel(q, k, eye, mask)[0, :, -1].mean(0))
        return kernel(q, k, v, mask)
    monkeypatch.setattr(m.config.decoder_file.Block, "kernel", staticmethod(watch))
    prune.prefill(d, x, p.positions, image, len(d.layers))
    monkeypatch.undo()
    wanted = sorted(image, key=lambda i: -paid[first - 1][i].item())[:5]
    assert prune.prefill(d, x, p.positions, image, first, 5)[2] == sorted(wanted)
    with pytest.raises(ValueError, match="below the first layer"):
        prune.prefill(d, x, p.positions, image, 0, 5)


def test_flops_are_those_that_torch_counts_but_for_what_the_mask_hides(case, monkeypatch):
    m, p, g, x = case
    d, T, c = m.decoder, len(p), m.decoder.config
    monkeypatch.setattr(m.config.decoder_file.Block, "kernel", staticmethod(m.config.decoder_file.attend))
    with FlopCounterMode(display=False) as counter:
        unembed(d, d(x, p.positions)[:, -1])
    hidden_part = c.layers * 4 * c.width * (T * T - T * (T + 1) // 2)
    assert prune.flops(c, [T] * c.layers) == counter.get_total_flops() - hidden_part
    assert prune.flops(c, [T, 10]) < prune.flops(c, [T, T])


def test_a_cache_weighs_what_its_tensors_weigh(case):
    m, p, g, x = case
    c, T = m.decoder.config, len(p)
    _, caches, _ = prune.prefill(m.decoder, x, p.positions, g.positions("image"), 1)
    cached = T + (c.layers - 1) * (T - len(g.positions("image")))   # tokens, of all layers together
    assert prune.kv_bytes(caches) == cached * 2 * c.kv_heads * c.head_size * 8


# ---------------------------------------------------------------------------------------------------- command line

def test_prune_writes_a_row_per_question_and_x(call, data, checkpoint, model, tmp_path):
    out = tmp_path / "out"
    code, stdout, err = call(prune.main, "--model", checkpoint("llava-1.6"), *data, "--all", "--last", 2, 1, "--dtype",
                             "float32", "--repeats", 2, "--out", out)
    assert code == 0, err
    rows, m = read(out / "prune.csv"), model("llava-1.6")
    assert tuple(rows[0]) == (*prune.COLUMNS, "model", "dtype")
    assert [(r["question_id"], int(r["removed_layers"])) for r in rows] == [
        (q, X) for q in ("01", "02", "03") for X in (0, 1, 2)]
    L = len(m.decoder.layers)
    for r, name, question in zip(rows[:3], "aaa", ["Is the cup red or blue?"] * 3, strict=True):
        p = m.prompt(question, open_image(tmp_path / f"{name}.jpg"))
        X, images = int(r["removed_layers"]), len(p.image)
        assert float(r["image_tokens"]) == pytest.approx(images * (L - X) / L)
        assert int(r["prefill_flops"]) == prune.flops(m.decoder.config, [len(p)] * (L - X) + [len(p) - images] * X)
        assert float(r["seconds"]) == float(r["prefill_seconds"]) + float(r["decode_seconds"]) > 0
        if X == 0:
            assert r["prediction"] == m.generate(p)
    sizes = [int(r["kv_bytes"]) for r in rows[:3]]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    assert Image.open(out / "prune.png").size[0] > 300 and "image tokens: mean over layers" in stdout
    assert call(prune.main, "--model", checkpoint("llava-1.6"), *data, "--all", "--last", 2, 1, "--dtype", "float32",
                "--repeats", 2, "--out", out)[0] == 0               # resumes, with nothing left to do
    refused(call(prune.main, "--model", checkpoint("llava-1.6"), *data, "--all", "--last", 1, "--dtype", "float32",
                 "--repeats", 2, "--out", out), "last", out)


@pytest.mark.parametrize("keep, stays", [("random:4", 4), ("attended:3", 3), ("related", None)])
def test_a_part_of_the_image_can_stay(call, data, checkpoint, model, tmp_path, keep, stays):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--last", 1, "--keep", keep, "--repeats", 1, "--dtype",
            "float32")
    for name in ("one", "two"):
        assert call(prune.main, *argv, "--out", tmp_path / name)[0] == 0
    one, two = (read(tmp_path / name / "prune.csv") for name in ("one", "two"))
    assert [r["prediction"] for r in one] == [r["prediction"] for r in two] and one[1]["keep"] == keep
    m = model("llava-1.5")
    p = m.prompt("Is the cup red or blue?", open_image(tmp_path / "a.jpg"))
    images, L = len(p.image), len(m.decoder.layers)
    stays = stays or len(token_groups(p, boxes=[(20, 10, 40, 30)]).positions("related_patches"))
    assert float(one[1]["image_tokens"]) == pytest.approx((images * (L - 1) + stays) / L)


def test_suggest_takes_x_from_a_knockout_run(call, data, checkpoint, tmp_path):
    model = checkpoint("llava-1.5")
    L = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    changes = [-50.0, -3.0, *[0.5] * (L - 2)]

    def write(columns=("edge", "task", "layer", "change_percent", "window"), edge="image->question", layers=changes):
        with open(tmp_path / "knockout.csv", "w", newline="") as f:
            csv.writer(f).writerows([columns, *([edge, "t", l, v, 1] for l, v in enumerate(layers))])
    argv = ("--model", model, *data, "--all", "--repeats", 1, "--suggest", tmp_path / "knockout.csv")
    write()
    code, stdout, err = call(prune.main, *argv, "--out", tmp_path / "a")
    assert code == 0 and "from layer 2 on no window of 1 layers" in stdout and f"--last {L - 2}" in stdout, err
    assert {r["removed_layers"] for r in read(tmp_path / "a" / "prune.csv")} == {"0", str(L - 2)}
    code, stdout, _ = call(prune.main, *argv, "--tolerance", 5, "--out", tmp_path / "b")
    assert code == 0 and f"--last {L - 1}" in stdout
    write(edge="question->last")
    refused(call(prune.main, *argv), "no edge from the image")
    write(layers=[1.0] * (L + 1))
    refused(call(prune.main, *argv), f"{L + 1} layers")
    refused(call(prune.main, *argv, "--last", 1), "--last and --suggest")


def test_what_cannot_be_dropped_is_refused(call, data, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--out", tmp_path / "out")
    refused(call(prune.main, *argv, "--last", 99), "--last 99", "layers")
    refused(call(prune.main, *argv, "--last", "x"), "--last", "'x'")
    refused(call(prune.main, *argv, "--keep", "most"), "--keep", "'most'")
    L = json.loads((checkpoint("llava-1.5") / "config.json").read_text())["num_hidden_layers"]
    refused(call(prune.main, *argv, "--keep", "attended:3", "--last", L), "attended:3", str(L - 1))
    (tmp_path / "x_Cap.csv").write_text(f"{HEADER},captions\n{ROWS[0]},a red cup.\n")
    refused(call(prune.main, "--model", checkpoint("vicuna"), "--data", tmp_path / "x_Cap.csv", "--out",
                 tmp_path / "out"), checkpoint("vicuna"), "text-only")


def test_prune_imports_nothing_of_ours_but_fork_and_knockout():
    root = Path(prune.__file__).parent
    ours = {file.stem for file in root.glob("*.py")} | {folder.name for folder in root.iterdir() if folder.is_dir()}
    top = ast.parse(Path(prune.__file__).read_text(encoding="utf-8")).body
    imported = {name.split(".")[0] for node in top if isinstance(node, ast.Import | ast.ImportFrom)
                for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])}
    assert imported & ours == {"fork", "knockout"}
    assert prune.unembed is fork.unembed and prune.window is knockout.window
