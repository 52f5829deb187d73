"""python -m pytest tests/test_tokenizers.py

Text to ids: the files that the original repositories ship (sentencepiece, tiktoken ranks) and tokenizer.json must give
the same ids, and those of the libraries they come from; then how a prompt is cut around its picture.
"""
import base64
import json
import random
from pathlib import Path

import pytest
import world
from tokenizers import Tokenizer

import llama3
import llava_min
import vicuna
from groups import token_groups

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokens.json").read_text())
FAMILIES = {"llama2": (vicuna, world.write_llama2_tokenizer), "llama3": (llama3, world.write_llama3_tokenizer)}
every_family = pytest.mark.parametrize("family", FAMILIES)


def some_texts(n, seed=0):
    """Random texts of words, runs of one letter, spaces, newlines, digits and letters the vocabulary lacks."""
    rng = random.Random(seed)
    parts = [*world.TEXT.split(), " ", "  ", "     ", "\n", "\n\n", " \n", "\t", "aaaa", "llll", "...", "?!", "12",
             "34567", "é", "ß", "你好", "🙂", "\u0301", "\u00a0", "'s", "'LL", "▁", "<", ">", "|", "<image>", "<s",
             "/s>"]
    return ["".join(rng.choice(parts) + rng.choice(["", " "]) for _ in range(rng.randrange(1, 20))) for _ in range(n)]


TEXTS = [text for text, _ in GOLDEN["llama2"]] + some_texts(400)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """tokenizers[family][form]: each read by our loader from a folder that has only that form."""
    found = {}
    for family, (file, write) in FAMILIES.items():
        found[family] = {}
        for form in ("json", "model"):
            folder = tmp_path_factory.mktemp(f"{family}-{form}")
            write(folder, form)
            found[family][form] = file.load_tokenizer(folder)
    return found


# ---------------------------------------------------------------------------------------------------- text -> ids

@every_family
@pytest.mark.parametrize("form", ["json", "model"])
def test_texts_have_the_ids_that_the_original_libraries_gave_them(tokenizers, family, form):
    for text, ids in GOLDEN[family]:
        assert tokenizers[family][form].encode(text).ids == ids, repr(text)


@every_family
def test_tokenizer_model_and_tokenizer_json_are_one_tokenizer(tokenizers, family):
    one, other = tokenizers[family]["json"], tokenizers[family]["model"]
    assert one.get_vocab(with_added_tokens=True) == other.get_vocab(with_added_tokens=True)
    for text in TEXTS:
        a, b = one.encode(text), other.encode(text)
        assert (a.ids, a.offsets, a.tokens) == (b.ids, b.offsets, b.tokens), repr(text)
        assert one.decode(a.ids) == other.decode(a.ids)


@every_family
@pytest.mark.parametrize("form", ["json", "model"])
def test_ids_turn_back_into_the_text(tokenizers, family, form):
    for text in TEXTS:
        ids = tokenizers[family][form].encode(text).ids
        back = text.replace("▁", " ") if family == "llama2" else text  # to sentencepiece the two are one
        assert tokenizers[family][form].decode(ids) == back


def test_llama2_ids_are_sentencepieces_own(tokenizers):
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed: golden ids only")
    sp = sentencepiece.SentencePieceProcessor(model_proto=world.sentencepiece_model(world.llama2_pieces()))
    assert (sp.unk_id(), sp.bos_id(), sp.eos_id()) == (0, 1, 2)
    for text in TEXTS + some_texts(1000, seed=1):
        for tokenizer in tokenizers["llama2"].values():
            assert tokenizer.encode(text).ids == [1, *sp.encode(text)], repr(text)
            assert tokenizer.decode(sp.encode(text)) == sp.decode(sp.encode(text))


def test_sentencepiece_merges_go_by_score_wherever_a_piece_stands_in_the_file(tokenizers, tmp_path):
    pieces = world.llama2_pieces()
    moved = pieces[:259] + random.Random(3).sample(pieces[259:], len(pieces) - 259)
    (tmp_path / "tokenizer.model").write_bytes(world.sentencepiece_model(moved))
    shuffled = vicuna.load_tokenizer(tmp_path)
    for text in TEXTS:
        assert shuffled.encode(text).tokens == tokenizers["llama2"]["model"].encode(text).tokens, repr(text)


def test_llama3_ids_are_tiktokens_own(tokenizers):
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed: golden ids only")
    ranks = {token: i for i, token in enumerate(world.llama3_ranks())}
    theirs = tiktoken.Encoding("tiny", pat_str=world.LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={
        text: len(ranks) + i for i, text in enumerate(llama3.SPECIAL)})
    for text in TEXTS + some_texts(1000, seed=1) + [world.TEXT, "<|eot_id|>x<|start_header_id|>user"]:
        for tokenizer in tokenizers["llama3"].values():
            assert tokenizer.encode(text).ids == [len(ranks), *theirs.encode(text, allowed_special="all")], repr(text)


def test_a_word_that_is_a_llama3_token_is_that_token_even_where_merges_would_miss_it(tmp_path):
    found = [bytes([b]) for b in range(256)] + [b"bc", b"ab", b"cd", b"abcd"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(found)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    tokenizer = llama3.load_tokenizer(tmp_path)
    assert tokenizer.encode("abcd").ids == [260, 259]               # as tiktoken: the whole word is looked up first
    assert tokenizer.encode("xabcd").tokens[1:] == ["x", "a", "bc", "d"]  # else bc goes first, and no merge is left


@every_family
def test_an_offset_says_which_characters_a_token_stands_for(tokenizers, family):
    for text in some_texts(50, seed=2) + ["What color is the 左 cup?"]:
        found = tokenizers[family]["model"].encode(text)
        covered = {i for a, b in found.offsets for i in range(a, b)}
        assert covered == set(range(len(text))), repr(text)
        assert found.offsets[1:] == sorted(found.offsets[1:])
    encoded = tokenizers[family]["model"].encode("Is the cup red?")
    a, b = encoded.offsets[[t.strip("▁Ġ") for t in encoded.tokens].index("red")]
    assert "Is the cup red?"[a:b] == " red"


# ---------------------------------------------------------------------------------------------------- special tokens

def test_llama3s_special_tokens_have_metas_ids():
    published = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|reserved_special_token_0|>": 128002,
                 "<|reserved_special_token_3|>": 128005, "<|start_header_id|>": 128006, "<|end_header_id|>": 128007,
                 "<|reserved_special_token_4|>": 128008, "<|eot_id|>": 128009, "<|reserved_special_token_5|>": 128010,
                 "<|reserved_special_token_250|>": 128255}
    assert len(llama3.SPECIAL) == len(set(llama3.SPECIAL)) == 256
    assert {text: 128000 + llama3.SPECIAL.index(text) for text in published} == published
    assert llama3.SPLIT == world.LLAMA3_SPLIT


def test_special_tokens_are_found_in_a_prompt_and_left_out_of_an_answer(tokenizers):
    for tokenizer in tokenizers["llama3"].values():
        V = len(world.llama3_ranks())
        ids = tokenizer.encode("<|start_header_id|>user<|end_header_id|>\n\nred<|eot_id|>").ids
        assert (ids[:2], ids[-1]) == ([V, V + 6], V + 9) and V + 7 in ids
        assert tokenizer.decode(ids) == "user\n\nred"
    for tokenizer in tokenizers["llama2"].values():
        assert tokenizer.encode("red</s>").ids[-1] == 2
        assert tokenizer.decode([1, *tokenizer.encode("red").ids[1:], 2]) == "red"


@every_family
def test_every_character_of_the_prompt_templates_survives(tokenizers, family):
    before, after = FAMILIES[family][0].TEMPLATE
    text = before + "<image>\nIs it?" + llava_min.INSTRUCTION + after + FAMILIES[family][0].PAPER_END
    for tokenizer in tokenizers[family].values():
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False).removeprefix(
            "<s>" if family == "llama2" else "<|begin_of_text|>").lstrip(" ") == text
        assert tokenizer.token_to_id("<unk>") not in ids


# ---------------------------------------------------------------------------------------------------- the prompt

def pieces_of(tokenizer, ids):
    return ["IMAGE" if i == llava_min.IMAGE else tokenizer.id_to_token(i) for i in ids]


@pytest.mark.parametrize("form", ["json", "model"])
def test_every_llama2_piece_of_a_prompt_has_its_own_leading_space_and_the_whole_one_bos(tokenizers, form):
    tokenizer = tokenizers["llama2"][form]
    ids, spans = llava_min.tokenize(tokenizer, "the cup <image>\nIs the box red?", bos=1)
    assert "|".join(pieces_of(tokenizer, ids)) == "<s>|▁the|▁cu|p|▁|IMAGE|▁|<0x0A>|I|s|▁the|▁box|▁red|?"
    assert ids[0] == 1 and ids.count(1) == 1
    assert spans[0] is None and spans[5] is None and spans[7] == (15, 16)


def test_a_llama3_tokenizer_that_adds_bos_gives_two_and_keeps_the_newline_after_the_picture(tmp_path):
    world.write_llama3_tokenizer(tmp_path, "json", bos=True)
    tokenizer = llama3.load_tokenizer(tmp_path)
    text = "<|begin_of_text|>the box<image>\nIs the cup red?<|eot_id|>"
    ids, spans = llava_min.tokenize(tokenizer, text, bos=tokenizer.token_to_id("<|begin_of_text|>"))
    assert "|".join(pieces_of(tokenizer, ids)) == (
        "<|begin_of_text|>|<|begin_of_text|>|t|he|Ġbox|IMAGE|Ċ|I|s|Ġthe|Ġcu|p|Ġred|?|<|eot_id|>")
    assert spans[:2] == [None, (0, 17)]                             # the added one is no part of the text


def test_a_llama3_tokenizer_that_adds_no_bos_gives_one_and_loses_the_newline_after_the_picture(tmp_path):
    world.write_llama3_tokenizer(tmp_path, "json", bos=False)
    tokenizer = llama3.load_tokenizer(tmp_path)
    text = "<|begin_of_text|>the box<image>\nIs the cup red?<|eot_id|>"
    ids, spans = llava_min.tokenize(tokenizer, text, bos=tokenizer.token_to_id("<|begin_of_text|>"))
    assert "|".join(pieces_of(tokenizer, ids)) == "<|begin_of_text|>|t|he|Ġbox|IMAGE|I|s|Ġthe|Ġcu|p|Ġred|?|<|eot_id|>"
    assert "|".join(text[slice(*s)] for s in spans if s) == "t|he| box|I|s| the| cu|p| red|?|<|eot_id|>"


def test_a_text_that_starts_with_no_bos_loses_nothing(tmp_path):
    world.write_llama3_tokenizer(tmp_path, "json", bos=False)
    tokenizer = llama3.load_tokenizer(tmp_path)
    ids, spans = llava_min.tokenize(tokenizer, "the box<image>\nred", bos=tokenizer.token_to_id("<|begin_of_text|>"))
    assert "|".join(pieces_of(tokenizer, ids)) == "t|he|Ġbox|IMAGE|Ċ|red"
    assert len(spans) == len(ids)


@pytest.mark.parametrize("bos", [True, False])
def test_a_models_prompt_follows_its_own_tokenizer_about_bos(bos, tmp_path):
    folder = world.write(tmp_path, "llama3-next")
    world.write_llama3_tokenizer(folder, "json", bos=bos)
    model = llava_min.load(folder)
    p = model.prompt("Is the cup red?", world.picture(90, 60))
    first, begin = p.ids.index(llava_min.IMAGE), model.tokenizer.token_to_id("<|begin_of_text|>")
    assert p.ids.count(begin) == (2 if bos else 1)
    assert (model.tokenizer.id_to_token(p.ids[first + 1]) == "Ċ") == bos
    assert "".join(p.tokens[i] for i in token_groups(p).positions("question")).replace("Ġ", " ") == "Is the cup red?"


@pytest.mark.parametrize("kind", world.KINDS)
def test_each_token_of_a_prompt_knows_its_characters(kind, model):
    m = model(kind)
    p = m.prompt("Is the cup red?", world.picture(90, 60) if m.config.vision else None)
    assert len(p.tokens) == len(p.spans) == len(p)
    for token, span in zip(p.tokens, p.spans, strict=True):
        if span and token not in ("▁", "<0x0A>"):                   # the space put in front has no character of its own
            spelled = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
            assert spelled.strip(" ") == p.text[slice(*span)].strip(" ")


CUTS_AND_PADS = {"truncation": {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0},
                 "padding": {"strategy": {"Fixed": 300}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                             "pad_type_id": 0, "pad_token": "<unk>"}}


@every_family
def test_a_tokenizer_that_cuts_or_pads_is_made_to_do_neither(family, tokenizers, tmp_path):
    file, write = FAMILIES[family]
    write(tmp_path, "json", **CUTS_AND_PADS)
    assert len(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(world.TEXT).ids) == 300
    for text in (world.TEXT, "Is the cup red?"):
        assert file.load_tokenizer(tmp_path).encode(text).ids == tokenizers[family]["json"].encode(text).ids


def test_the_prompts_of_a_model_whose_tokenizer_cuts_or_pads_are_whole(tmp_path, model):
    folder = world.write(tmp_path, "llava-1.5", "hf")
    world.write_llama2_tokenizer(folder, "json", added=("<image>", "<pad>"), **CUTS_AND_PADS)
    loaded, question = llava_min.load(folder), "Is the cup red?"
    assert loaded.prompt(question, world.picture(64, 64)).ids == model("llava-1.5").prompt(
        question, world.picture(64, 64)).ids


# ---------------------------------------------------------------------------------------------------- damaged files

SENTENCEPIECE = world.sentencepiece_model(world.llama2_pieces())
RANKS = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(world.llama3_ranks()))
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:9e556afd44213b6bd1be2b850ebbbd98\nsize 499723\n"


@pytest.mark.parametrize("data", [b"", b"\x00" * 40, b"<html>not found</html>", POINTER, RANKS],
                         ids=["empty", "zeros", "html", "lfs pointer", "tiktoken ranks"])
def test_a_file_that_is_no_sentencepiece_model_is_refused(data, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match="tokenizer.model is not a"):
        vicuna.load_tokenizer(tmp_path)


def test_a_sentencepiece_model_cut_short_anywhere_among_its_pieces_is_refused(tmp_path):
    for size in range(100, len(SENTENCEPIECE) - 100, 89):
        (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE[:size])
        with pytest.raises(ValueError, match="tokenizer.model is not a sentencepiece model"):
            vicuna.load_tokenizer(tmp_path)


def test_a_sentencepiece_model_of_another_kind_is_refused(tmp_path):
    unigram = SENTENCEPIECE.replace(b"\x18\x02\x20", b"\x18\x01\x20")  # trainer_spec.model_type, before vocab_size
    assert unigram != SENTENCEPIECE
    (tmp_path / "tokenizer.model").write_bytes(unigram)
    with pytest.raises(ValueError, match="tokenizer.model is not a BPE model"):
        vicuna.load_tokenizer(tmp_path)


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", POINTER, SENTENCEPIECE,
                                  RANKS.replace(b" 7\n", b" x\n"), RANKS.replace(b" 7\n", b"\n"), RANKS[:-9]],
                         ids=["empty", "html", "lfs pointer", "sentencepiece", "no number", "no rank", "cut short"])
def test_a_file_that_is_no_rank_file_is_refused(data, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match="tokenizer.model is not a tiktoken rank file"):
        llama3.load_tokenizer(tmp_path)


@every_family
def test_a_folder_without_a_tokenizer_is_named(family, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name}: no tokenizer.json and no tokenizer.model"):
        FAMILIES[family][0].load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", ""], ids=["cut short", "a list", "an empty object", "empty"])
def test_a_model_whose_tokenizer_json_is_damaged_says_so(text, tmp_path):
    folder = world.write(tmp_path, "llava-1.5", "hf")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json"):
        llava_min.load(folder)
