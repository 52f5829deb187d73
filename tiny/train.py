"""
tiny/train.py - train the bundled models, LLaVAs of 2.8 M parameters, from random weights on tiny/world.py's pictures.

Run     python -m tiny.train out/my-tiny                     over an hour on 2 CPU cores; called again, it resumes
        python -m tiny.train out/my-tiny-anyres --anyres --start out/my-tiny
Needs   torch, tokenizers, safetensors, tqdm; llava_min.py and its neighbours, harness/

The model is llava_min's. Stage 0 takes the place of CLIP's own training; stages 1 and 2 are LLaVA's, captions and then
questions; stages 3 and 4 repeat the questions that are learnt last more often.

Shapes  B pictures in a batch  K texts about each of them  T tokens of a text  P tokens before it  N views of a picture
"""
import json
import os
import random
import re
import sys
import time
from collections import Counter
from itertools import accumulate, count, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

import clip_vit
import llava_min
from harness import hub
from harness.errors import one_line_errors
from harness.flags import Parser
from harness.runs import replace_text
from llava_min import INSTRUCTION
from tiny.world import ASKERS, COLORS, PHOTOS, SHAPES, SIZES, draw, phrases, scene, sides
from vicuna import TEMPLATE, attend, causal, to_mask
from views import patch_boxes, patch_slots, slot_rows, views

# ---------------------------------------------------------------------------------------------------- the model

def config(vocab, anyres):
    """A config.json in transformers' LLaVA layout. vocab: pieces of the tokenizer, without <image> and <pad>."""
    side, rows = 64, (vocab + 2 + 63) // 64 * 64                    # the tables are padded, as the conversions do
    raw = {"model_type": "llava_next" if anyres else "llava", "projector_hidden_act": "gelu",
           "architectures": ["LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"],
           "vision_feature_layer": -1, "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
           "image_token_index": vocab, "pad_token_id": vocab + 1, "image_seq_length": 64,
           "torch_dtype": "float32",                                # the dtype to run it in; the file holds float16
           "vision_config": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": 128,
                             "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
                             "image_size": side, "patch_size": 8},
           "text_config": {"model_type": "llama", "hidden_size": 128, "intermediate_size": 320,
                           "num_hidden_layers": 10, "num_attention_heads": 4, "rms_norm_eps": 1e-5,
                           "max_position_embeddings": 1024, "rope_theta": 10000.0, "vocab_size": rows,
                           "bos_token_id": 1, "eos_token_id": 2}}
    if anyres:
        raw["image_grid_pinpoints"] = [[a * side, b * side] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
        raw["use_image_newline_parameter"] = True
    return raw


def train_tokenizer(texts):
    """A small tokenizer like Llama-2's: byte fallback, "▁" for a space, a piece for every word of `texts`."""
    special = ["<unk>", "<s>", "</s>"]
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.pre_tokenizer = pre_tokenizers.Punctuation("isolated")        # for the training only: no merge crosses a word
    words = Counter(word for text in texts for word in re.findall("▁?[^▁\n]+", "▁" + text.replace(" ", "▁")))
    t.train_from_iterator((word for word, n in sorted(words.items()) for _ in range(min(n, 100) + 1)),
                          trainers.BpeTrainer(vocab_size=4096, min_frequency=2, show_progress=False, special_tokens=[
                              *special, *(f"<0x{b:02X}>" for b in range(256))],
                              initial_alphabet=["▁", *map(chr, range(33, 127))]))
    raw = json.loads(t.to_str())
    raw["added_tokens"] = []                                        # the bytes are plain pieces of the vocabulary
    t = Tokenizer.from_str(json.dumps(raw))
    t.pre_tokenizer = None
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    t.add_special_tokens([AddedToken(text, normalized=False) for text in (*special, "<image>", "<pad>")])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return t


# ---------------------------------------------------------------------------------------------------- training

CAPTION = "Describe the image."
BY_COLOR = "Which shape is which color?"
# How often each of ASKERS asks in stages 2 to 4: the six tasks more often than the others, LogicalObj most of all in
# stage 3, and in stage 4 also what it consists of: whether a thing is there at all.
WEIGHTS = {2: (1, 1, 1, .5, 2, 1, 1, 1, .5, 2, 2, 2, .5, 3, 1, 3, 1),
           3: (1, .5, 1, .5, 1, .5, 1, 1, .5, 1, 2, 1, .5, 10, .5, 2, 1),
           4: (6, .5, .5, .5, .5, .5, 1, .5, .5, .5, 1, 2, .5, 10, .5, 1, .5)}


def corpus(seed):
    """The texts that the tokenizer is trained on: questions, answers and captions of the first thousand scenes."""
    yield TEMPLATE[0] + f"\n{CAPTION}{INSTRUCTION}" + TEMPLATE[1]
    for i in range(1000):
        s, r = scene(seed, "train", i), random.Random(i)
        for _, _, ask in ASKERS:
            if q := ask(s, r):
                yield from ("\n" + q[0], q[1], q[1].capitalize())
        yield from (phrase for phrase, _ in phrases(s, r))
        yield caption(s, r)


def caption(s, r):
    """A caption of keywords, the things in any order: "moon red small left top. cross ... weather sunny."

    Every word after a thing's name can be read off the picture, so nearly every word is learnt from it. With sentences
    ("The moon is small and red."), the model learns which color belongs to which thing much later, see tiny/README.md.
    """
    things = (" ".join((t.name, t.color, t.size, *sides(s, t).values())) for t in r.sample(s.things, len(s.things)))
    return ". ".join((*things, f"weather {s.weather}."))


def by_color(s, r):
    """From a color to its things, in any order: "red moon cross. blue star."

    Without such captions, the model does not learn which of two shapes is red, see tiny/README.md.
    """
    colors = sorted({t.color for t in s.things})
    return ". ".join(" ".join((color, *(t.name for t in r.sample(s.things, len(s.things)) if t.color == color)))
                     for color in r.sample(colors, len(colors))) + "."


def texts_of(s, r, stage):
    """The texts about one picture: (question, reply, brief). Two captions, and from stage 2 on six questions."""
    texts = [(CAPTION, caption(s, r), False), (BY_COLOR, by_color(s, r), False)]
    while stage >= 2 and len(texts) < 8:
        _, _, ask = r.choices(ASKERS, WEIGHTS[stage])[0]
        if q := ask(s, r):
            texts.append((q[0], q[1].capitalize(), True))
    return texts


class Batch:
    """B pictures of one size with K texts each, as tensors."""

    def __init__(self, model, scenes, said):
        """scenes: B of them, of one size where the model has AnyRes. said: B lists of K (question, reply, brief)."""
        c, t, (before, after) = model.config, model.tokenizer, TEMPLATE
        self.pixels = torch.stack([clip_vit.to_pixels(view) for s in scenes for view in views(draw(s), c.geometry)])
        self.slots = patch_slots((scenes[0].width, scenes[0].height), c.geometry)
        self.before = torch.tensor(t.encode(before).ids)            # BOS and the system's words, the same for all
        asked = [f"\n{question}{INSTRUCTION if brief else ''}{after}" for texts in said for question, _, brief in texts]
        replies = [f" {reply}" for texts in said for _, reply, _ in texts]
        skip = [len(e.ids) - 2 for e in t.encode_batch(asked)]      # tokens before the one that predicts the reply
        full = [e.ids[1:] + [2] for e in t.encode_batch([a + b for a, b in zip(asked, replies, strict=True)])]
        T = max(map(len, full)) - 1                                 # right padding is safe under a causal mask
        self.ids = torch.tensor([ids[:-1] + [0] * (T + 1 - len(ids)) for ids in full])  # (B K, T)
        self.next = torch.tensor([[-1] * n + ids[1 + n:] + [-1] * (T + 1 - len(ids))    # -1: not to be learnt
                                  for n, ids in zip(skip, full, strict=True)])
        brief = torch.tensor([brief for texts in said for _, _, brief in texts])
        length = (self.next >= 0).sum(1)
        self.answers = (length.cumsum(0) - length)[brief]           # of all replies' tokens, the first ones of answers

    def to(self, device):
        for name, tensor in vars(self).items():
            setattr(self, name, tensor.to(device))
        return self


def replies(model, b):
    """Batch -> logits (n, V) at the positions that predict the replies' tokens, and those tokens (n,).

    The same as llava_min's forward for B K prompts. But each picture, with the template's words before it, goes through
    a layer once; its K texts then attend to it through the layer's cache, and no text attends to another.

        picture 0     text 0 about it     picture and texts attend to the picture before them, and to themselves
                      text 1 about it
        picture 1     text 0 about it
                      text 1 about it
    """
    d, c = model.decoder, model.config
    x = model.mm_projector(model.vision_tower.features(b.pixels, c.layer))              # (B N, patches, C)
    B = len(x) // (b.slots[:, 0].max().item() + 1)
    x = x.reshape(B, -1, x.shape[-1])
    if c.aspect == "anyres":
        x = torch.cat((x, model.image_newline.to(x.dtype).expand(B, 1, -1)), 1)         # the newline is the last row
    x = x[:, slot_rows(b.slots, c.vision.side)]                                         # as LLaVA.image_features
    x = torch.cat((d.embed_tokens(b.before).expand(B, -1, -1), x.float()), 1)           # (B, P, C)
    y = d.embed_tokens(b.ids)                                                           # (B K, T, C)
    P, K, T = x.shape[1], len(y) // B, y.shape[1]
    rope_x, rope_y = (d.rope(torch.arange(a, z, device=x.device)) for a, z in ((0, P), (P, P + T)))
    masks = [to_mask(causal(n, S, x.device)) for n, S in ((P, P), (T, P + T))]
    for layer in d.layers:
        cache = []
        x = layer(x, *rope_x, masks[0], cache)
        y = layer(y, *rope_y, masks[1], [kv.repeat_interleave(K, 0) for kv in cache])
    learnt = b.next >= 0
    return d.lm_head(d.norm(y[learnt])), b.next[learnt]


def initialize(model, seed):
    """Random weights of such a size that activations neither grow nor shrink from layer to layer."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight") or "layrnorm.weight" in name or "layer_norm" in name and p.ndim == 1:
            p.data.fill_(0.0 if name.endswith("bias") else 1.0)
        elif p.ndim == 1 and name != "image_newline":
            p.data.zero_()
        else:
            small = name.removesuffix(".weight").endswith(("o_proj", "out_proj", "down_proj", "fc2", "lm_head"))
            p.data.normal_(generator=g)
            p.data *= (0.2 if "position" in name else 0.02 if "embed" in name or p.ndim == 1 else
                       (0.3 if small else 1.0) / p.shape[1] ** 0.5)


def build(seed, anyres, start=None):
    """-> (LLaVA with its tokenizer, its config.json as a dict): random, or from the finished model in a folder `start`.

    A newline vector that `start` lacks stays random. ValueError: `start` is of another size.
    """
    other = hub.load(str(start), dtype="float32", device="cpu") if start else None
    t = other.tokenizer if other else train_tokenizer(corpus(seed))
    raw = config(t.token_to_id("<image>"), anyres)
    model = llava_min.LLaVA(llava_min.Config.from_json(raw))
    model.tokenizer = t
    initialize(model, seed)
    if other:
        theirs = dict(other.named_parameters())
        for name, p in model.named_parameters():
            if name in theirs and theirs[name].shape == p.shape:
                p.data.copy_(theirs[name])
            elif name != "image_newline":
                raise ValueError(f"{start} is a model of other sizes: see {name}")
    for layer in model.decoder.layers:
        layer.kernel = attend                                       # for heads this small SDPA's backward is slower
    return model, raw


def patch_labels(s, c):
    """What each image token of a scene shows: int (n, 6) of shape, color, size, the two sides of the picture, and 1.

    (-1, -1, -1, -1, -1, 0) is nothing. A patch shows the thing whose box covers most of it, if that is a fifth of it at
    least. The order is that of views.patch_slots.
    """
    boxes = patch_boxes((s.width, s.height), c.geometry).nan_to_num(-1)        # (n, 4); padding: no area
    things = torch.tensor([(t.x, t.y, t.x + t.w, t.y + t.h) for t in s.things])
    low = torch.maximum(boxes[:, None, :2], things[:, :2])
    high = torch.minimum(boxes[:, None, 2:], things[:, 2:])
    part = (high - low).clamp(min=0).prod(-1) / (boxes[:, None, 2:] - boxes[:, None, :2]).prod(-1).clamp(min=1e-9)
    kinds = torch.tensor([(SHAPES.index(t.name), list(COLORS).index(t.color), list(SIZES).index(t.size),
                           ("left", "right", None).index(sides(s, t).get("hposition")),
                           ("top", "bottom", None).index(sides(s, t).get("vposition")), 1) for t in s.things])
    most, which = part.max(1)                                                           # (n,)
    return torch.where((most >= 0.2)[:, None], kinds[which], torch.tensor([-1] * 5 + [0]))


def patch_step(model, heads, seed, step, batch):
    """One step of stage 0: predict from each patch's feature what it shows -> loss, shares of right predictions."""
    c = model.config
    scenes = [scene(seed, "train", step * 1000 + i) for i in range(batch)]
    pixels = torch.stack([clip_vit.to_pixels(views(draw(s), c.geometry)[0]) for s in scenes]).to(model.device)
    labels = torch.cat([patch_labels(s, c)[:c.vision.side ** 2] for s in scenes]).to(model.device)  # the first view's
    with torch.autocast(model.device.type, torch.bfloat16):
        guesses = heads(model.vision_tower.features(pixels, c.layer)).float().flatten(0, 1).split(PARTS, 1)
    loss = sum(F.cross_entropy(g, l, ignore_index=-1) for g, l in zip(guesses, labels.T, strict=True))
    there = labels[:, -1] == 1
    right = torch.stack([(g.argmax(1) == l)[there] for g, l in zip(guesses, labels.T, strict=True)]).float().mean(1)
    return loss, right


PARTS = [len(SHAPES), len(COLORS), len(SIZES), 3, 3, 2]             # number of classes of each label of a patch


def train(out, anyres=False, start=None, steps=(2500, 800, 1500, 2500, 0), seed=0, device="cpu", batch=24, rate=1.5e-3,
          save_every=200):
    """Train a model into the folder `out`, in five stages.

    Stage 0 trains the vision tower to say what a patch shows, on 2 `batch` pictures a step. Stages 1 and 2 are LLaVA's,
    but all weights are trained in both, since only the tower's are trained yet. steps: the number for each stage. The
    learning rate rises for 200 steps and falls over the last 30 %, once in stage 0, once in the others together.
    start: the folder of a model to start from, instead of random weights.
    An unfinished training in `out` is resumed. ValueError: it has other settings, or is finished.
    """
    out = Path(out)
    state, log = out / "training.safetensors", out / "training.csv"
    if (out / "model.safetensors").exists():
        raise ValueError(f"{out} holds a finished model; train into another folder, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    settings = {"anyres": anyres, "start": start and str(start), "steps": list(steps), "seed": seed, "batch": batch,
                "rate": rate}
    model, raw = build(seed, anyres, start)
    heads = torch.nn.Linear(model.config.vision.width, sum(PARTS))  # of stage 0 alone
    torch.nn.init.zeros_(heads.weight)
    torch.nn.init.zeros_(heads.bias)
    model.to(device)
    heads.to(device)
    named = dict(model.named_parameters()) | {f"heads.{name}": p for name, p in heads.named_parameters()}
    opt = torch.optim.AdamW(named.values(), rate, betas=(0.9, 0.98), weight_decay=0.02)
    first, lines, seconds = restore(state, settings, named, opt) if state.exists() else (0, [], 0.0)
    total, began, recent = sum(steps), time.time() - seconds, []
    print(f"{total - first:,} of {total:,} steps left (stages 0 to 4: {', '.join(f'{n:,}' for n in steps)}); the bar's "
          "time is at the speed of the stage that it is in, and those after stage 0 are slower", file=sys.stderr)
    for step in tqdm(range(first, total), initial=first, total=total, unit="step", dynamic_ncols=True):
        stage = sum(step >= end for end in accumulate(steps[:-1]))
        at, length = (step, steps[0]) if stage == 0 else (step - steps[0], total - steps[0])
        for group in opt.param_groups:
            group["lr"] = rate * min(1, (at + 1) / 200, (length - at) / (0.3 * length))
        if stage == 0:
            loss, right = patch_step(model, heads, seed, step, 2 * batch)
            right = right.mean()
        else:
            b = batch_of(model, seed, step, batch, stage).to(device)
            with torch.autocast(model.device.type, torch.bfloat16):
                logits, tokens = replies(model, b)
            loss = F.cross_entropy(logits.float(), tokens)
            right = (logits.argmax(-1) == tokens)[b.answers if stage > 1 else slice(None)].float().mean()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        opt.step()
        recent.append((loss.item(), right.item()))
        if step % 50 == 49 or step + 1 == total:
            loss, right = (sum(column) / len(recent) for column in zip(*recent, strict=True))
            lines.append(f"{step + 1},{stage},{loss:.4f},{right:.4f},{time.time() - began:.0f}\n")
            recent = []
            replace_text(log, "step,stage,loss,right,seconds\n" + "".join(lines))
        if (step + 1) % save_every == 0 and step + 1 < total:
            about = {"settings": settings, "step": step + 1, "seconds": time.time() - began, "lines": lines}
            moments = {f"{key}.{name}": value for name, p in named.items() for key, value in opt.state[p].items()}
            save(state, {name: p.data for name, p in named.items()} | moments, about=json.dumps(about))
    write_model(out, model, raw)
    state.unlink(missing_ok=True)


def restore(state, settings, named, opt):
    """Load weights and AdamW's moments of a stopped training -> (steps done, lines of its log, seconds it took)."""
    with safe_open(state, "pt") as f:
        about = json.loads(f.metadata()["about"])
        old = about["settings"]
        odd = next((key for key in settings if old.get(key) != settings[key]), None)
        if odd:
            raise ValueError(f"{state.parent} was begun with {odd} = {old.get(odd)}, now it is {settings[odd]}; "
                             "use another folder, or delete it")
        for name, p in named.items():
            p.data.copy_(f.get_tensor(name))
            kept = {key: f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
            if kept["step"] in f.keys():
                opt.state[p] = {key: f.get_tensor(full).to(p.device if key != "step" else "cpu")
                                for key, full in kept.items()}
    return about["step"], about["lines"], about["seconds"]


def batch_of(model, seed, step, batch, stage):
    """The Batch of one training step. It depends on the seed and the step alone, so resuming changes nothing."""
    size = PHOTOS[step % len(PHOTOS)] if model.config.aspect == "anyres" else None      # a batch has photos of one size
    drawn = (scene(seed, "train", step * 1000 + i) for i in count())
    scenes = list(islice((s for s in drawn if size in (None, (s.width, s.height))), batch))
    r = random.Random(f"{seed}/{step}")
    return Batch(model, scenes, [texts_of(s, r, stage) for s in scenes])


# Our names -> transformers' LLaVA layout; the first that fits counts.
HUB_NAMES = (("decoder.lm_head.", "language_model.lm_head."), ("decoder.", "language_model.model."),
             ("mm_projector.0.", "multi_modal_projector.linear_1."),
             ("mm_projector.2.", "multi_modal_projector.linear_2."), ("vision_tower.", "vision_tower.vision_model."),
             ("image_newline", "image_newline"))


def write_model(out, model, raw):
    """config.json, tokenizer.json and model.safetensors in float16, as transformers' LLaVA repositories have them."""
    rows = raw["text_config"]["vocab_size"]
    tensors = {}
    for name, p in model.named_parameters():
        if name in ("decoder.embed_tokens.weight", "decoder.lm_head.weight"):
            p = F.pad(p, (0, 0, 0, rows - len(p)))                  # <image>, <pad>, and up to the next multiple of 64
        old, new = next(pair for pair in HUB_NAMES if name.startswith(pair[0]))
        name = new + name.removeprefix(old)
        if old == "decoder.":                                       # what vicuna.rename takes out of a name
            name = re.sub(r"\.(?=[qkvo]_proj\.)", ".self_attn.", re.sub(r"\.(?=(gate|up|down)_proj\.)", ".mlp.", name))
        tensors[name] = p.detach().half()
    # LLaVA reads the tower before this norm, but published files have it, and transformers warns where it is missing.
    one = torch.ones(model.config.vision.width, dtype=torch.float16)
    tensors |= {f"vision_tower.vision_model.post_layernorm.{name}": value
                for name, value in (("weight", one), ("bias", 0 * one))}
    (out / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    (out / "tokenizer.json").write_text(model.tokenizer.to_str() + "\n", encoding="utf-8")
    save(out / "model.safetensors", tensors, format="pt")


def save(file, tensors, **about):
    """Write a safetensors file. A crash leaves either the old file or the new one, never half of one."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, f"{file}.new", about)
    os.replace(f"{file}.new", file)


def main(argv=None):
    with one_line_errors():
        parser = Parser(__doc__)
        parser.add_argument("folder", metavar="DIR")
        parser.add_argument("--anyres", action="store_true", help="a LLaVA-1.6: tiles, newlines, unpad")
        parser.add_argument("--start", metavar="DIR", help="a finished model to start from")
        parser.add_argument("--steps", type=int, nargs=5, metavar="N", help="of the five stages")
        parser.add_argument("--rate", type=float, metavar="X", help="highest learning rate")
        parser.add_argument("--batch", type=parser.count, default=24, metavar="N", help="pictures in a step (24)")
        parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and scenes (0)")
        parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
        args = parser.parse_args(argv)
        steps, rate = (2500, 800, 1500, 2500, 0), 1.5e-3
        if args.start:
            steps, rate = ((0, 0, 300, 0, 350), 5e-4) if args.anyres else ((0, 0, 0, 0, 1500), 8e-4)
        train(args.folder, args.anyres, args.start, tuple(args.steps or steps), args.seed, hub.pick_device(args.device),
              args.batch, args.rate or rate)
        print(f"wrote {args.folder}; try: python -m tiny.score --model {args.folder}")


if __name__ == "__main__":
    main()
