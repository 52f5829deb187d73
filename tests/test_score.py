"""python -m pytest tests/test_score.py

What is measured of an answer: against one whole forward pass for each of its tokens, and against words spelt by hand.
"""
import pytest
import torch
import world
from commands import read
from tokenizers import Tokenizer, models, pre_tokenizers

import knockout
from fork import additive, causal, clean_pass, unembed
from harness.experiment import Asker
from harness.flags import DataSettings, Shared
from harness.questions import read_csv
from score import COLUMNS, Answer, option_pair, options_of, score

KINDS = ["llava-1.5", "llava-1.6", "llama3-next"]


@torch.inference_mode()
def logs_after(m, x, ids, blocked=None, layers=()):
    """log p of every next token after embeddings x and the tokens `ids`, (V,): a whole forward pass. blocked(T): the
    additive mask of a prompt of T tokens, in the layers `layers`."""
    d = m.decoder
    more = d.embed_tokens(torch.tensor([ids], dtype=torch.long))
    x = torch.cat((x, more), 1)
    T, (cos, sin) = x.shape[1], d.rope(torch.arange(x.shape[1]))
    for i, layer in enumerate(d.layers):
        x = layer(x, cos, sin, blocked(T) if i in layers else additive(causal(T)))
    return unembed(d, x[0, -1]).float().log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_scored_as_by_one_pass_for_each_token(call, data, checkpoint, model, tmp_path, kind):
    """Without a cut and with two edges cut; for the one into `last`, all positions that predict a token are cut off."""
    m, out = model(kind), tmp_path / "out"
    code, _, err = call(knockout.main, "--model", checkpoint(kind), *data, "--all", "--edge", "image->last",
                        "image->question", "--window", 2, "--out", out)
    assert code == 0, err
    rows, L, lengths = read(out / "knockout.csv"), len(m.decoder.layers), set()
    for q in read_csv(data[1], data[3]):
        p = q.prompt(m)
        g, x = q.groups(p), m.embed(p)
        ids, = m.decode(*m.prefill(x, p.positions), len(p))
        ids = ids or [m.prefill(x, p.positions)[0].argmax().item()]
        lengths.add(len(ids))
        base = sum(logs_after(m, x, ids[:i])[token].item() for i, token in enumerate(ids))
        for edge in ("image->last", "image->question"):
            def blocked(T, edge=edge, p=p, g=g):
                target = list(range(len(p) - 1, T)) if edge == "image->last" else g.positions("question")
                return knockout.edge_mask(m.decoder, T, g.positions("image"), target)
            mine = [r for r in rows if r["question_id"] == q.id and r["edge"] == edge]
            assert {r["answer_tokens"] for r in mine} == {str(len(ids))}
            for row in (mine[0], mine[2]):
                layers = knockout.window(int(row["layer"]), 2, L)
                cut = sum(logs_after(m, x, ids[:i], blocked, layers)[token].item() for i, token in enumerate(ids))
                for got, wanted in (("logp_base", base), ("logp_knockout", cut)):
                    assert float(row[got]) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
                    each = float(row[got.replace("logp", "logp_per_token")])
                    assert each == pytest.approx(float(row[got]) / len(ids))
    assert max(lengths) > 1


def test_the_margin_is_the_difference_of_two_logits_and_what_is_read_may_be_one_position(model):
    m = model("llava-1.5")
    p = m.prompt("Is the cup red or blue?", world.picture(90, 60))
    x = m.embed(p)
    ends = clean_pass(m.decoder, x, p.positions).stream[-1][:, -1:]
    logits = unembed(m.decoder, ends)[0, 0]
    found = score(m.decoder, ends, Answer((7,), pair=(0, 5, 9)))
    assert found["margin"].item() == pytest.approx((logits[5] - logits[9]).item(), abs=1e-5)
    assert found["p"].item() == pytest.approx(logits.softmax(-1)[7].item())
    assert found["logp"].item() == pytest.approx(logits.log_softmax(-1)[7].item())
    assert score(m.decoder, ends, Answer((7,)))["margin"] is None
    with pytest.raises(FloatingPointError, match="non-finite"):
        score(m.decoder, ends * float("nan"), Answer((7,)))


def test_an_answer_that_is_measured_by_its_last_token_is_asked_as_before(model, tmp_path):
    """--subword last: p is that of the last token, and `last` the position that predicts it, alone."""
    m = model("llava-1.5")
    world.picture(90, 60).save(tmp_path / "a.jpg")
    (tmp_path / "x.csv").write_text("question_id,img_id,question,answer\n1,a,Is the cup red or blue?,red\n")
    q, = read_csv(tmp_path / "x.csv", tmp_path)
    asker = Asker(m, Shared(data=DataSettings()))
    first, last = (asker.ask(q, subword=word, whole=True) for word in ("first", "last"))
    n = len(first.scored.ids)
    assert n > 1 and first.scored.ids == last.scored.ids and torch.equal(first.x, last.x)
    T = len(first.prompt)
    assert first.groups.positions("last") == list(range(T - 1, T + n - 1))
    assert last.groups.positions("last") == [T + n - 2]
    assert (first.token, last.token) == (first.scored.ids[0], first.scored.ids[-1])
    p = logs_after(m, m.embed(q.prompt(m)), list(first.scored.ids[:-1])).exp()[last.token].item()
    assert last.p == pytest.approx(p, rel=1e-4)
    plain = asker.ask(q)
    assert plain.scored.ids == first.scored.ids[:1] and plain.p == pytest.approx(first.p, rel=1e-5)
    assert plain.groups.positions("last") == [T - 1]


# ---------------------------------------------------------------------------------------------------- two options

WORDS = ["Red", "red", "Blue", "blue", "to", "To", "the", "left", "right", "Left", "Right", "yes", "Yes", "no", "No"]
IDS = {word: i for i, word in enumerate(WORDS)}


@pytest.fixture(scope="module")
def tokenizer():
    t = Tokenizer(models.WordLevel({**IDS, "?": len(WORDS)}, unk_token="?"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    return t


@pytest.mark.parametrize("said, true, false, pair", [
    ("Red", "red", "blue", (0, "Red", "Blue")), ("red", "red", "blue", (0, "red", "blue")),
    ("Blue", "red", "blue", (0, "Red", "Blue")),                    # a wrong answer: the margin is the options'
    ("Left", "to the left", "to the right", (0, "Left", "Right")),  # the answer leaves out what they share
    ("to the right", "to the left", "to the right", (2, "left", "right")),
    ("To the right", "to the left", "to the right", (2, "left", "right"))])
def test_options_are_told_apart_by_the_first_token_that_differs_as_the_model_spells(tokenizer, said, true, false, pair):
    ids = tokenizer.encode(said).ids
    (i, a, b), why = option_pair(tokenizer, ids, said, true, false)
    assert (i, WORDS[a], WORDS[b], why) == (*pair, "")


@pytest.mark.parametrize("said, true, false, why", [
    ("Red", "", "", "no second option"), ("red", "red", "", "no second option"),
    ("red", "left", "left right", "before one of them ends"),
    ("To", "to the left", "to the right", "begins otherwise|before")])
def test_options_that_cannot_be_told_apart_give_a_reason(tokenizer, said, true, false, why):
    pair, reason = option_pair(tokenizer, tokenizer.encode(said).ids, said, true, false)
    if why.startswith("begins"):                                    # "to the" is left out, then they differ at once
        assert pair == (0, IDS["Left"], IDS["Right"]) and not reason
    else:
        assert pair is None and why in reason


def test_knockouts_columns_are_those_that_score_fills():
    at = knockout.COLUMNS.index("answer_tokens")
    assert knockout.COLUMNS[at:at + len(COLUMNS)] == COLUMNS


def test_which_two_options_a_question_has():
    assert options_of("Blue", "red", "red", "blue") == ("red", "blue")
    assert options_of("Blue", options=("red", "blue")) == ("blue", "red")       # not known which is right: the model's
    assert options_of("green", options=("red", "blue")) == ("red", "blue")
    assert options_of("No", "yes") == ("yes", "no") and options_of("No.") == ("no", "yes")
    assert options_of("Red", "red") == ("", "") and options_of("Red") == ("", "")
