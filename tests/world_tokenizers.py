"""
world_tokenizers.py - the tokenizers of the tests' tiny world: two vocabularies, trained on one text, and their files.

world.py imports what tests use, so that they say world.TEXT or world.llama2_pieces(). Nothing here imports the loaders
under test: the files are written by hand, as the hub and the original repositories have them.
"""
import base64
import functools
import json
import re
import struct
from collections import Counter
from pathlib import Path

TEXT = """A chat between a curious user and an assistant with artificial intelligence. The assistant looks at the image
and gives helpful, detailed and polite answers to the questions of the user. USER: asks. ASSISTANT: answers.
You are a helpful language and vision assistant. You are able to understand the visual content that the user provides
and to assist the user with a variety of tasks using natural language. Answer the question using a single word or a
short phrase, please; a single word is enough.
What color is the small circle on the left? The small circle on the left is red. What color is the large box on the
right side of the image? It is blue, and the box below it is green. Is the circle to the left or to the right of the
box? Is the cup on the table red or blue? Is there a yellow box in the image? Yes, there is. No, there is not.
Who is wearing the hat, the man or the woman? The woman's hat isn't white, it's black; they're on the shelf. We've seen
that the man on the grass holds a brown dog, and I'm sure that he'll walk it to the car. Which animal is that, the cat
or the dog? Do the shirt and the curtain have the same color? Are the wooden door and the metal chair made of the same
material? What is the boy holding, a phone or a camera? Does the train look large? How many cars are in front of the
house: 1, 2, 3 or 12? In 2024 there were 365 photos (small & large), 48 drawings and 7 maps. "Really?" - "Yes!"
left right red blue yes no Left Right Red Blue Yes No white black green brown yellow large small round square wood metal
"""
SPECIAL_LLAMA3 = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>",
                  9: "<|eot_id|>"}                                  # after the ranks; the ids between them are reserved


def train(words, steps):
    """Byte-pair training on tuples of symbols: the most frequent neighbours become one, ties go to the alphabet's end.

    -> the new symbols, in the order they were found.
    """
    words, found = Counter(words), []
    for _ in range(steps):
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merged = Counter()
        for word, count in words.items():
            new, i = [], 0
            while i < len(word):
                hit = word[i:i + 2] == best
                new.append(best[0] + best[1] if hit else word[i])
                i += 2 if hit else 1
            merged[tuple(new)] += count
        words = merged
        if best[0] + best[1] not in found:
            found.append(best[0] + best[1])
    return found


@functools.cache
def llama2_pieces():
    """(text, score, type) of a LLaMA-2-like vocabulary; types as in sentencepiece: 1 normal 2 unknown 3 control 6 byte.

    As there: specials, bytes, merged pieces by falling score, single letters last. The merged ones include runs of
    spaces. Letters outside ASCII and the newline are left to the bytes, all but one.
    """
    found = train(map(tuple, re.findall("▁?[A-Za-z]+|▁?[^A-Za-z▁]", TEXT.replace("\n", " ").replace(" ", "▁"))), 230)
    found[40:40] = ["▁▁", "▁▁▁▁", "▁▁▁"]
    letters = ["▁", *map(chr, range(33, 127)), "é"]
    return [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{b:02X}>", 0.0, 6) for b in range(256)),
            *((text, -float(i), 1) for i, text in enumerate(found + letters))]


@functools.cache
def llama3_ranks():
    """The byte strings of a Llama-3-like vocabulary, rank order: 256 bytes, then what training found."""
    words = re.findall(r" ?[A-Za-z]+|\d{1,3}| ?[^\sA-Za-z\d]+|\s+", TEXT + "A\n\n" * 9 + "A \n" * 9 + "A   A  " * 9)
    letters = [bytes([b]) for b in range(256)]
    return letters + train((tuple(word.encode()[i:i + 1] for i in range(len(word))) for word in words), 240)


def added_token(i, text):
    return {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
            "special": True}


def bos_template(text, i):
    first, a, b = {"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}, \
        {"Sequence": {"id": "B", "type_id": 1}}
    return {"type": "TemplateProcessing", "single": [first, a], "pair": [first, a, first, b],
            "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]}}}


def splits(piece, vocab):
    return [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]


def write_llama2_tokenizer(folder, form, added=(), **extra):
    """form "json": tokenizer.json as the hub has it; "model": sentencepiece's tokenizer.model. extra: other keys."""
    pieces = llama2_pieces()
    if form == "model":
        (Path(folder) / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
        return
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    merges = [pair for text, _, kind in pieces if kind == 1
              for pair in sorted(splits(text, vocab), key=lambda pair: -len(pair[0]))]
    raw = {"version": "1.0", "truncation": None, "padding": None,
           "added_tokens": [added_token(i, text) for i, text in enumerate(("<unk>", "<s>", "</s>"))]
           + [added_token(len(vocab) + i, text) for i, text in enumerate(added)],
           "normalizer": {"type": "Sequence", "normalizers": [
               {"type": "Prepend", "prepend": "▁"},
               {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
           "pre_tokenizer": None, "post_processor": bos_template("<s>", 1),
           "decoder": {"type": "Sequence", "decoders": [
               {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
               {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
           "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                     "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                     "vocab": vocab, "merges": merges}}
    (Path(folder) / "tokenizer.json").write_text(json.dumps(raw | extra, ensure_ascii=False), encoding="utf-8")


def sentencepiece_model(pieces):
    """The protobuf bytes of a sentencepiece ModelProto, written by hand (sentencepiece_model.proto)."""
    def varint(n):
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    def number(field, n):
        return varint(field << 3) + varint(n)

    def block(field, data):
        return varint(field << 3 | 2) + varint(len(data)) + data

    out = b""
    for text, score, kind in pieces:                                # ModelProto.pieces = 1: piece 1, score 2, type 3
        body = block(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        out += block(1, body + (number(3, kind) if kind != 1 else b""))
    trainer = number(3, 2) + number(4, len(pieces)) + number(35, 1)  # model_type BPE, vocab_size, byte_fallback
    normalizer = block(1, b"identity") + number(3, 1) + number(4, 0)  # add_dummy_prefix, remove_extra_whitespaces
    return out + block(2, trainer) + block(3, normalizer)


def write_llama3_tokenizer(folder, form, added=(), bos=True, **extra):
    """form "json": tokenizer.json; "model": tiktoken's ranks. bos False: as first released, which adds no BOS."""
    ranks = llama3_ranks()
    if form == "model":
        lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)]
        (Path(folder) / "tokenizer.model").write_bytes(b"".join(lines))
        return
    plain = [b for b in range(256) if 33 <= b <= 126 or b in range(161, 173) or b >= 174]  # GPT-2's letters for bytes
    letter = {b: chr(b) for b in plain}
    letter |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in letter)}
    spelled = ["".join(letter[b] for b in token) for token in ranks]
    vocab = {text: i for i, text in enumerate(spelled)}
    V, reserved = len(vocab), (f"<|reserved_special_token_{i}|>" for i in range(251))
    special = [SPECIAL_LLAMA3.get(i) or next(reserved) for i in range(256)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    raw = {"version": "1.0", "truncation": None, "padding": None,
           "added_tokens": [added_token(V + i, text) for i, text in enumerate([*special, *added])],
           "normalizer": None,
           "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
               {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
               {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
           "post_processor": {"type": "Sequence", "processors": [byte_level, bos_template(special[0], V)]}
           if bos else byte_level,
           "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
           "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                     "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                     "vocab": vocab, "merges": [pair for text in spelled for pair in splits(text, vocab)]}}
    (Path(folder) / "tokenizer.json").write_text(json.dumps(raw | extra, ensure_ascii=False), encoding="utf-8")


# How Meta's tokenizer cuts text before any merge: contractions, words, numbers of at most three digits, the rest.
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")
