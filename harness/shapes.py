"""
harness/shapes.py - what bench.py measures: models of the published widths with random weights, prompts for them, and
facts for real ones.

Use     decoder = build("llava-1.5-7b", 4, torch.bfloat16, "cpu")
        write_checkpoint(folder, "llava-1.5-7b", 32)       a whole LLaVA, as transformers lays it out
Needs   the model files; knockout.py, for the edges of figures 3-5
"""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

import clip_vit
import fork
import knockout
import llama3
import qwen2
import vicuna
from harness.hub import BUNDLED

WIDE = {"width": 5120, "hidden": 13824, "heads": 40, "kv_heads": 40, "layers": 40}
SHAPES = {"llava-1.5-7b": (vicuna, {}, 1), "llava-1.5-13b": (vicuna, WIDE, 1),  # decoder, its sizes, views of a photo
          "llava-v1.6-vicuna-7b": (vicuna, {}, 5), "llava-v1.6-vicuna-13b": (vicuna, WIDE, 5),
          "llama3-llava-next-8b": (llama3, {}, 5),
          "llava-onevision-0.5b": (qwen2, {"vocab": 151646, "width": 896, "hidden": 4864, "layers": 24, "heads": 14,
                                           "kv_heads": 2, "tied": True}, 3)}


def build(name, layers, dtype, device):
    """A decoder of a published model's widths, random weights. layers: None is all that the published model has."""
    module, sizes, _ = SHAPES[name]
    c = module.Config(**sizes)
    with torch.device("meta"):
        decoder = module.Decoder(replace(c, layers=layers or c.layers)).to(dtype)
    return fill(decoder.to_empty(device=device)).eval().requires_grad_(False)


def fill(model, seed=0):
    """Random weights of a size that keeps activations near 1, in place."""
    draw = torch.Generator(device="cpu").manual_seed(seed)
    for parameter in model.parameters():
        scale = 1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        block = torch.randn(2 ** 20, generator=draw).to(parameter.dtype) * scale    # repeated: drawing 7B takes minutes
        parameter.data.copy_(block.repeat(-(-parameter.numel() // len(block)))[:parameter.numel()].view_as(parameter))
    return model


class Question:
    """Random embeddings in the shape of a published model's prompt: 37 tokens of the system, the image, and from the
    question on `after` more, 12 of them its own. 29 is the median of the paper's questions, 24 the fewest and 36 the
    most (72 of them, with the published tokenizers). T: tokens."""

    def __init__(self, name, decoder, after=29):
        start, images = 37, {1: 576, 3: 1728, 5: 2200}[SHAPES[name][2]]     # by the number of views
        end = start + images
        self.T = end + after
        image, question, last = list(range(start, end)), list(range(end, end + 12)), [self.T - 1]
        groups = {"image": image, "question": question, "last": last, "related_patches": image[100:160],
                  "other_patches": image[:100] + image[160:]}
        self.cuts = [[groups[g] for g in edge.split("->")] for edge in knockout.EDGES]
        self.x = torch.randn(1, self.T, decoder.config.width, generator=torch.Generator().manual_seed(1)).to(
            decoder.lm_head.weight)
        self.positions = torch.arange(self.T, device=self.x.device)

    def clean(self, decoder):
        return fork.clean_pass(decoder, self.x, self.positions)


# The beginnings of sentences that a language model ends with a fact: subject, and the rest.
COUNTRY, SPEAKS = " is a country whose capital is the city of", " is a country where most people speak"
TOWER, BORN = " is a landmark in the city of", " was a scientist who was born in the country of"
FACTS = [("France", COUNTRY), ("Japan", COUNTRY), ("Egypt", COUNTRY), ("Italy", SPEAKS), ("Brazil", SPEAKS),
         ("Germany", SPEAKS), ("The Eiffel Tower", TOWER), ("The Colosseum", TOWER), ("The Statue of Liberty", TOWER),
         ("Albert Einstein", BORN), ("Marie Curie", BORN), ("Isaac Newton", BORN)]


def facts(decoder, tokenizer):
    """-> for each of FACTS ("facts", embeddings, positions, the cuts subject->last and subject->the words between)."""
    asked, device = [], decoder.lm_head.weight.device
    for subject, rest in FACTS:
        encoded = tokenizer.encode(subject + rest)
        T, offsets = len(encoded.ids), encoded.offsets
        source = [i for i in range(T) if offsets[i][0] < len(subject) and offsets[i][1]]
        positions = torch.arange(T, device=device)
        asked.append(("facts", decoder.embed_tokens(torch.tensor([encoded.ids], device=device)), positions,
                      [(source, [T - 1]), (source, list(range(source[-1] + 1, T - 1)))]))
    return asked


def write_checkpoint(folder, name, layers=None, dtype=torch.bfloat16):
    """A LLaVA of a published model's widths, random weights, in transformers' layout: a file for each layer.

    The tokenizer is the bundled model's, whose vocabulary is a small part of the published one.
    """
    from safetensors.torch import save_file
    module, sizes, views = SHAPES[name]
    c, tower, folder, places = module.Config(**sizes), clip_vit.Config(), Path(folder), {}
    c = replace(c, layers=layers or c.layers)

    def save(file, tensors):
        save_file({n: t.to(dtype).contiguous() for n, t in tensors.items()}, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
    with torch.device("meta"):
        block = module.Block(c)
    for i in range(c.layers):
        drawn = fill(block.to_empty(device="cpu").to(dtype), seed=i)
        save(f"layer-{i:02}.safetensors", {f"language_model.model.layers.{i}.{n}": p.data
                                           for n, p in drawn.named_parameters()})
    ends = fill(torch.nn.ModuleDict({"model_embed_tokens": torch.nn.Embedding(c.vocab + 64, c.width),
                                     "lm_head": torch.nn.Linear(c.width, c.vocab + 64, bias=False),
                                     "1": torch.nn.Linear(tower.width, c.width),
                                     "2": torch.nn.Linear(c.width, c.width)}))
    tensors = {f"vision_tower.{n}": p.data for n, p in fill(clip_vit.Tower(tower)).named_parameters()}
    tensors |= {"language_model.model.embed_tokens.weight": ends["model_embed_tokens"].weight.data,
                "language_model.lm_head.weight": ends["lm_head"].weight.data,
                "language_model.model.norm.weight": torch.ones(c.width)}
    tensors |= {f"multi_modal_projector.linear_{i}.{n}": getattr(ends[str(i)], n).data
                for i in (1, 2) for n in ("weight", "bias")}
    if views > 1:
        tensors["image_newline"] = torch.zeros(c.width)
    save("rest.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}),
                                                         encoding="utf-8")
    text = {"model_type": "llama", "hidden_size": c.width, "intermediate_size": c.hidden, "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope_base, "max_position_embeddings": c.positions, "vocab_size": c.vocab + 64}
    vision = {"model_type": "clip_vision_model", "hidden_size": tower.width, "intermediate_size": tower.hidden,
              "num_hidden_layers": tower.layers, "num_attention_heads": tower.heads, "image_size": tower.image,
              "patch_size": tower.patch}
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llava_next" if views > 1 else "llava", "image_token_index": c.vocab, "vision_feature_layer": -2,
        "text_config": text, "vision_config": vision, "tie_word_embeddings": False}), encoding="utf-8")
    # Random weights would go on to the longest answer: let every second token be an end, for answers of one to three.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, c.vocab, 2))}),
                                                  encoding="utf-8")
    shutil.copy(BUNDLED["llava-tiny"] / "tokenizer.json", folder)
