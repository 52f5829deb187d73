"""
make_golden.py - the reference numbers of tests/test_own_golden.py, from implementations that are not ours.

Run     python tests/golden/make_golden.py        rewrites tests/golden/*.json; the test suite reads them, never this
Needs   transformers >= 5 (the model, eager attention, float32), sentencepiece and regex (token ids), torchvision

The checkpoints are tests/world.py's, read by transformers itself from the layout its hub files have. What transformers
does otherwise than the original LLaVA is done here by hand, in a few lines each: pixels, prompt, chunks of the prompt,
and the cut of the padded vocabulary. A knockout replaces the 4-D mask of single decoder layers in a forward pre-hook.
"""
import hashlib
import importlib.metadata
import json
import math
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import regex
import sentencepiece
import torch
from PIL import Image
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import world  # noqa: E402

WINDOWS = (1, 3, 4)
MEAN, STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions. USER: {} ASSISTANT:")
LLAMA3 = ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision "
          "assistant. You are able to understand the visual content that the user provides, and assist the user with a "
          "variety of tasks using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
          "<|start_header_id|>assistant<|end_header_id|>\n\n \n")
BRIEF = " \nAnswer the question using a single word or phrase."
# (picture or None, question, captions)
CASES = {"vicuna": [(None, "Is the cup on the table red or blue?", None),
                    (None, "What is the man holding, a phone or a camera?", None),
                    (None, "Which animal is that, the cat or the dog?", "a brown dog on the grass. a small white cat")],
         "llava-1.5": [((90, 60), "What color is the small circle on the left?", None),
                       ((60, 90), "Is the curtain to the left or to the right?", None),
                       ((64, 64), "Who is wearing the hat, the man or the woman?", None),
                       ((100, 37), "How many photos (of 48) aren't square?", None)]}
CASES["llava-1.6"] = CASES["llama3-next"] = CASES["llava-1.5"]
TEXTS = ["", " ", "a", "left", " left", "Is the curtain to the left or right?", "two  spaces   three    four", " " * 9,
         "\n", "\n\n \n", " \nAnswer", "tab\tand\r\nreturn\n", "trailing   ", "it's, don't, WE'LL 've",
         "2024-10-31, 3.14159", "aaaaaaa zzzz ....... !!!", "naïve café", "e\u0301 is not é", "left 左 right 右",
         "привет", "🙂👩\u200d👩\u200d👧", "▁ and ▁▁", "non\u00a0breaking\u3000space", "<image> is words here",
         "A chat between a curious user and an assistant."]


# ---------------------------------------------------------------------------------------------------- pixels

def normal(image):
    return ((np.asarray(image.convert("RGB")) / 255.0 - MEAN) / STD).transpose(2, 0, 1).astype(np.float32)


def padded(image, side):
    """LLaVA-1.5: centred on a square of the mean colour, then scaled."""
    w, h = image.size
    big = max(w, h)
    page = Image.new("RGB", (big, big), (122, 116, 104))
    page.paste(image, ((big - w) // 2, (big - h) // 2))
    return normal(page.resize((side, side), Image.BICUBIC))[None]


def tiled(image, side, pinpoints):
    """AnyRes: the canvas with most of the photo's pixels, then with least waste; the squeezed photo, then the tiles."""
    w, h = image.size
    ranked = []
    for W, H in pinpoints:
        scale = min(W / w, H / h)
        kept = min(int(w * scale) * int(h * scale), w * h)
        ranked.append((kept, -(W * H - kept), W, H))
    ranked.sort(reverse=True)
    assert ranked[0][:2] != ranked[1][:2], "a tie, which transformers decides the other way: take another size"
    W, H = ranked[0][2:]
    if W / w < H / h:
        new = W, min(math.ceil(h * (W / w)), H)
    else:
        new = min(math.ceil(w * (H / h)), W), H
    page = Image.new("RGB", (W, H), (0, 0, 0))
    page.paste(image.resize(new, Image.BICUBIC), ((W - new[0]) // 2, (H - new[1]) // 2))
    views = [image.resize((side, side), Image.BICUBIC)]
    views += [page.crop((x, y, x + side, y + side)) for y in range(0, H, side) for x in range(0, W, side)]
    return np.stack([normal(view) for view in views])


# ---------------------------------------------------------------------------------------------------- tokens

def llama2_encoder():
    """-> text -> (ids, (start, end) of each in the text), BOS first, by sentencepiece."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=world.sentencepiece_model(world.llama2_pieces()))

    def encode(text):
        spans, at = [], -1                                          # the space put in front is not in the text
        for piece in sp.encode(text, out_type=str):                 # a byte piece is a letter, as long as all are ASCII
            spans.append((at, at := at + (1 if piece.startswith("<0x") else len(piece))))
        return [sp.bos_id(), *sp.encode(text)], [None, *spans]
    return encode


def llama3_encoder():
    """-> the same for Llama-3, tiktoken's way: cut out special tokens, cut up the rest, merge the lowest rank first."""
    ranks = {token: i for i, token in enumerate(world.llama3_ranks())}
    special = {text: len(ranks) + i for i, text in world.SPECIAL_LLAMA3.items()}

    def merge(word):
        parts = [word[i:i + 1] for i in range(len(word))]
        while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
            _, i = min(pairs)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def encode(text):
        ids, spans, at = [special["<|begin_of_text|>"]], [None], 0
        for part in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
            if part in special:
                ids, spans = ids + [special[part]], spans + [(at, at + len(part))]
                at += len(part)
                continue
            for m in regex.finditer(world.LLAMA3_SPLIT, part):
                start = at + m.start()
                for piece in merge(m[0].encode()):
                    ids.append(ranks[piece])
                    spans.append((start, start + len(piece)))       # true of ASCII
                    start += len(piece)
            at += len(part)
        return ids, spans
    return encode


def build(kind, question, captions, picture):
    """-> ids with -200 for the picture, positions of the question in them."""
    k = world.KINDS[kind]
    encode = llama3_encoder() if k.llama3 else llama2_encoder()
    head, tail = (LLAMA3 if k.llama3 else VICUNA).split("{}")
    assert (head + question + (captions or "") + tail).isascii()    # for the positions below
    context = "<image>\n" if picture else f"{captions}\n" if captions else ""
    first = len(head + context)
    ids, inside, at = [], [], 0
    bos = encode("")[0][0]
    for i, chunk in enumerate((head + context + question + BRIEF + tail).split("<image>")):
        chunk_ids, spans = encode(chunk)
        if i:
            ids.append(-200)
            inside.append(False)
            at += len("<image>")
        ids += chunk_ids[1:]
        inside += [at + a < first + len(question) and first < at + b for a, b in spans[1:]]
        at += len(chunk)
    return [bos, *ids], [False, *inside]


# ---------------------------------------------------------------------------------------------------- one case

def decoder_of(model):
    return model.model.language_model if hasattr(model.model, "language_model") else model.model


class Cut:
    """While open, `layers` of the decoder get a mask in which no query at `target` attends to a key at `source`."""

    def __init__(self, model, T, source=(), target=(), layers=()):
        keep = torch.ones(T, T).tril()
        keep[np.ix_(target, source)] = 0
        self.mask = torch.where(keep > 0, 0.0, torch.finfo(torch.float32).min)[None, None]
        self.layers = [decoder_of(model).layers[i] for i in layers]

    def swap(self, module, args, kwargs):
        assert kwargs["attention_mask"].shape == self.mask.shape and kwargs["attention_mask"].dtype == torch.float32
        return args, kwargs | {"attention_mask": self.mask}

    def __enter__(self):
        self.hooks = [layer.register_forward_pre_hook(self.swap, with_kwargs=True) for layer in self.layers]

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def short(x):
    """Floats as the shortest decimals that give the same float32, any nesting."""
    if isinstance(x, torch.Tensor):
        x = x.tolist()
    return [short(y) for y in x] if isinstance(x, list) else float(str(np.float32(x)))


@torch.inference_mode()
def case(kind, model, picture, question, captions):
    k, V = world.KINDS[kind], world.vocab_size(kind)
    ids, inside = build(kind, question, captions, picture)
    out = {"picture": picture, "question": question, "captions": captions, "ids": ids}
    extra, n = {}, 0
    if picture:
        image = world.picture(*picture)
        pixels = torch.from_numpy(tiled(image, k.image, k.pinpoints) if k.anyres else padded(image, k.image))
        extra = {"pixel_values": pixels[None] if k.anyres else pixels}
        if k.anyres:
            extra |= {"image_sizes": torch.tensor([[picture[1], picture[0]]])}  # (height, width) there
        features = torch.cat(list(model.get_image_features(**extra).pooler_output))  # (n, C)
        n, rows = len(features), sorted({0, len(features) // 2, len(features) - 1})
        first = ids.index(-200)
        ids = ids[:first] + [V] * n + ids[first + 1:]                # V is <image>'s id in this layout
        inside = inside[:first] + [False] * n + inside[first + 1:]
        out |= {"picture_sha256": hashlib.sha256(image.tobytes()).hexdigest(), "views": len(pixels), "image_tokens": n,
                "features": {str(i): short(features[i]) for i in rows}}
    T = len(ids)
    x = torch.tensor([ids])
    full = model(input_ids=x, **extra, output_hidden_states=True)
    logits = full.logits[0, -1, :V]
    top = logits.topk(20)
    where = sorted({0, 1, *((first, first + n - 1) if n else ()), inside.index(True), T - 1})
    out |= {"question_positions": [i for i in range(T) if inside[i]],
            "top20": [[i, v] for i, v in zip(top.indices.tolist(), short(top.values), strict=True)],
            "logsumexp": short(logits.logsumexp(0)),
            "norm_positions": where,
            "norms": short(torch.stack([h[0, where].norm(dim=-1) for h in full.hidden_states]))}

    greedy, now, gap = [], logits, math.inf
    for _ in range(4):
        best = now.topk(2)
        gap = min(gap, (best.values[0] - best.values[1]).item())
        greedy.append(best.indices[0].item())
        x = torch.tensor([ids + greedy])
        now = model(input_ids=x, **extra).logits[0, -1, :V]
    assert gap > 2e-3, f"{kind} {question!r}: a greedy step is decided by {gap:.1e}; change the question"
    x = torch.tensor([ids])

    groups = {"question": out["question_positions"], "last": [T - 1]}
    groups |= {"image": list(range(first, first + n))} if n else {}
    edges = [e for e in (("image", "question"), ("question", "last"), ("image", "last"), ("last", "last"))
             if set(e) <= set(groups)]
    out |= {"greedy": greedy, "p_base": short(logits.softmax(0)[greedy[0]]), "knockout": {}}
    for source, target in edges:
        curves = out["knockout"][f"{source}->{target}"] = {}
        for w in WINDOWS:
            curves[str(w)] = []
            for l in range(k.layers):
                layers = range(max(0, l - w // 2), min(k.layers, l - (-w // 2)))
                with Cut(model, T, groups[source], groups[target], layers):
                    p = model(input_ids=x, **extra).logits[0, -1, :V].softmax(0)[greedy[0]]
                curves[str(w)].append(short(p))
    return out


def open_model(kind, folder):
    cls = (LlamaForCausalLM if kind == "vicuna" else
           LlavaNextForConditionalGeneration if world.KINDS[kind].anyres else LlavaForConditionalGeneration)
    layout = "original" if kind == "vicuna" else "hf"
    model, info = cls.from_pretrained(world.write(folder, kind, layout), dtype=torch.float32,
                                      attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info                             # nothing missing, nothing left over
    return model.eval()


def main():
    torch.set_num_threads(2)
    tables = {name: [[text, encode(text)[0]] for text in TEXTS]
              for name, encode in (("llama2", llama2_encoder()), ("llama3", llama3_encoder()))}
    (HERE / "tokens.json").write_text(
        "{" + ",\n".join(f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in tables.items())
        + "}\n")
    versions = {name: importlib.metadata.version(name) for name in
                ("torch", "transformers", "sentencepiece", "regex", "pillow", "numpy")}
    for kind, cases in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            model = open_model(kind, folder)
            made = [case(kind, model, *c) for c in cases]
        lines = ",\n".join(json.dumps(c, separators=(",", ":")) for c in made)
        file = HERE / f"{kind}.json"
        file.write_text(f'{{"kind": "{kind}", "versions": {json.dumps(versions)}, "cases": [\n{lines}\n]}}\n')
        print(f"{file.name}: {len(made)} cases, {file.stat().st_size / 1000:.0f} kB, p_base "
              + " ".join(f"{c['p_base']:.3f}" for c in made))


if __name__ == "__main__":
    main()
