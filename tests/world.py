"""
world.py - the tiny random world the tests live in: checkpoints and pictures, each made from a seed; its tokenizers are
in world_tokenizers.py.

Run     a test imports it:  folder = world.write(tmp_path, "llava-1.5", "hf", "sharded")
        python tests/world.py FOLDER [KIND]     to try the commands without a download: writes a checkpoint in HF layout

Every weight is a small whole number times a power of two, so float16, bfloat16 and float32 hold the same values, and
RandomState.randint draws the same numbers everywhere. Norm weights are not 1 and biases not 0. The sizes are chosen so
that the next token is no coin toss and a cut edge moves its probability. Nothing here imports the loaders under test.
"""
import functools
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from world_tokenizers import (  # noqa: F401     tests say world.TEXT
    LLAMA3_SPLIT,
    SPECIAL_LLAMA3,
    TEXT,
    llama2_pieces,
    llama3_ranks,
    sentencepiece_model,
    write_llama2_tokenizer,
    write_llama3_tokenizer,
)

PATCH = 14
VISION = {"width": 32, "hidden": 64, "layers": 3, "heads": 4}


@dataclass(frozen=True)
class Kind:
    seed: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    theta: float
    eps: float
    positions: int
    image: int | None                              # side of a view in px; None: text only
    anyres: bool = False
    layers: int = 4

    @property
    def llama3(self):
        return self.theta != 10000.0

    @property
    def pinpoints(self):
        """The published shape of the list: 1x2, 2x1, 2x2, 3x1 and 1x3 views, (width, height) in px."""
        return [[a * self.image, b * self.image] for a, b in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


# 1.6 has a large norm_eps on purpose: one read from the wrong place, or a default in its stead, shows in every logit.
KINDS = {"vicuna": Kind(3, 48, 96, 4, 4, 10000.0, 1e-5, 4096, None),
         "llava-1.5": Kind(5, 48, 96, 4, 4, 10000.0, 1e-5, 4096, 56),
         "llava-1.6": Kind(7, 48, 96, 4, 4, 10000.0, 1e-2, 4096, 56, anyres=True),
         "llama3-next": Kind(11, 32, 80, 4, 2, 500000.0, 1e-5, 8192, 28, anyres=True)}


def vocab_size(kind):
    """Without the rows that the transformers layouts add."""
    return len(llama3_ranks()) + 256 if KINDS[kind].llama3 else len(llama2_pieces())


def padded_vocab_size(kind):
    """With <image> and <pad>, rounded up to a multiple of 64, as transformers' conversion scripts do."""
    return (vocab_size(kind) + 2 + 63) // 64 * 64


# ---------------------------------------------------------------------------------------------------- weights

def grid(rng, *shape, std):
    """Whole numbers in -15..15 times the power of two that brings their standard deviation nearest to `std`."""
    whole = torch.from_numpy(rng.randint(-15, 16, shape, dtype=np.int64)).float()
    return whole * 2.0 ** round(math.log2(std / math.sqrt(80)))    # (31^2 - 1) / 12 = 80


def gains(rng, size):
    """Norm weights around 1: 0.75 to 1.25 in steps of 1/32."""
    return 1 + torch.from_numpy(rng.randint(-8, 9, size, dtype=np.int64)).float() / 32


@functools.cache
def weights(kind):
    """All tensors of a kind under the original LLaVA's names, the tower's included -> dict name -> float32 tensor."""
    k, rng, out = KINDS[kind], np.random.RandomState(KINDS[kind].seed), {}

    def linear(name, rows, cols, gain=1.0, bias=False):
        """Input of size 1 gives output of size `gain`."""
        out[f"{name}.weight"] = grid(rng, rows, cols, std=gain / math.sqrt(cols))
        if bias:
            out[f"{name}.bias"] = grid(rng, rows, std=0.1)

    def norm(name, size, bias=False):
        out[f"{name}.weight"] = gains(rng, size)
        if bias:
            out[f"{name}.bias"] = grid(rng, size, std=0.1)

    out["model.embed_tokens.weight"] = grid(rng, vocab_size(kind), k.width, std=1.0)
    narrow = k.width // k.heads * k.kv_heads
    for i in range(k.layers):
        at = f"model.layers.{i}"
        norm(f"{at}.input_layernorm", k.width)
        norm(f"{at}.post_attention_layernorm", k.width)
        linear(f"{at}.self_attn.q_proj", k.width, k.width, 1.4)
        linear(f"{at}.self_attn.k_proj", narrow, k.width, 1.4)
        linear(f"{at}.self_attn.v_proj", narrow, k.width, 1.4)
        linear(f"{at}.self_attn.o_proj", k.width, k.width, 1.4)
        linear(f"{at}.mlp.gate_proj", k.hidden, k.width)
        linear(f"{at}.mlp.up_proj", k.hidden, k.width)
        linear(f"{at}.mlp.down_proj", k.width, k.hidden)
    norm("model.norm", k.width)
    linear("lm_head", vocab_size(kind), k.width, 2.0)
    if k.image:
        linear("model.mm_projector.0", k.width, VISION["width"], 2.0, bias=True)
        linear("model.mm_projector.2", k.width, k.width, bias=True)
        if k.anyres:
            out["model.image_newline"] = grid(rng, k.width, std=1.0)
        tower, wide = "model.vision_tower.vision_tower.vision_model", VISION["width"]
        out[f"{tower}.embeddings.class_embedding"] = grid(rng, wide, std=0.5)
        out[f"{tower}.embeddings.patch_embedding.weight"] = grid(rng, wide, 3, PATCH, PATCH, std=1 / PATCH)
        out[f"{tower}.embeddings.position_embedding.weight"] = grid(rng, (k.image // PATCH) ** 2 + 1, wide, std=0.5)
        norm(f"{tower}.pre_layrnorm", wide, bias=True)
        for i in range(VISION["layers"]):
            at = f"{tower}.encoder.layers.{i}"
            norm(f"{at}.layer_norm1", wide, bias=True)
            norm(f"{at}.layer_norm2", wide, bias=True)
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear(f"{at}.self_attn.{name}", wide, wide, 1.4, bias=True)
            linear(f"{at}.mlp.fc1", VISION["hidden"], wide, bias=True)
            linear(f"{at}.mlp.fc2", wide, VISION["hidden"], bias=True)
        norm(f"{tower}.post_layernorm", wide, bias=True)
    return out


# ---------------------------------------------------------------------------------------------------- names of tensors

# From the original's names to the others': (prefix, what replaces it), the first that fits.
HF = [("model.mm_projector.0.", "multi_modal_projector.linear_1."),
      ("model.mm_projector.2.", "multi_modal_projector.linear_2."), ("model.image_newline", "image_newline"),
      ("model.vision_tower.vision_tower.", "vision_tower."), ("lm_head.", "language_model.lm_head."),
      ("model.", "language_model.model.")]
HF5 = [("model.vision_tower.vision_tower.vision_model.", "vision_tower."), *HF]  # what transformers 5 writes
MEMORY = [(theirs, f"model.{ours}") for theirs, ours in HF[:4]] + [
    ("lm_head.", "lm_head."), ("model.", "model.language_model.")]  # what 4.52 to 4.57 keep in memory
MEMORY5 = [("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."), *MEMORY]
LAYOUTS = {"original": [], "hf": HF, "hf5": HF5, "memory": MEMORY, "memory5": MEMORY5}

OPEN_CLIP = [("embeddings.class_embedding", "class_embedding"), ("embeddings.patch_embedding.", "conv1."),
             ("embeddings.position_embedding.weight", "positional_embedding"), ("pre_layrnorm.", "ln_pre."),
             ("post_layernorm.", "ln_post.")]
OPEN_CLIP_BLOCK = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
                   "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def renamed(name, table):
    for theirs, ours in table:
        if name.startswith(theirs):
            return ours + name[len(theirs):]
    return name


def in_layout(kind, layout):
    """A checkpoint's tensors as a layout spells them. Every transformers layout pads the vocabulary to a multiple of 64
    with large random rows, which would win every softmax if they took part in one."""
    k, rng, out = KINDS[kind], np.random.RandomState(97), {}
    for name, tensor in weights(kind).items():
        if "vision_tower" in name and layout == "original" and not k.anyres:
            continue                                                # 1.5 leaves its frozen tower to another folder
        if layout != "original" and name in ("model.embed_tokens.weight", "lm_head.weight"):
            extra = padded_vocab_size(kind) - len(tensor)
            tensor = torch.cat((tensor, grid(rng, extra, k.width, std=16.0)))
        out[renamed(name, LAYOUTS[layout])] = tensor
    return out


# ---------------------------------------------------------------------------------------------------- checkpoints

def save(folder, tensors, pack, stem="model"):
    """Write tensors as "one" safetensors file, "sharded" in three with an index, "bin" or "bin-sharded"."""
    bin = pack.startswith("bin")
    stem, end = (stem.replace("model", "pytorch_model"), "bin") if bin else (stem, "safetensors")
    names = list(tensors)
    if pack.endswith("sharded"):
        step = -(-len(names) // 3)
        parts = {f"{stem}-{i + 1:05}-of-00003.{end}": names[i * step:(i + 1) * step] for i in range(3)}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
                 "weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    else:
        parts = {f"{stem}.{end}": names}
    for file, part in parts.items():
        chosen = {name: tensors[name].contiguous() for name in part}
        if bin:
            torch.save(chosen, folder / file)
        else:
            save_file(chosen, str(folder / file), {"format": "pt"})


def write(folder, kind, layout="original", pack="one", dtype=torch.float16, tower=None):
    """Write a kind in a layout -> its folder. An original layout's vision tower lies beside it, in folder / "clip".

    tower: how mm_vision_tower names it (that folder's path).
    """
    folder, k = Path(folder), KINDS[kind]
    target = folder / "checkpoint" if layout == "original" and k.image else folder
    target.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(dtype) for name, tensor in in_layout(kind, layout).items()}
    if pack.startswith("bin") and layout == "original":             # the old .bin files hold a buffer of each layer
        size = k.width // k.heads
        for i in range(k.layers):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.arange(size // 2).float()
    save(target, tensors, pack)
    if layout == "original" and k.image:
        write_clip(folder / "clip", kind, pack=None if k.anyres else "one")
    raw = original_config(kind, tower or str(folder / "clip")) if layout == "original" else hf_config(kind, layout)
    raw["torch_dtype" if layout in ("original", "hf") else "dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(raw, indent=2))
    (target / "generation_config.json").write_text(json.dumps(
        {"_from_model_config": True, **{key: raw[key] for key in ("bos_token_id", "eos_token_id") if key in raw}}))
    marks = ("<image>", "<pad>") if layout != "original" else ()
    if k.llama3:
        write_llama3_tokenizer(target, "json", added=marks)
    else:
        write_llama2_tokenizer(target, "json" if marks else "model", added=marks)
    return target


def original_config(kind, tower):
    """config.json as the original LLaVA writes it: the decoder's keys and the picture's on one level."""
    k = KINDS[kind]
    bos = vocab_size(kind) - 256 if k.llama3 else 1
    raw = {"architectures": ["LlavaLlamaForCausalLM" if k.image else "LlamaForCausalLM"], "attention_bias": False,
           "attention_dropout": 0.0, "bos_token_id": bos, "eos_token_id": bos + (9 if k.llama3 else 1),
           "hidden_act": "silu", "hidden_size": k.width, "initializer_range": 0.02, "intermediate_size": k.hidden,
           "max_position_embeddings": k.positions, "model_type": "llama", "num_attention_heads": k.heads,
           "num_hidden_layers": k.layers, "num_key_value_heads": k.kv_heads, "pretraining_tp": 1,
           "rms_norm_eps": k.eps, "rope_scaling": None, "rope_theta": k.theta, "tie_word_embeddings": False,
           "use_cache": True, "vocab_size": vocab_size(kind)}
    if not k.image:
        return raw
    raw |= {"model_type": "llava_llama" if k.llama3 else "llava", "freeze_mm_mlp_adapter": False,
            "image_aspect_ratio": "anyres" if k.anyres else "pad", "mm_hidden_size": VISION["width"],
            "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
            "mm_vision_tower": tower, "tokenizer_padding_side": "right", "tune_mm_mlp_adapter": False,
            "unfreeze_mm_vision_tower": k.anyres, "use_mm_proj": True}
    if k.anyres:
        raw |= {"image_crop_resolution": 224, "image_grid_pinpoints": k.pinpoints, "image_split_resolution": 224,
                "mm_patch_merge_type": "spatial_unpad", "mm_vision_tower_lr": 2e-06}
    return raw


def hf_config(kind, layout):
    """config.json as transformers writes it: 4.36 to 4.45 leave out what is default, 4.57 and 5 spell all of it out."""
    k = KINDS[kind]
    text = {"max_position_embeddings": k.positions, "model_type": "llama", "rms_norm_eps": k.eps,
            "vocab_size": padded_vocab_size(kind), "hidden_size": k.width, "intermediate_size": k.hidden,
            "num_hidden_layers": k.layers, "num_attention_heads": k.heads}
    vision = clip_config(k)
    raw = {"architectures": [f"Llava{'Next' if k.anyres else ''}ForConditionalGeneration"],
           "image_token_index": vocab_size(kind), "model_type": "llava_next" if k.anyres else "llava",
           "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    if k.anyres:
        raw |= {"image_grid_pinpoints": k.pinpoints}
    if layout == "hf":
        if k.llama3:
            text |= {"num_key_value_heads": k.kv_heads, "rope_theta": k.theta}
        raw |= {"ignore_index": -100, "pad_token_id": vocab_size(kind) + 1, "tie_word_embeddings": False}
        if k.anyres:
            raw |= {"use_image_newline_parameter": True}
    else:
        rope = {"rope_parameters": {"rope_theta": k.theta, "rope_type": "default"}} if layout.endswith("5") else {
            "rope_theta": k.theta, "rope_scaling": None}
        text |= {"attention_bias": False, "attention_dropout": 0.0, "head_dim": k.width // k.heads,
                 "hidden_act": "silu", "initializer_range": 0.02, "mlp_bias": False,
                 "num_key_value_heads": k.kv_heads, "pretraining_tp": 1, "use_cache": True, **rope}
        vision |= {"attention_dropout": 0.0, "hidden_act": "quick_gelu", "initializer_factor": 1.0,
                   "initializer_range": 0.02, "layer_norm_eps": 1e-05, "num_channels": 3}
        raw |= {"image_seq_length": 576, "multimodal_projector_bias": True, "tie_word_embeddings": False}
    return raw | {"text_config": text, "vision_config": vision}


def clip_config(k):
    return {"hidden_size": VISION["width"], "image_size": k.image, "intermediate_size": VISION["hidden"],
            "model_type": "clip_vision_model", "num_attention_heads": VISION["heads"],
            "num_hidden_layers": VISION["layers"], "patch_size": PATCH, "projection_dim": 16, "vocab_size": 32000}


def write_clip(folder, kind, spelling="hf", pack="one", dtype=torch.float16):
    """The vision tower of a kind on its own, as a whole CLIP in transformers' or open_clip's spelling -> its folder.

    pack None writes the config alone: what the original 1.6 needs beside a checkpoint that holds the tower's weights.
    """
    folder, k, rng = Path(folder), KINDS[kind], np.random.RandomState(13)
    folder.mkdir(parents=True, exist_ok=True)
    prefix, out, in_proj = "model.vision_tower.vision_tower.vision_model.", {}, {}
    for name, tensor in weights(kind).items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        if spelling == "hf":
            out[f"vision_model.{name}"] = tensor
        elif m := re.fullmatch(r"encoder\.layers\.(\d)\.self_attn\.([qkv])_proj\.(\w+)", name):
            in_proj.setdefault((m[1], m[3]), {})[m[2]] = tensor
        elif m := re.fullmatch(r"encoder\.layers\.(\d)\.(.+)\.(\w+)", name):
            out[f"visual.transformer.resblocks.{m[1]}.{OPEN_CLIP_BLOCK[m[2]]}.{m[3]}"] = tensor
        else:
            out[f"visual.{renamed(name, OPEN_CLIP)}"] = tensor
    for (i, what), parts in in_proj.items():
        out[f"visual.transformer.resblocks.{i}.attn.in_proj_{what}"] = torch.cat([parts[x] for x in "qkv"])
    for name in (("text_model.encoder.layers.0.self_attn.q_proj.weight", "text_model.final_layer_norm.bias",
                  "text_projection.weight", "visual_projection.weight", "logit_scale") if spelling == "hf" else
                 ("transformer.resblocks.0.attn.in_proj_weight", "positional_embedding", "token_embedding.weight",
                  "ln_final.bias", "text_projection", "visual.proj", "logit_scale")):
        out[name] = grid(rng, 24, 8, std=1.0)                       # the rest of a CLIP, which LLaVA does not use
    if spelling == "hf":
        raw = {"architectures": ["CLIPModel"], "logit_scale_init_value": 2.6592, "model_type": "clip",
               "projection_dim": 16, "text_config": {"hidden_size": 8, "model_type": "clip_text_model",
                                                     "num_attention_heads": 2, "num_hidden_layers": 1},
               "vision_config": clip_config(k)}
        (folder / "config.json").write_text(json.dumps(raw))
    else:
        raw = {"model_cfg": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": {
            "image_size": k.image, "layers": VISION["layers"], "width": VISION["width"], "patch_size": PATCH,
            "head_width": VISION["width"] // VISION["heads"], "mlp_ratio": VISION["hidden"] / VISION["width"]},
            "text_cfg": {"context_length": 24, "vocab_size": 24, "width": 8, "heads": 2, "layers": 1}},
            "preprocess_cfg": {"interpolation": "bicubic"}}
        (folder / "open_clip_config.json").write_text(json.dumps(raw))
    if pack:
        save(folder, {name: tensor.to(dtype) for name, tensor in out.items()}, pack,
             "model" if spelling == "hf" else "open_clip_model")
    return folder


# ---------------------------------------------------------------------------------------------------- pictures

PICTURES = [(90, 60), (60, 90), (64, 64), (100, 37)]                # (width, height); none ties between two canvases


def picture(width, height):
    """Rectangles and ellipses on a plain ground, the same for the same size."""
    rng = np.random.RandomState(1000 * width + height)
    def colour():
        return tuple(int(c) for c in rng.randint(0, 256, 3))
    image = Image.new("RGB", (width, height), colour())
    draw = ImageDraw.Draw(image)
    for shape in (draw.rectangle, draw.ellipse) * 3:
        (x0, x1), (y0, y1) = sorted(rng.randint(0, width, 2).tolist()), sorted(rng.randint(0, height, 2).tolist())
        shape((x0, y0, x1, y1), fill=colour())
    return image


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[-1] not in KINDS and len(sys.argv) > 2:
        sys.exit(f"usage: python tests/world.py FOLDER [{' | '.join(KINDS)}]")
    print(write(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "llava-1.6", layout="hf"))
