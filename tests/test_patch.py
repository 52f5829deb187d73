"""python -m pytest tests/test_patch.py

Activation patching: what it must not change, what it must change exactly, the one pass against explicit replacement in
whole forward passes, transformers with hooks, and the command line.
"""
import copy
import random

import pytest
import torch
import world
from commands import read, refused

import patch
from fork import clean_pass, unembed
from groups import token_groups
from knockout import window
from patch import PARTS, patch_ends, patched, plain_patch_ends, values_of

KINDS = ["llava-1.5", "llava-1.6", "llama3-next"]


@pytest.fixture(scope="module", params=KINDS)
def case(request, model):
    """(decoder, clean run, run of another photo of the same size, positions, token groups)."""
    m = model(request.param)
    photo = world.picture(90, 60)
    p, q = (m.prompt("Is the cup red or blue?", image) for image in (photo, photo.rotate(180)))
    clean, other = (clean_pass(m.decoder, m.embed(one), one.positions) for one in (p, q))
    assert not torch.equal(clean.stream[0], other.stream[0])
    g = token_groups(p, boxes=[(20, 10, 40, 30)])
    return m.decoder, clean, other, p.positions, g


def double(case):
    """The same in float64, where nothing rounds: the runs of its embeddings anew."""
    decoder, clean, other, positions, g = case
    d = copy.deepcopy(decoder).double()
    return d, *(clean_pass(d, run.stream[0].double(), positions) for run in (clean, other)), positions, g


@pytest.mark.parametrize("part", PARTS)
def test_patching_a_run_with_itself_changes_no_bit(case, part):
    d, clean, _, positions, g = case
    values, group = values_of(d, clean, part), g.positions("image")
    plain = patched(d, clean.stream[0], positions, values, group, part, ())
    # Its own attention's and MLP's outputs are computed from caches: another kernel's rounding, in the plain way alone.
    same = [patched(d, clean.stream[0], positions, values, group, part, [i]) for i in range(len(values))]
    for h in same:
        torch.testing.assert_close(h, plain, rtol=0, atol=0 if part == "stream" else 1e-5)
    ends = patch_ends(d, clean, clean, [group, [len(positions) - 1]], part, read=range(-3, 0))
    for end in ends:
        torch.testing.assert_close(end, clean.stream[-1][0, -3:].expand_as(end), rtol=1e-5, atol=1e-5)
    if part == "stream":                                            # after the last layer nothing is computed at all
        assert all(torch.equal(end[-1], clean.stream[-1][0, -3:]) for end in ends)


def test_patching_every_position_at_the_embedding_gives_the_other_run(case):
    d, clean, other, positions, _ = case
    everything = list(range(len(positions)))
    values = values_of(d, other, "stream")
    assert torch.equal(patched(d, clean.stream[0], positions, values, everything, "stream", [0]), other.stream[-1])
    end, = patch_ends(d, clean, other, [everything])
    torch.testing.assert_close(end[:, 0], other.stream[-1][:, -1].expand_as(end[:, 0]), rtol=1e-5, atol=1e-5)


def test_patching_the_last_position_after_the_last_layer_gives_the_other_runs_logits(case):
    d, clean, other, positions, _ = case
    end, = patch_ends(d, clean, other, [[len(positions) - 1]])
    assert torch.equal(unembed(d, end[-1]), unembed(d, other.stream[-1][0, -1:]))
    assert not torch.equal(end[0], end[-1])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("k", [1, 3])
def test_the_one_pass_is_the_plain_loop_for_groups_parts_windows_and_chunks(case, part, k):
    """In float64, for named and random groups: their first positions differ, so several forks run."""
    d, clean, other, positions, g = double(case)
    r, T = random.Random(k), len(positions)
    groups = [g.positions(name) for name in ("image", "question", "last", "related_patches")]
    groups += [sorted(r.sample(range(T), 5)), [0]]
    fast = patch_ends(d, clean, other, groups, part, k, at_once=r.choice([1, 100, 512]))
    slow = plain_patch_ends(d, clean, other, positions, groups, part, k)
    for ours, theirs in zip(fast, slow, strict=True):
        assert ours.shape == theirs.shape == (len(d.layers) + (part == "stream"), 1, d.config.width)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_in_float32_probabilities_agree_to_1e_5(case):
    d, clean, other, positions, g = case
    groups = [g.positions(name) for name in ("image", "question", "last")]
    for ours, theirs in zip(patch_ends(d, clean, other, groups), plain_patch_ends(d, clean, other, positions, groups),
                            strict=True):
        p, q = (unembed(d, ends).softmax(-1) for ends in (ours, theirs))
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_what_patching_costs_is_what_it_says(case):
    d, clean, other, positions, g = case
    T, L, tokens, hooks = len(positions), len(d.layers), [], []
    groups = [g.positions(name) for name in ("image", "question", "last")]
    for layer in d.layers:
        count = lambda module, args: tokens.append(args[0].shape[:-1].numel())
        hooks.append(layer.gate_proj.register_forward_pre_hook(count))
    patch_ends(d, clean, other, groups)
    for hook in hooks:
        hook.remove()
    assert 2 + sum(tokens) / (T * L) == pytest.approx(patch.token_layers(T, L, groups))


@pytest.mark.parametrize("part", PARTS)
def test_transformers_with_hooks_gives_the_same(model, part):
    """Hooks that replace a module's output at some positions by that of another run, in transformers' own Llama."""
    hf = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    import vicuna
    d = model("llava-1.5").decoder
    c = d.config
    theirs = hf.LlamaForCausalLM(hf.LlamaConfig(
        vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, rms_norm_eps=c.norm_eps, rope_theta=c.rope_base,
        max_position_embeddings=c.positions)).eval()
    ours = d.state_dict()
    theirs.load_state_dict({name: ours[vicuna.rename(name)] for name in theirs.state_dict()})
    g = torch.Generator().manual_seed(2)
    x, y = (torch.randn(1, 9, c.width, generator=g) for _ in range(2))
    group, positions = [2, 5, 8], torch.arange(9)
    fast, = patch_ends(d, *(clean_pass(d, run, positions) for run in (x, y)), [group], part)
    sites = {"stream": [*theirs.model.layers], "attention": [layer.self_attn for layer in theirs.model.layers],
             "mlp": [layer.mlp for layer in theirs.model.layers]}[part]
    kept = []

    def first(out):
        return out[0] if isinstance(out, tuple) else out
    hooks = [site.register_forward_hook(lambda module, args, out: kept.append(first(out).clone())) for site in sites]
    with torch.inference_mode():
        theirs(inputs_embeds=y)
        for hook in hooks:
            hook.remove()
        for i, site in enumerate(sites):
            def put(module, args, out, i=i):
                first(out)[:, group] = kept[i][:, group]
            hook = site.register_forward_hook(put)
            logits = theirs(inputs_embeds=x).logits[0, -1]
            hook.remove()
            end = fast[i + (part == "stream"), 0]                   # a layer's output is the stream after it
            torch.testing.assert_close(unembed(d, end), logits, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- command line

def both(call, tmp_path, *argv):
    """The rows of a run and of the same with --plain."""
    found = []
    for how in ((), ("--plain",)):
        out = tmp_path / f"out{len(how)}"
        code, stdout, err = call(patch.main, *argv, *how, "--out", out)
        assert code == 0, err
        assert str(out / "patch.csv") in stdout and (out / "patch.png").exists()
        found.append(read(out / "patch.csv"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("--direction", "noising", "--part", "mlp", "--window", 2), ("--grey",),
                                 ("--noise", "--all", "--part", "attention")])
def test_the_bundled_pairs_are_patched_as_the_plain_way_does(call, tmp_path, how):
    data = ("--data", patch.PAIRS / "pairs_ChooseAttr.csv", "--images", patch.PAIRS / "clean")
    fast, slow = both(call, tmp_path, *(data if "--grey" in how or "--noise" in how else ()), "--limit", 3, *how)
    assert tuple(fast[0]) == (*patch.COLUMNS, "model", "dtype") and len(fast) == len(slow) > 0
    for a, b in zip(fast, slow, strict=True):
        assert {k: v for k, v in a.items() if not k.startswith(("margin_p", "share"))} == {
            k: v for k, v in b.items() if not k.startswith(("margin_p", "share"))}
        assert float(a["share"]) == pytest.approx(float(b["share"]), rel=1e-4, abs=1e-5)
        clean, bad, margin = (float(a[f"margin_{name}"]) for name in ("clean", "corrupted", "patched"))
        start, end = (bad, clean) if a["direction"] == "denoising" else (clean, bad)
        assert float(a["share"]) == pytest.approx((margin - start) / (end - start))


@pytest.mark.slow
def test_in_the_bundled_model_the_answer_moves_from_the_object_to_the_question_to_the_last_position(call, tmp_path):
    code, out, err = call(patch.main, "--limit", 12, "--out", tmp_path)
    assert code == 0, err
    mean = {}
    for row in read(tmp_path / "patch.csv"):
        mean.setdefault((row["group"], int(row["layer"])), []).append(float(row["share"]))
    mean = {key: sum(values) / len(values) for key, values in mean.items()}
    assert mean["related_patches", 0] > 0.95 and mean["question", 1] > 0.8 and mean["last", 10] == pytest.approx(1)
    assert max(abs(mean["other_patches", l]) for l in range(11)) < 0.05 and abs(mean["question", 10]) < 1e-6


@pytest.mark.slow
def test_a_picture_of_ones_own_and_what_cannot_be_patched(call, checkpoint, tmp_path):
    a, b, c = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    world.picture(90, 60).save(a)
    world.picture(90, 60).rotate(180).save(b)
    world.picture(60, 90).save(c)
    own = ("--model", checkpoint("llava-1.6"), "--image", a, "--question", "Is the cup red or blue?", "--options",
           "red,blue", "--out", tmp_path / "out")
    code, _, err = call(patch.main, *own, "--other", b, "--group", "image", "last")
    assert code == 0, err
    rows = read(tmp_path / "out" / "patch.csv")
    assert {r["other"] for r in rows} == {"b.png"} and [r["group"] for r in rows[::5]] == ["image", "last"]
    assert float(rows[-1]["share"]) == pytest.approx(1) and (tmp_path / "out" / "patch.png").exists()
    refused(call(patch.main, *own, "--other", b), "out", "another --out")           # other groups
    own = (*own[:-1], tmp_path / "other")
    refused(call(patch.main, *own, "--other", c), "different tokens", "90x60", "60x90", "crop")
    refused(call(patch.main, *own, "--other", b, "--options", "red,red"), "--options red,red", "different")
    refused(call(patch.main, *own, "--other", b, "--seed", 2 ** 63), "--seed", "2^63")
    refused(call(patch.main, "--model", checkpoint("vicuna"), "--noise", "--question", "Is it red?", "--out",
                 tmp_path / "text"), "text-only")
    refused(call(patch.main, "--data", tmp_path / "x.csv", "--others", tmp_path), "--images DIR")
    refused(call(patch.main, "--data", tmp_path / "x.csv", "--images", tmp_path, "--others", tmp_path / "no"),
            "--others", "no such folder")
    refused(call(patch.main, *own, "--other", a), "changes neither the answer nor the margin")
    refused(call(patch.main, *own), "--other FILE", "--grey", "--noise")
    refused(call(patch.main, *own, "--grey"), "--box")
    refused(call(patch.main, *own, "--other", b, "--noise"), "cannot be combined")
    refused(call(patch.main, *own, "--other", tmp_path / "no.png"), "no.png")
    refused(call(patch.main, *own, "--others", tmp_path), "--other FILE goes with --image")
    refused(call(patch.main, *own, "--other", b, "--group", "sky"), "unknown token group 'sky'")
    refused(call(patch.main, *own, "--other", b, "--group", "related_patches"), "--box")


def test_a_window_of_streams_is_replaced_layer_by_layer(case):
    """By hand, one group in the window around stream 2: in each of its layers the group's stream is the donor's."""
    d, clean, other, positions, g = double(case)
    group = g.positions("question")
    end, = patch_ends(d, clean, other, [group], k=3)
    h, (cos, sin) = clean.stream[0].clone(), d.rope(positions)
    from fork import additive, causal
    mask = additive(causal(len(positions))).double()
    for i, layer in enumerate(d.layers):
        if i in window(2, 3, len(d.layers) + 1):
            h[:, group] = other.stream[i][:, group]
        h = layer(h, cos, sin, mask)
    torch.testing.assert_close(end[2, 0], h[0, -1], rtol=1e-6, atol=1e-8)
