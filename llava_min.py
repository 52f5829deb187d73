"""
llava_min.py - LLaVA-1.5, LLaVA-1.6 and Llama3-LLaVA-NeXT: a photo and a question become one residual stream.

Needs   torch, safetensors, tokenizers, pillow, numpy, and beside it views.py, clip_vit.py, vicuna.py and llama3.py.
Run     python llava_min.py --model FOLDER --image photo.jpg --question "Is the cup red or blue?"
Use     model = load("FOLDER"); p = model.prompt("Is it red?", open_image("photo.jpg")); model.generate(p)
Matches the original LLaVA (haotian-liu/LLaVA, LLaVA-VL/LLaVA-NeXT)  (tests/test_golden.py)
Paper   LLaVA-1.5, https://arxiv.org/abs/2310.03744; LLaVA-NeXT, https://llava-vl.github.io/blog/2024-01-30-llava-next

    photo ----> views ----> vision tower ----> projector --+
    question -> template -> token ids -> embeddings -------+--> residual stream (1, T, C) --> decoder --> logits

Shapes  B sequences  T tokens  S keys  C width  V vocabulary  N views  P patches of a view  n image tokens  I view, px

Left out on purpose: several images or turns in one prompt, training, names on the hub (harness/hub.py has them).
"""
import argparse
import json
import re
import signal
import sys
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

if __name__ == "__main__":                         # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch import nn

import clip_vit
import llama3
import vicuna
from views import Geometry, open_image, patch_slots, slot_rows, to_rgb, views

IMAGE = -200                                       # the id that marks the photo's place among the token ids
INSTRUCTION = " \nAnswer the question using a single word or phrase."  # the paper's, with its space before the newline
DECODERS = (vicuna, llama3)                        # asked in this order whether a config.json is theirs


# ---------------------------------------------------------------------------------------------------- configuration

@dataclass(frozen=True)
class Config:
    text: object                                   # the decoder file's Config
    vision: clip_vit.Config | None = None          # None: a text-only model (Vicuna-1.5)
    aspect: str = "pad"                            # "pad": one square view (1.5); "anyres": photo and tiles (1.6, NeXT)
    pinpoints: tuple = ()                          # canvases of tiles that AnyRes chooses from, (width, height) in px
    layer: int = -2                                # which hidden state of the vision tower is read
    preprocess: str = "llava"                      # see views.Geometry

    def __post_init__(self):
        """ValueError names a hidden state that the tower does not have, or views that are not made of patches."""
        if self.vision:
            n = self.vision.layers
            if type(self.layer) is not int or not -n - 1 <= self.layer <= n:
                raise ValueError(f"the config reads hidden state {self.layer!r} of a vision tower of {n} layers")
            _ = self.geometry

    @property
    def geometry(self):                            # of a model with a vision tower
        fill = tuple(int(255 * m) for m in self.tower_file.MEAN)
        return Geometry(self.vision.image, self.vision.patch, self.aspect, self.pinpoints, self.preprocess, fill)

    tower_file = clip_vit
    decoder_file = property(lambda self: next(file for file in DECODERS if isinstance(self.text, file.Config)))
    template = property(lambda self: self.decoder_file.TEMPLATE)    # what comes before and after the user's message

    @classmethod
    def from_json(cls, raw, tower=None):
        """A checkpoint's config.json, as a dict, -> Config. ValueError names a setting that is not implemented.

        tower: the vision tower's own config, as a dict, where the checkpoint's does not describe it (original layout).
        """
        if "text_config" in raw:
            return cls.from_hf(raw)
        if not raw.get("mm_vision_tower"):                          # a text-only model
            return cls(decoder_config(raw))
        aspect = raw.get("image_aspect_ratio") or "square"
        check({"mm_patch_merge_type": "flat", **raw}, mm_projector_type="mlp2x_gelu", mm_vision_select_feature="patch",
              mm_use_im_start_end=False, mm_use_im_patch_token=False, mm_resampler_type=None,
              mm_patch_merge_type="spatial_unpad" if aspect == "anyres" else "flat")
        if aspect not in ("pad", "anyres"):
            raise ValueError(f"config.json sets image_aspect_ratio={aspect!r}; pad and anyres are implemented")
        return cls(decoder_config(raw), clip_vit.Config.from_json(tower), aspect,
                   tuple(map(tuple, raw.get("image_grid_pinpoints") or ())), raw.get("mm_vision_select_layer", -2))

    @classmethod
    def from_hf(cls, raw):
        """The same in the transformers layout, where text_config and vision_config describe the two parts."""
        check(raw, vision_feature_select_strategy="default", projector_hidden_act="gelu", quantization_config=None,
              multimodal_projector_bias=True, use_image_newline_parameter=True, tie_word_embeddings=False)
        kind, layer = raw.get("model_type"), raw.get("vision_feature_layer", -2)
        if kind not in ("llava", "llava_next") or not isinstance(layer, int):
            raise ValueError(f"config.json sets model_type={kind!r}, vision_feature_layer={layer!r}; "
                             "llava and llava_next with one layer are implemented")
        text = dict(raw.get("text_config") or {})
        tower = raw.get("vision_config") or {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                                             "num_attention_heads": 16, "image_size": 336, "patch_size": 14}
        # <image> got the first id after the real vocabulary. The rows from there on are random, and are left out.
        text["vocab_size"] = raw.get("image_token_index", raw.get("image_token_id", 32000))
        pinpoints = raw.get("image_grid_pinpoints") or [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        return cls(decoder_config(text), clip_vit.Config.from_json(tower), "anyres" if kind == "llava_next" else "pad",
                   tuple(map(tuple, pinpoints)), layer)


def decoder_config(raw):
    """The decoder's part of a config.json -> the Config of the decoder file that reads it."""
    return next(file for file in DECODERS if file.reads(raw)).Config.from_json(raw)


def check(raw, **plain):
    if odd := {key: raw[key] for key, value in plain.items() if raw.get(key) not in (None, value)}:
        raise ValueError(f"config.json sets {odd}; only {({key: plain[key] for key in odd})} is implemented")


# ---------------------------------------------------------------------------------------------------- the prompt

@dataclass(frozen=True, eq=False)
class Prompt:
    """One question as the model reads it: T tokens, counted with every image token in its place."""
    text: str                                      # the whole prompt, <image> once if there is a photo
    question: str
    parts: dict                                    # captions, question, instruction, message: [start, end) in `text`
    ids: list                                      # token ids; one IMAGE stands for all image tokens
    tokens: list                                   # the T tokens as the vocabulary spells them; "" for image tokens
    spans: list                                    # their [start, end) in `text`; None for image tokens, an added BOS
    positions: torch.Tensor                        # (T,), for the decoder's rope
    image: range = range(0)                        # positions of the n image tokens
    slots: torch.Tensor | None = None              # (n, 3), which patch each of them shows, see views.patch_slots
    pixels: torch.Tensor | None = None             # (N, 3, I, I) float32
    size: tuple | None = None                      # the photo's width and height in px
    geometry: Geometry | None = None

    def __len__(self):
        return len(self.tokens)


def tokenize(tokenizer, text, bos):
    """Prompt text -> (ids, character spans). The text before and after <image> is tokenized separately.

    As in the original (tokenizer_image_token in mm_utils.py): each piece is encoded with special tokens; if the first
    piece begins with BOS, the first id of every piece is dropped and one BOS is put in front. A Llama-2 tokenizer so
    puts a space before each piece, and Llama-3 gets a second BOS, since its template holds one. If a tokenizer adds no
    BOS, the template's is dropped in its place, and with it the first id of the second piece, a newline.
    """
    pieces = text.split("<image>")
    encoded = [tokenizer.encode(piece) for piece in pieces]
    drop = int(bos is not None and encoded[0].ids[:1] == [bos])
    ids, spans, at = [bos] * drop, [None] * drop, 0
    for i, (piece, e) in enumerate(zip(pieces, encoded, strict=True)):
        if i:
            ids, spans, at = ids + [IMAGE], spans + [None], at + len("<image>")
        ids += e.ids[drop:]
        spans += [(a + at, b + at) for a, b in e.offsets[drop:]]
        at += len(piece)
    return ids, spans


# ---------------------------------------------------------------------------------------------------- the model

class LLaVA(nn.Module):
    """Vision tower, projector and decoder under the original's parameter names. `load` fills one."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.decoder = c.decoder_file.Decoder(c.text)
        if c.vision:
            self.vision_tower = c.tower_file.Tower(c.vision)
            self.mm_projector = nn.Sequential(nn.Linear(c.vision.width, c.text.width), nn.GELU(),
                                              nn.Linear(c.text.width, c.text.width))
        if c.aspect == "anyres":
            self.image_newline = nn.Parameter(torch.zeros(c.text.width))
        # Set by `load`; stop: ids that end an answer; special: texts that are control tokens; the last two: offload.py.
        self.tokenizer, self.stop, self.special, self.store, self.waited = None, set(), ("<image>",), list, float

    @property
    def device(self):
        return self.decoder.norm.weight.device

    def prompt(self, question, image=None, *, captions=None, brief=True, instruction=INSTRUCTION):
        """A question about a PIL image, or a picture's path (None for a text-only model) -> Prompt.

        captions: text in place of the image, for a text-only model (appendix G of the paper). brief: append
        `instruction`, which asks for one word; with the paper's own, PAPER_END of the decoder file ends the prompt.
        ValueError: image or text-only model where the other is needed; a question that is empty or no text, or holds a
        special token, as do captions; more tokens than the model takes; a tokenizer of another model.
        """
        if not question.strip():                                    # the checks come before any work on the photo
            raise ValueError("the question is empty")
        question.encode()                                           # ValueError: bytes of the shell that are no text
        if special := [token for token in self.special if token in f"{question}\n{captions}"]:
            raise ValueError(f"the text holds {special[0]}, which would end a message or stand for a picture")
        if (image is None) == bool(self.config.vision):
            raise ValueError("this model needs an image" if image is None else "this model is text-only: no image")
        c, file = self.config, self.config.decoder_file
        (before, after), instruction = c.template, instruction if brief else ""
        context = "<image>\n" if image is not None else f"{captions}\n" if captions else ""
        text = before + context + question + instruction + after + file.PAPER_END * (instruction == INSTRUCTION)
        ids, spans = tokenize(self.tokenizer, text, file.BOS and self.tokenizer.token_to_id(file.BOS))
        tokens, photo = ["" if i == IMAGE else self.tokenizer.id_to_token(i) for i in ids], {}
        if image is not None:                                       # n image tokens take the place of the one mark
            image = open_image(image) if isinstance(image, str | Path) else to_rgb(image)
            first, g = ids.index(IMAGE), c.geometry
            slots, pixels = patch_slots(image.size, g), [c.tower_file.to_pixels(v) for v in views(image, g)]
            n = len(slots)
            tokens[first:first + 1], spans[first:first + 1] = [""] * n, [None] * n
            photo = {"image": range(first, first + n), "slots": slots, "pixels": torch.stack(pixels),
                     "size": image.size, "geometry": g}
        if max(ids) >= c.text.vocab:
            raise ValueError(f"the tokenizer gives id {max(ids)}, beyond this model's vocabulary of {c.text.vocab}")
        if len(tokens) > c.text.positions:
            raise ValueError(f"the prompt has {len(tokens)} tokens, the model takes {c.text.positions}")
        start, end = len(before + context), len(before + context + question)        # character spans, for groups.py
        parts = {"message": (len(before), len(text)), "question": (start, end),
                 "instruction": (end, end + len(instruction))}
        parts |= {"captions": (len(before), start - 1)} if captions and image is None else {}
        return Prompt(text, question, parts, ids, tokens, spans, torch.arange(len(tokens), device=self.device), **photo)

    def patch_features(self, p):
        """Prompt -> the tower's features of all views (N P, vision C). The reference first rounds pixels to float16."""
        return self.vision_tower.features(p.pixels.to(self.device), self.config.layer).flatten(0, 1)

    def image_features(self, p):
        """Prompt -> its image tokens (n, C): features through the projector, the newline vector where a row ends."""
        features = self.mm_projector(self.patch_features(p).to(self.decoder.norm.weight.dtype))    # (N P, C)
        if self.config.aspect == "anyres":
            features = torch.cat((features, self.image_newline[None]))
        return features[slot_rows(p.slots, p.geometry.side).to(self.device)]     # a newline's row is -1, the last

    @torch.inference_mode()
    def embed(self, p):
        """Prompt -> embeddings (1, T, C): the residual stream before the first layer, h^0."""
        def words(ids):
            return self.decoder.embed_tokens(torch.tensor(ids, dtype=torch.long, device=self.device))
        if not p.image:
            return words(p.ids)[None]
        cut = p.ids.index(IMAGE)                                    # splice: text, image tokens, text
        return torch.cat((words(p.ids[:cut]), self.image_features(p), words(p.ids[cut + 1:])))[None]

    def forward(self, p, mask=None):
        """Prompt -> logits (1, T, V). mask: additive, broadcasts to (1, H, T, T); None is plain causal."""
        return self.decoder.lm_head(self.decoder.norm(self.decoder(self.embed(p), p.positions, mask)))

    @torch.inference_mode()
    def prefill(self, x, positions, mask=None):
        """Embeddings x (1, T, C) -> (logits of the last position (1, V), caches for `decode`)."""
        caches = [[] for _ in range(len(self.decoder.layers))]
        h = self.decoder(x, positions, mask, caches)
        return self.decoder.lm_head(self.decoder.norm(h[:, -1])), caches

    @torch.inference_mode()
    def decode(self, logits, caches, start, max_new_tokens=16, keep=None):
        """Greedy decoding of B sequences after their prefill -> list of B lists of ids, without the end token.

        logits (B, V) at each sequence's last token. caches: [keys, values] of each layer, both (B, K, S, D); S may
        differ from layer to layer, and the lists given are not changed. start: the position of the first new token, an
        int or (B,). keep (B, S), for sequences of different lengths: True for a sequence's own keys, False for padding.
        FloatingPointError: the logits are not finite.
        """
        d, caches = self.decoder, caches.copy()
        at = torch.as_tensor(start, device=self.device).expand(len(logits))
        ids, going = [[] for _ in logits], set(range(len(logits)))
        for left in range(min(max_new_tokens, self.config.text.positions - int(at.max())), 0, -1):
            if not logits.isfinite().all():
                raise FloatingPointError(f"non-finite logits: {logits.dtype} is too narrow, or weights are broken")
            best = logits.argmax(-1)
            for b, token in enumerate(best.tolist()):               # waits for the device, once a step
                if token in self.stop:
                    going.discard(b)
                elif b in going:
                    ids[b].append(token)
            if not going or left == 1:
                break
            if keep is not None:                                    # the new token's key is everyone's own
                keep = torch.cat((keep, keep.new_ones(len(keep), 1)), 1)
            mask = None if keep is None else vicuna.additive(keep[:, None, None])        # (B, 1, 1, S)
            x, (cos, sin) = d.embed_tokens(best[:, None]), (t[:, None, None] for t in d.rope(at))      # (B, 1, C)
            for i, layer in enumerate(d.layers):
                cache = list(caches[i])                             # tensors are shared, the lists are ours
                x, caches[i] = layer(x, cos, sin, mask, cache), cache
            logits, at = d.lm_head(d.norm(x[:, -1])), at + 1
        return ids

    def generate(self, p, max_new_tokens=16):
        """Prompt -> greedy answer as text."""
        return self.words(self.decode(*self.prefill(self.embed(p), p.positions), len(p), max_new_tokens)[0])

    def words(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


# ---------------------------------------------------------------------------------------------------- files, loading

WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # timm's own may lie beside them


@dataclass(frozen=True)
class Files:
    """The files of a checkpoint, all there; None or () for what its kind does not need."""
    config: Path | None = None
    tokenizer: Path | None = None
    generation: Path | None = None
    weights: tuple = ()
    tower: "Files | None" = None                   # the vision tower's, where config.json names one


def pick(get, kind="model"):
    """Choose the files to load -> (Files, list of the names that are missing). get: file name -> path, None if absent.

    kind: "model", or its "texts" alone; "tower" for a vision tower, or its "tower config". ValueError: a damaged index.
    """
    files, missing = {}, []

    def first(slot, *names):
        files[slot] = next((path for name in names if (path := get(name))), None)
        if not files[slot]:
            missing.append(" or ".join(names))

    if kind in ("model", "texts"):
        first("config", "config.json")
        first("tokenizer", "tokenizer.json", "tokenizer.model", "vocab.json")
        files["generation"] = get("generation_config.json")         # may be absent
    else:
        first("config", "open_clip_config.json", "config.json")
    open_clip = files["config"] and files["config"].name == "open_clip_config.json"
    index = next((path for name in (OPEN_CLIP_WEIGHTS if open_clip else WEIGHTS) if (path := get(name))), None)
    if kind in ("texts", "tower config"):                           # the weights are elsewhere, or not needed
        pass
    elif index is None:
        missing.append(" or ".join(OPEN_CLIP_WEIGHTS if open_clip else WEIGHTS))
    elif index.suffix == ".json":                                   # it names the shards
        names = read_json(index).get("weight_map")                  # a name stays inside the folder
        if not (isinstance(names, dict) and names and all(
                isinstance(n, str) and Path(n).name == n and n != ".." and "\0" not in n for n in names.values())):
            raise ValueError(f"{index} is not an index of shards: its weight_map does not name files beside it")
        shards = sorted(set(names.values()))
        files["weights"] = tuple(map(get, shards))
        missing += [shard for shard, path in zip(shards, files["weights"], strict=True) if not path]
    else:
        files["weights"] = (index,)
    return Files(**files), missing


def find_files(folder, kind="model"):
    """A local folder -> Files. ValueError names what it lacks."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder; `python -m harness.hub NAME` fetches a model and prints where")
    files, missing = pick(lambda name: Path(folder) / name if (Path(folder) / name).is_file() else None, kind)
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}")
    return files


def tower_kind(files):
    """What is still needed from the vision tower that config.json names (original layout) -> "tower": all of it; "tower
    config": the checkpoint holds its weights (1.6, NeXT); None: nothing (transformers' layout)."""
    raw = read_json(files.config)
    if "text_config" in raw or not raw.get("mm_vision_tower"):
        return None
    if not isinstance(tower := raw["mm_vision_tower"], str):
        raise ValueError(f"{files.config}: mm_vision_tower is {tower!r}, not a name")
    names = (name for file in files.weights for name in vicuna.stored(file))
    return "tower config" if any("vision_tower" in name for name in names) else "tower"


def read_json(file, kind=dict):
    """A JSON file -> dict, or list where that is the kind wanted. ValueError: it holds something else."""
    if Path(file).exists() and not Path(file).is_file():
        raise ValueError(f"{file} is not a file, but a folder, a pipe or a device")
    try:
        raw = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file} is not JSON ({e})") from e
    if not isinstance(raw, kind):
        raise ValueError(f"{file} is not a JSON {'list' if kind is list else 'object'}")
    return raw


# Checkpoint name -> ours: the original's layout, transformers' hub layout, what transformers 4.52 to 5 keep and write.
RENAME = [(r"^(model\.)?(vision_tower\.)+(vision_model\.)?", "vision_tower."),
          (r"^(model\.)?multi_modal_projector\.linear_1\.", "mm_projector.0."),
          (r"^(model\.)?multi_modal_projector\.linear_2\.", "mm_projector.2."),
          (r"^(model\.)?(mm_projector\.|image_newline$)", r"\2"),
          (r"^(language_model\.)?(model\.)?lm_head\.", "decoder.lm_head."),
          (r"^(model\.)?(language_model\.)?(model\.)?(embed_tokens|layers|norm)\.", r"decoder.\4.")]
SKIP = r"rotary_emb\.inv_freq$|^(model\.)?vision_tower\..*(post_layernorm\.(weight|bias)|position_ids)$"  # not used


def rename(name, decoder_file):
    for pattern, ours in RENAME:                                    # the first that fits
        new, hits = re.subn(pattern, ours, name)
        if hits:
            return decoder_file.rename(new) if new.startswith("decoder.") else new
    return name


def read_config(files, preprocess="llava", kind=Config):
    """Files -> Config, or another family's kind of it; opens no weights. ValueError: which file, and what is wrong."""
    raw, tower = read_json(files.config), files.tower and read_json(files.tower.config)
    try:
        return replace(kind.from_json(raw, tower), preprocess=preprocess)
    except ValueError as e:
        raise ValueError(f"{files.config}: {e}") from e
    except (KeyError, TypeError, AttributeError, ArithmeticError) as e:
        raise ValueError(f"{files.config} cannot be read as a model's config ({type(e).__name__}: {e})") from e


def load(folder, dtype=torch.float32, device="cpu", vision_tower=None, preprocess="llava", take_layers=None,
         family=None):
    """A local folder (or Files) -> LLaVA with its tokenizer. ValueError: what is missing, damaged, or does not fit.

    vision_tower: a folder, instead of the one that config.json names. The tower of 1.5 is kept in float32 whatever the
    dtype, as in the reference (it was frozen in training, and is loaded by itself); those of 1.6 and NeXT have `dtype`.
    take_layers(model, files) -> names of tensors that are not to be read, see offload.py. family: llava_onevision, ...
    """
    family = family or sys.modules[__name__]
    files = folder if isinstance(folder, Files) else find_files(folder)
    if (kind := tower_kind(files)) and not files.tower:
        try:
            files = replace(files, tower=find_files(vision_tower or read_json(files.config)["mm_vision_tower"], kind))
        except ValueError as e:
            raise ValueError(f"the vision tower of {folder}: {e}; --vision-tower takes a folder") from e
    config = family.read_config(files, preprocess)
    with torch.device("meta"):                                      # no memory until the shapes are known
        model = family.LLaVA(config).to(dtype)
    if config.vision and config.aspect == "pad":
        model.vision_tower.float()
    taken = take_layers(model, files) if take_layers else ()
    model = model.to_empty(device=device).eval().requires_grad_(False)          # load_into fills every parameter
    vocab, file = config.text.vocab, config.decoder_file            # without the rows that pad the vocabulary
    ours = ((n, vicuna.stored(f, n)) for f in files.weights for n in vicuna.stored(f) if n not in taken)
    inside = ((n, t[:vocab] if n.endswith(("embed_tokens.weight", "lm_head.weight")) else t) for n, t in ours)
    beside = ((f"vision_tower.{clip_vit.rename(n)}", t)
              for n, t in clip_vit.split_qkv(vicuna.read(files.tower.weights if files.tower else ()))
              if not re.search(clip_vit.SKIP, n))
    try:
        vicuna.load_into(model, chain(inside, beside), lambda name: rename(name, file), SKIP)
    except ValueError as e:
        raise ValueError(f"{files.config.parent}: {e}") from e
    model.tokenizer = file.load_tokenizer(files.tokenizer.parent)
    if file.BOS and model.tokenizer.token_to_id(file.BOS) is None:
        raise ValueError(f"{files.tokenizer} has no {file.BOS}: it is not this model's tokenizer")
    ends = [read_json(f).get("eos_token_id") for f in (files.config, files.generation) if f]  # an id, or a list
    ends = [i for end in ends for i in (end if isinstance(end, list) else [end])]
    if odd := [i for i in ends if type(i) not in (int, type(None))]:
        raise ValueError(f"{files.config.parent}: the eos_token_id {odd[0]!r} is not a token id")
    model.stop = {*ends, *map(model.tokenizer.token_to_id, file.EOS)} - {None}
    model.special += tuple(t.content for t in model.tokenizer.get_added_tokens_decoder().values()
                           if t.special and t.content)
    return model


def main(doc=__doc__, load=load, model=Path(__file__).parent / "tiny" / "llava-tiny"):
    """The command line, of this file or of another family's. model: the folder that is used if none is given."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = vicuna.fail
    parser.add_argument("--model", metavar="FOLDER", default=model, required=not model)
    parser.add_argument("--vision-tower", metavar="FOLDER", help="its vision tower, where the checkpoint has none")
    parser.add_argument("--image", metavar="FILE")
    parser.add_argument("--question", metavar="TEXT", required=True)
    parser.add_argument("--tokens", metavar="N", type=int, default=16, help="longest answer (16)")
    parser.add_argument("--long", action="store_true", help="leave out the instruction to answer in a word or phrase")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = parser.parse_args()
    try:
        sys.stdout.reconfigure(errors="replace")                    # "?" for a letter that the terminal lacks
        if args.tokens < 1:
            raise ValueError("--tokens takes a number from 1")
        model = load(args.model, getattr(torch, args.dtype), vision_tower=args.vision_tower)
        print(model.generate(model.prompt(args.question, args.image, brief=not args.long), args.tokens))
    except (ValueError, OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as e:
        vicuna.fail(e)


if __name__ == "__main__":
    main()
