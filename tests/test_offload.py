"""python -m pytest tests/test_offload.py

offload.py: a model whose layers stay on disk gives the numbers of the model in memory, to the bit, one question at a
time and several together; and what happens to files that change, errors and odd flags.
"""
import json
import shutil
import threading

import pytest
import torch
import world
from commands import read, refused

import knockout
import lens
import llava_min
import llava_onevision
import offload
import prune
from fork import clean_pass
from groups import token_groups
from harness import hub
from knockout import sweep
from offload import Layers, Shelf, Tensors, together

pytestmark = pytest.mark.slow
KINDS = [("llava-1.5", "original", "one"), ("llava-1.5", "hf", "sharded"), ("llava-1.6", "original", "one"),
         ("llama3-next", "hf", "one"), ("onevision", "hf", "one"), ("onevision-tied", "original", "one")]
CASES = [(kind, memory, torch.float32) for kind in KINDS for memory in (False, True)]
CASES += [(kind, False, torch.bfloat16) for kind in KINDS[::2]]
CASES += [(("vicuna", "original", "bin"), False, torch.float32)]    # a pickle is slow to read


def prompt(model, i=0):
    words = ["Is the cup red or blue?", "Is the lamp on or off?", "What is left of the table in this picture?"][i]
    return model.prompt(words, world.picture(90 - 9 * i, 60)) if model.config.vision else model.prompt(
        words, captions="a red cup.")


def everything(model, i=0):
    """What a question goes through, in code that knows nothing of offloading -> tensors and lists."""
    p = prompt(model, i)
    x, d = model.embed(p), model.decoder
    clean = clean_pass(d, x, p.positions, model.store)
    T, end = len(p), clean.stream[-1]
    logits = d.lm_head(d.norm(end[0, -1]))
    answer = model.decode(logits[None], clean.caches, T, 6)
    question = token_groups(p).positions("question")
    cuts = [([0, 1, 2], question), (question, [T - 1])]
    return (x, end, logits, answer, sweep(d, clean, cuts, 5, 2), lens.module_curves(d, clean, question, 2),
            lens.lens(d, clean.stream, [-1]), model.generate(p, 4))


def same(a, b):
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind, memory, dtype", CASES)
def test_every_number_is_that_of_the_model_in_memory_alone_and_together(checkpoint, kind, memory, dtype):
    family = llava_onevision if "onevision" in kind[0] else llava_min
    whole = family.load(checkpoint(*kind), dtype)
    away = offload.load(checkpoint(*kind), dtype, memory=memory, family=family)
    assert isinstance(away.decoder.layers, Layers) and len(away.decoder.layers) == len(whole.decoder.layers)
    with torch.inference_mode():
        expected = [everything(whole, i) for i in range(3)]
        assert same(everything(away), expected[0])
    results = together(away, lambda i: everything(away, i), range(3))
    assert all(same(result(), other) for result, other in zip(results, expected, strict=True))


def test_a_layer_is_read_once_for_all_questions(checkpoint, monkeypatch):
    away, fetched = offload.load(checkpoint("vicuna")), []
    honest = Layers.fetch
    monkeypatch.setattr(Layers, "fetch", lambda layers, i: (fetched.append(i), honest(layers, i))[1])
    L = len(away.decoder.layers)

    def passes(n):
        def do(i):
            for _ in range(n):
                p = prompt(away, i)
                clean_pass(away.decoder, away.embed(p), p.positions)
        return do
    together(away, passes(2), range(3))
    assert fetched == [*range(L), *range(L)]
    fetched.clear()
    together(away, lambda i: passes(i + 1)(i), range(3))            # of different lengths: each ends when it is done
    assert fetched == [*range(L)] * 3


def test_memory_holds_two_layers_and_no_map_of_the_file(checkpoint):
    away = offload.load(checkpoint("llava-1.5"))
    d = away.decoder
    numbers = sum(p.numel() for p in away.parameters())
    whole = llava_min.load(checkpoint("llava-1.5"))
    layers = sum(p.numel() for p in whole.decoder.layers.parameters())
    assert numbers < sum(p.numel() for p in whole.parameters()) - layers    # neither tower nor embeddings are there
    assert len(set(map(id, d.layers.blocks))) == 2 and d.layers.held is None


def test_an_error_belongs_to_its_question_and_the_others_go_on(checkpoint):
    away, before = offload.load(checkpoint("vicuna")), threading.active_count()

    def do(i):
        p = prompt(away, i)
        for layer, _ in enumerate(away.decoder.layers):
            if (i, layer) == (1, 2):
                raise ValueError("question 1 is bad")
        return len(p)
    one, bad, other = together(away, do, range(3))
    assert one() > 0 and other() > 0
    with pytest.raises(ValueError, match="question 1 is bad"):
        bad()
    assert away.decoder.layers.session is None
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon:
            thread.join(5)
    assert threading.active_count() <= before


def test_a_checkpoint_that_changes_or_vanishes_while_it_is_used_is_named(checkpoint, tmp_path):
    for damage, words in ((lambda f: f.write_bytes(f.read_bytes()[:-9]), "changed or removed"),
                          (lambda f: f.unlink(), "changed or removed")):
        folder = tmp_path / "m"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(checkpoint("vicuna"), folder)
        away = offload.load(folder)
        damage(folder / "model.safetensors")
        with pytest.raises(ValueError, match=f"model.safetensors was {words}"):
            away.generate(prompt(away))


def resave(folder, change):
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(NAME), "1 parameters missing"),
    (lambda t: t.update({"model.layers.9.mlp.x": t[NAME] * 1}), "extra"),
    (lambda t: t.update({NAME: t[NAME][1:].clone()}), "the config wants"),
    (lambda t: t.update({NAME: t[NAME].to(torch.int8)}), "quantized")])
def test_a_checkpoint_that_does_not_fit_is_refused_when_it_is_loaded(checkpoint, tmp_path, change, words):
    shutil.copytree(checkpoint("vicuna"), tmp_path / "m")
    resave(tmp_path / "m", change)
    with pytest.raises(ValueError, match=words):
        offload.load(tmp_path / "m")


def test_a_layer_that_holds_nan_is_named_when_its_turn_comes(checkpoint, tmp_path):
    shutil.copytree(checkpoint("vicuna"), tmp_path / "m")
    resave(tmp_path / "m", lambda t: t[NAME].fill_(float("nan")))
    away = offload.load(tmp_path / "m")
    with pytest.raises(ValueError, match=f"{NAME}: it holds NaN"):
        away.generate(prompt(away))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_shelf_is_a_list_whose_caches_can_grow(dtype):
    shelf, items = Shelf(), [[torch.randn(1, 2, 3, 4).to(dtype) for _ in range(2)] for _ in range(3)]
    for item in items:
        shelf.append(item)
    assert len(shelf) == 3 and all(same(a, b) for a, b in zip(shelf, items, strict=True)) and same(shelf[-1], items[2])
    longer = [torch.cat((t, torch.ones(1, 2, 1, 4, dtype=dtype)), 2) for t in items[1]]
    other = shelf.copy()
    other[1] = longer
    assert same(other[1], longer) and same(shelf[1], items[1]) and same(other[0], items[0])
    stream = Shelf()
    stream.append(items[0][0].transpose(1, 2))
    assert torch.equal(stream[0], items[0][0].transpose(1, 2))


@pytest.mark.parametrize("main, flags, name", [
    (knockout.main, ("--edge", "image->question", "question->last", "--window", 2), "knockout.csv"),
    (knockout.main, ("--edge", "image->last", "--window", 2, "--plain"), "knockout.csv"),
    (knockout.main, ("--edge", "image->last", "--window", 2, "--subword", "last", "--heads", "0,2"), "knockout.csv"),
    (lens.main, (), "lens.csv"), (lens.main, ("--modules", "--edge", "image->question"), "jaccard.csv")])
def test_a_run_with_offload_is_byte_for_byte_that_without(call, data, checkpoint, tmp_path, main, flags, name):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", *flags)
    assert call(main, *argv, "--offload", "off", "--out", tmp_path / "off")[0] == 0
    for how in (("disk",), ("disk", "--together", 1), ("cpu", "--together", 2)):
        out = tmp_path / "-".join(map(str, how))
        code, _, err = call(main, *argv, "--offload", *how, "--out", out)
        assert code == 0 and ("layers on disk" if how[0] == "disk" else "layers in host memory") in err, err
        assert (out / name).read_bytes() == (tmp_path / "off" / name).read_bytes()


def test_pruning_with_offload_is_that_without_but_for_the_time(call, data, checkpoint, tmp_path):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--repeats", 1, "--keep", "attended:3", "--last", 1, 2)
    rows = []
    for how in ("off", "disk"):
        assert call(prune.main, *argv, "--offload", how, "--out", tmp_path / how)[0] == 0
        rows.append([{k: v for k, v in r.items() if "seconds" not in k} for r in read(tmp_path / how / "prune.csv")])
    assert rows[0] == rows[1]


def test_a_bad_question_among_several_is_skipped_alone(call, data, checkpoint, tmp_path):
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--edge", "image->last", "--offload", "disk",
            "--together", 3, "--out", tmp_path / "out")
    refused(call(knockout.main, *argv), "b.jpg", "line 3")
    code, stdout, err = call(knockout.main, *argv, "--skip-bad")
    assert code == 0 and "left out: " in stdout, err
    assert {r["question_id"] for r in read(tmp_path / "out" / "knockout.csv")} == {"01", "03"}


def test_auto_keeps_in_memory_what_fits_and_says_where_the_layers_are(call, data, checkpoint, tmp_path, monkeypatch):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--all", "--limit", 1, "--edge", "image->last")
    need = hub.ROOM + Tensors(hub.resolve(str(checkpoint("llava-1.5"))).files.weights).bytes(4)
    for free, words in ((10 * need, "in float32\n"), (need / 2, "layers on disk")):
        monkeypatch.setattr(hub, "free_memory", lambda device, free=free: free)
        code, _, err = call(knockout.main, *argv, "--out", tmp_path / words.strip().replace(" ", "-"))
        assert code == 0 and words in err, err
    assert json.loads((tmp_path / "layers-on-disk" / "run.json").read_text())["settings"]["dtype"] == "float32"


@pytest.mark.parametrize("device, free, expected", [("cuda", 1e12, "off"), ("cuda", {"cuda": 1e9, "cpu": 1e12}, "cpu"),
                                                    ("cuda", 1e9, "disk"), ("cpu", 1e9, "disk"), ("mps", 1e9, "off")])
def test_auto_on_every_device(checkpoint, monkeypatch, device, free, expected):
    monkeypatch.setattr(hub, "free_memory", lambda d: free[d] if isinstance(free, dict) else free)
    files = hub.resolve(str(checkpoint("vicuna"))).files
    assert hub.pick_offload("auto", files, torch.float16, device) == expected


def test_odd_flags_are_refused(call, data, checkpoint):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--edge", "image->last")
    refused(call(knockout.main, *argv, "--together", 0), "--together", "from 1")
    refused(call(knockout.main, *argv, "--offload", "tape"), "--offload")
    files = hub.resolve(str(checkpoint("vicuna"))).files
    with pytest.raises(ValueError, match="--offload disk: with --device mps"):
        hub.pick_offload("disk", files, torch.float16, "mps")
