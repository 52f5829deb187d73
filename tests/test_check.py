"""python -m pytest tests/test_check.py

check.py: it passes where a cut is a cut, and catches a kernel that leaks, a cut that reaches other tokens, and a sweep
that is not the plain loop.
"""
import math

import pytest
import world
from commands import refused

import check
import vicuna
from fork import clean_pass
from groups import token_groups
from knockout import curve, sweep

VISUAL = ["llava-1.5", "llava-1.6", "llama3-next"]


@pytest.fixture(scope="module", params=VISUAL)
def case(request, model):
    """(decoder, its file, groups, (embeddings, positions, clean pass), first answer token)."""
    m = model(request.param)
    p = m.prompt("Is the cup red or blue?", world.picture(90, 60))
    g = token_groups(p, true_option="red", false_option="blue", objects=["cup"], boxes=[(20, 10, 40, 30)])
    x = m.embed(p)
    asked = x, p.positions, clean_pass(m.decoder, x, p.positions)
    return m.decoder, m.config.decoder_file, g, asked, m.prefill(x, p.positions)[0].argmax().item()


def passes(results):
    return [passed for _, _, passed in results]


@pytest.mark.parametrize("edge", [("image", "question"), ("question", "last"), ("last", "last"), ("system", "image")])
def test_every_kind_of_edge_passes(case, edge):
    decoder, _, g, asked, token = case
    for heads in (None, [1, 2]):
        results = check.selfcheck(decoder, *asked, *map(g.positions, edge), token, 3, heads)
        assert passes(results) == [True] * 5 + [None] * 2
        assert all(math.isfinite(value) for _, value, _ in results)


@pytest.mark.parametrize("heads", [None, [1, 2]])
def test_a_kernel_that_leaks_is_caught(case, heads, monkeypatch):
    """A mask of -5 instead of -inf: attention over cut edges is small, and must not pass for zero."""
    decoder, file, g, asked, token = case
    leaky = staticmethod(lambda q, k, v, mask: file.attend(q, k, v, mask.clamp(min=-5.0)))
    monkeypatch.setattr(file.Block, "kernel", leaky)
    results = check.selfcheck(decoder, *asked, g.positions("image"), g.positions("question"), token, 3, heads)
    assert results[0][1] > 0 and results[0][2] is False


def test_a_cut_that_reaches_a_token_before_the_target_is_caught(case, monkeypatch):
    """A kernel that hides the source from its own last token, too, wherever it is hidden from the target."""
    decoder, file, g, asked, token = case
    source, target = g.positions("image"), g.positions("question")

    def spread(q, k, v, mask):
        if mask.shape[-2] == mask.shape[-1] == len(asked[1]) and mask[..., target[0], source].isinf().all():
            mask = mask.clone()
            mask[..., source[-1], source] = -math.inf
        return file.attend_fast(q, k, v, mask)
    monkeypatch.setattr(file.Block, "kernel", staticmethod(spread))
    results = check.selfcheck(decoder, *asked, source, target, token, 3)
    assert results[1][1] > 0 and results[1][2] is False
    assert passes(results)[2:4] == [True] * 2                       # layers below and an empty source are not touched


def test_a_sweep_that_is_not_the_plain_loop_is_caught_and_its_distance_measured(case):
    """The clean pass of a slightly different prompt: the sweep's probabilities are off by less than a percent."""
    decoder, _, g, (x, positions, _), token = case
    edge, L = (g.positions("image"), g.positions("question")), len(decoder.layers)
    other = x.clone()
    other[0, -1] *= 1.001
    clean = clean_pass(decoder, other, positions)
    results = check.selfcheck(decoder, x, positions, clean, *edge, token, 3)
    assert passes(results) == [True] * 4 + [False] + [None] * 2
    fast, slow = sweep(decoder, clean, [edge], token, 3)[0], curve(decoder, x, positions, *edge, token, 3)
    apart = max(abs(fast[l] - slow[l]) / slow[l] for l in (0, L // 2, L - 1))
    assert results[4][1] == pytest.approx(apart, rel=1e-2) and apart < 0.01


def test_a_kernel_that_gives_another_result_each_time_is_caught(case, monkeypatch):
    """By less than rounding would show, but by more than no bit: tokens before, layers below, and an empty source."""
    decoder, file, g, asked, token = case
    calls = []

    def drifting(q, k, v, mask):
        calls.append(mask)
        return file.attend_fast(q, k, v, mask) * (1 + 1e-5 * len(calls))
    monkeypatch.setattr(file.Block, "kernel", staticmethod(drifting))
    results = check.selfcheck(decoder, *asked, g.positions("image"), g.positions("question"), token, 3)
    assert passes(results)[1:4] == [False] * 3 and all(value > 0 for _, value, _ in results[1:4])


def test_the_random_control_is_of_the_same_size_and_drawn_by_seed(case):
    decoder, _, g, asked, token = case
    source, target = g.positions("related_patches"), g.positions("question")
    runs = [check.selfcheck(decoder, *asked, source, target, token, 3, seed=seed)[-1] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] and runs[0][1] != runs[2][1]
    assert f"{len(source)} random tokens" in runs[0][0]


# ---------------------------------------------------------------------------------------------------- command line

def test_every_edge_of_every_question_is_reported_and_the_exit_code_is_0(call, data, checkpoint):
    code, stdout, err = call(check.main, "--model", checkpoint("llama3-next"), *data, "--edge", "image->question",
                             "last->last", "--window", 2, "--dtype", "float32")
    assert code == 0 and "5 checks, 0 failed" in stdout and "FAILED" not in stdout, err
    assert "largest contribution over a cut edge (6 edges)" in stdout
    for edge in ("image->question", "last->last"):
        assert f"{edge}, window 2 around layer " in stdout
    assert "not checked: prompt, numbers, greedy, accuracy: nobody's numbers of " in stdout


def test_a_check_that_fails_is_marked_and_the_exit_code_is_1(call, data, checkpoint, monkeypatch):
    kernel = staticmethod(lambda q, k, v, mask: vicuna.attend(q, k, v, None if mask is None else mask.clamp(min=-5.0)))
    monkeypatch.setattr(vicuna.Block, "kernel", kernel)
    code, stdout, err = call(check.main, "--model", checkpoint("llava-1.5"), *data, "--limit", 1, "--edge",
                             "image->question", "--window", 2, "--dtype", "float32")
    failed = [line for line in stdout.splitlines() if line.startswith("FAILED")]
    assert code == 1 and failed and "over a cut edge (ChooseAttr/01 image->question)" in failed[0], err
    assert f"5 checks, {len(failed)} failed" in stdout


def test_an_edge_that_a_question_does_not_have_is_skipped_and_no_edge_at_all_is_an_error(call, data, checkpoint):
    argv = ("--model", checkpoint("llava-1.5"), *data, "--limit", 1, "--window", 2, "--edge", "newlines->last")
    code, stdout, err = call(check.main, *argv, "last->last")
    assert code == 0 and "not checked: cut of newlines->last, 1 question: newlines: only AnyRes" in stdout, err
    assert "5 checks, 0 failed" in stdout
    code, stdout, err = call(check.main, *argv)
    assert code == 2 and "error: nothing could be checked: " in err and "cut of newlines->last, 1 question" in err


def test_flags_are_knockouts_and_checked_before_anything_is_loaded(call):
    refused(call(check.main, "--src", "image"), "--src and --tgt")
    refused(call(check.main, "--edge", "imgae->last"), "imgae", "related_patches")
    refused(call(check.main, "--selfcheck"), "--selfcheck")
