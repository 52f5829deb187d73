"""
world_onevision.py - tiny random LLaVA-OneVision checkpoints for the tests' world, in the original's and transformers'
layout. As in world.py, weights are whole numbers times a power of two, and nothing here imports the loaders under test.

Kinds   onevision         a head of its own; maps of more than 9 views' patches are scaled down
        onevision-tied    the head is the embeddings' matrix; maps of more than 1 view's patches are scaled down
"""
import json
from pathlib import Path

import numpy as np
import torch
import world
from world_tokenizers import llama3_ranks, write_llama3_tokenizer

KINDS = {"onevision": 17, "onevision-tied": 19}                     # their seeds
IMAGE, WIDTH, HIDDEN, HEADS, KV, LAYERS = 62, 32, 80, 4, 2, 4       # 62 = 4 * 14 + 6: six px are in no patch
TOWER = {"hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 3,
         "image_size": IMAGE, "patch_size": 14, "model_type": "siglip_vision_model"}
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def words():
    return len(llama3_ranks()) + len(CHAT)


def weights(kind):
    """All tensors under the original's names; 40 rows of the embeddings and the head are no words, and large."""
    rng, out = np.random.RandomState(KINDS[kind]), {}

    def linear(name, rows, cols, gain=1.0, bias=True):
        out[f"{name}.weight"] = world.grid(rng, rows, cols, std=gain / cols ** 0.5)
        if bias:
            out[f"{name}.bias"] = world.grid(rng, rows, std=0.1)

    def norm(name, size, bias=False):
        out[f"{name}.weight"] = world.gains(rng, size)
        if bias:
            out[f"{name}.bias"] = world.grid(rng, size, std=0.1)

    def rows(std):
        return torch.cat((world.grid(rng, words(), WIDTH, std=std), world.grid(rng, 40, WIDTH, std=16.0)))
    out["model.embed_tokens.weight"] = rows(1.0 if kind == "onevision" else 2 / WIDTH ** 0.5)
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        norm(f"{at}.input_layernorm", WIDTH)
        norm(f"{at}.post_attention_layernorm", WIDTH)
        for part, size in (("q", WIDTH), ("k", WIDTH // HEADS * KV), ("v", WIDTH // HEADS * KV)):
            linear(f"{at}.self_attn.{part}_proj", size, WIDTH, 1.4)
        linear(f"{at}.self_attn.o_proj", WIDTH, WIDTH, 1.4, bias=False)
        linear(f"{at}.mlp.gate_proj", HIDDEN, WIDTH, bias=False)
        linear(f"{at}.mlp.up_proj", HIDDEN, WIDTH, bias=False)
        linear(f"{at}.mlp.down_proj", WIDTH, HIDDEN, bias=False)
    norm("model.norm", WIDTH)
    if kind == "onevision":
        out["lm_head.weight"] = rows(2 / WIDTH ** 0.5)
    wide, tower = TOWER["hidden_size"], "model.vision_tower.vision_tower.vision_model"
    linear("model.mm_projector.0", WIDTH, wide, 2.0)
    linear("model.mm_projector.2", WIDTH, WIDTH)
    out["model.image_newline"] = world.grid(rng, WIDTH, std=1.0)
    out[f"{tower}.embeddings.patch_embedding.weight"] = world.grid(rng, wide, 3, 14, 14, std=1 / 14)
    out[f"{tower}.embeddings.patch_embedding.bias"] = world.grid(rng, wide, std=0.1)
    out[f"{tower}.embeddings.position_embedding.weight"] = world.grid(rng, (IMAGE // 14) ** 2, wide, std=0.5)
    for i in range(TOWER["num_hidden_layers"]):
        at = f"{tower}.encoder.layers.{i}"
        norm(f"{at}.layer_norm1", wide, bias=True)
        norm(f"{at}.layer_norm2", wide, bias=True)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{at}.self_attn.{name}", wide, wide, 1.4)
        linear(f"{at}.mlp.fc1", TOWER["intermediate_size"], wide)
        linear(f"{at}.mlp.fc2", wide, TOWER["intermediate_size"])
    norm(f"{tower}.post_layernorm", wide, bias=True)                # in the files, not used
    return out


def write(folder, kind, layout="original", pack="one"):
    """Write a kind in a layout, "original" or "hf" -> its folder. An original's tower config: folder / "siglip"."""
    folder, most = Path(folder), 9 if kind == "onevision" else 1
    target, hf = (folder, True) if layout == "hf" else (folder / "checkpoint", False)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {world.renamed(name, world.LAYOUTS[layout]): tensor.half() for name, tensor in weights(kind).items()}
    world.save(target, tensors, pack)
    text = {"model_type": "qwen2", "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS, "num_key_value_heads": KV, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 4096, "vocab_size": words() + 40, "sliding_window": 4096,
            "use_sliding_window": False, "tie_word_embeddings": kind != "onevision"}
    if hf:
        raw = {"model_type": "llava_onevision", "architectures": ["LlavaOnevisionForConditionalGeneration"],
               "image_token_index": words(), "vision_aspect_ratio": f"anyres_max_{most}", "vision_feature_layer": -1,
               "vision_feature_select_strategy": "full", "projector_hidden_act": "gelu", "tie_word_embeddings": False,
               "image_grid_pinpoints": [[i * IMAGE, j * IMAGE] for i in range(1, 7) for j in range(1, 7)],
               "text_config": text, "vision_config": TOWER}
    else:
        siglip = folder / "siglip"
        siglip.mkdir(exist_ok=True)
        (siglip / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {
            **TOWER, "num_hidden_layers": TOWER["num_hidden_layers"] + 1}}))    # the checkpoint lacks the last block
        raw = text | {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava", "mm_patch_merge_type":
                      "spatial_unpad", "image_aspect_ratio": f"anyres_max_{most}", "mm_vision_tower": str(siglip),
                      "image_grid_pinpoints": "(1x1),...,(6x6)", "mm_projector_type": "mlp2x_gelu",
                      "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2}
    (target / "config.json").write_text(json.dumps(raw, indent=2))
    end = words() - 1                                               # <|im_end|>
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [end] if hf else [end, end - 2]}))
    write_tokenizer(target, ("<image>",) if hf else ())
    return target


def write_tokenizer(folder, added):
    """tokenizer.json as Qwen2 has it: byte-level pieces without BOS, the chat tokens behind them."""
    write_llama3_tokenizer(folder, "json", bos=False)
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    first, one = len(llama3_ranks()), raw["added_tokens"][0]
    raw["added_tokens"] = [one | {"id": first + i, "content": text} for i, text in enumerate((*CHAT, *added))]
    raw["normalizer"], raw["model"]["ignore_merges"] = {"type": "NFC"}, False
    (folder / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
