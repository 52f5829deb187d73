"""
clip_vit.py - the CLIP vision transformer in LLaVA-1.5, 1.6 and NeXT (ViT-L/14 at 336 px), in one file.

Needs   torch to run, safetensors to load, numpy and pillow to read a photo.
        Nothing else of this repo: copy it and it works.
Run     python clip_vit.py --weights DIR --image photo.jpg
Matches transformers modeling_clip.py and open_clip's VisionTransformer  (tests/test_clip_vit.py)
Paper   CLIP, https://arxiv.org/abs/2103.00020

Shapes  N images  P patches  T = 1 + P tokens  C width  H heads  D head size  I image side in px

Left out on purpose: the text tower, the pooled embedding and its projection, training.
"""
import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

# RGB, of pixels scaled to [0, 1]: the constants that OpenAI published with CLIP.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Config:
    width: int = 1024
    layers: int = 24
    heads: int = 16
    hidden: int = 4096
    image: int = 336                               # I, px
    patch: int = 14                                # px
    norm_eps: float = 1e-5

    @property
    def side(self):
        """Patches along one side: 24 for 336 / 14."""
        return self.image // self.patch

    @classmethod
    def from_json(cls, raw):
        """A config.json of a CLIP folder, its vision_config, or open_clip_config.json, as a dict, -> Config.

        transformers leaves out keys that have CLIPVisionConfig's default value; they are filled in here.
        ValueError names a setting that is not implemented.
        """
        if "model_cfg" in raw:
            return cls.from_open_clip(raw["model_cfg"])
        raw = raw.get("vision_config") or raw                       # a whole CLIP, or its tower alone
        config = cls(width=raw.get("hidden_size", 768), layers=raw.get("num_hidden_layers", 12),
                     heads=raw.get("num_attention_heads", 12), hidden=raw.get("intermediate_size", 3072),
                     image=raw.get("image_size", 224), patch=raw.get("patch_size", 32),
                     norm_eps=raw.get("layer_norm_eps", 1e-5))
        # Each of these has one value that the code below implements.
        plain = {"hidden_act": "quick_gelu", "num_channels": 3, "model_type": "clip_vision_model"}
        odd = {key: raw[key] for key, value in plain.items() if raw.get(key, value) != value}
        if odd:
            raise ValueError(f"vision config sets {odd}: that is not OpenAI's CLIP and is not implemented here")
        return check_sizes(config)

    @classmethod
    def from_open_clip(cls, raw):
        """`model_cfg` of open_clip_config.json -> Config. LLaVA's towers have quick GELU; plain GELU is refused."""
        v = raw["vision_cfg"]                                       # heads are given by their size, 64 by default
        plain = {"layers", "width", "patch_size", "image_size", "head_width", "mlp_ratio"}
        odd = {key: v[key] for key in v.keys() - plain}
        if raw.get("quick_gelu") is not True:                       # without the key, open_clip builds plain GELU
            odd["quick_gelu"] = raw.get("quick_gelu")
        if odd:
            raise ValueError(f"open_clip config sets {odd}: that is not OpenAI's CLIP and is not implemented here")
        return check_sizes(cls(
            width=v["width"], layers=v["layers"], heads=v["width"] // v.get("head_width", 64),
            hidden=int(v["width"] * v.get("mlp_ratio", 4.0)), image=v["image_size"], patch=v["patch_size"]))


# Above these, a size is not a model's but a damaged file's, and building it would take hours.
LARGEST = {"width": 10 ** 5, "layers": 500, "heads": 1000, "hidden": 10 ** 6, "image": 10 ** 4, "patch": 10 ** 4}


def check_sizes(c):
    """ValueError names a size in a Config that no model can have."""
    bad = {key: value for key, value in vars(c).items() if not (
        type(value) in ((int,) if key in LARGEST else (int, float)) and 0 < value <= LARGEST.get(key, 10 ** 9))}
    if bad:
        raise ValueError(f"impossible sizes in the config: {str(bad)[:300]}")
    if c.width % c.heads:
        raise ValueError(f"impossible sizes in the config: width {c.width} for {c.heads} heads")
    return c


def to_pixels(image):
    """A PIL RGB image (any size) -> float32 (3, height, width), scaled to [0, 1] and normalised per channel."""
    import numpy as np
    x = np.asarray(image.convert("RGB"), dtype=np.float32) / 255    # (h, w, 3)
    # In float32 throughout, as the reference's image processor: float64 would round differently in the last bit.
    x = (x - np.array(MEAN, dtype=np.float32)) / np.array(STD, dtype=np.float32)
    return torch.from_numpy(x).permute(2, 0, 1).contiguous()


class Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(c.width))
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch, c.patch, bias=False)  # one linear map for each patch
        self.position_embedding = nn.Embedding(c.side ** 2 + 1, c.width)

    def forward(self, pixels):
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (N, P, C), patches row by row
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), 1)  # (N, T, C)
        return x + self.position_embedding.weight


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.q_proj, self.k_proj = nn.Linear(c.width, c.width), nn.Linear(c.width, c.width)
        self.v_proj, self.out_proj = nn.Linear(c.width, c.width), nn.Linear(c.width, c.width)

    def forward(self, x):
        N, T, C = x.shape
        q, k, v = (p(x).view(N, T, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        # No mask: every token attends to every other. As in the reference, q is scaled before the product and, unlike
        # in the decoders, the softmax is in the model's dtype: in 16 bits another order would round otherwise.
        q = q * q.shape[-1] ** -0.5
        probs = (q @ k.transpose(-2, -1)).softmax(-1)               # (N, H, T, T)
        return self.out_proj((probs @ v).transpose(1, 2).reshape(N, T, C))  # heads side by side, then mixed


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.width, c.hidden), nn.Linear(c.hidden, c.width)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))               # quick GELU: x Phi(x), approximately


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(c.width, c.norm_eps), nn.LayerNorm(c.width, c.norm_eps)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):                          # a level of its own only because the checkpoints' names have it
    def __init__(self, c):
        super().__init__()
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))


class Tower(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embeddings = Embeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.width, c.norm_eps)       # misspelt in the checkpoints, so here
        self.encoder = Encoder(c)

    def forward(self, pixels, layer=-2):
        """pixels (N, 3, I, I) -> hidden state `layer` (N, T, C), the class token first.

        Numbered as transformers' hidden_states: 0 is the input of the first block, -1 the output of the last one, and
        -2, which LLaVA uses, the output of the block before it.
        """
        x = self.pre_layrnorm(self.embeddings(pixels.to(self.pre_layrnorm.weight.dtype)))
        for block in self.encoder.layers[:layer % (len(self.encoder.layers) + 1)]:
            x = block(x)                                            # blocks above `layer` need not run
        return x

    def features(self, pixels, layer=-2):
        """pixels (N, 3, I, I) -> features of the patches (N, P, C), row by row: LLaVA drops the class token."""
        return self(pixels, layer)[:, 1:]


# ---------------------------------------------------------------------------------------------------- loading

# Tensors of a CLIP that LLaVA does not use: text tower, pooled output, an index buffer; in both spellings.
SKIP = (r"^(vision_model\.)?post_layernorm\.|position_ids$|visual_projection|^text_|^logit_scale$|"
        r"^visual\.ln_post\.|^visual\.proj$|^(transformer|token_embedding|ln_final)\.|^positional_embedding$")

OPEN_CLIP = {"visual.class_embedding": "embeddings.class_embedding", "visual.conv1.": "embeddings.patch_embedding.",
             "visual.positional_embedding": "embeddings.position_embedding.weight", "visual.ln_pre.": "pre_layrnorm.",
             "visual.transformer.resblocks.": "encoder.layers.", ".ln_1.": ".layer_norm1.", ".ln_2.": ".layer_norm2.",
             ".attn.": ".self_attn.", ".mlp.c_fc.": ".mlp.fc1.", ".mlp.c_proj.": ".mlp.fc2."}


def rename(name):
    """A tensor's name in a CLIP folder of transformers' or open_clip's -> its name here."""
    if name.startswith("visual."):                                  # open_clip
        for theirs, ours in OPEN_CLIP.items():
            name = name.replace(theirs, ours)
    return name.removeprefix("vision_model.")


def split_qkv(pairs):
    """open_clip stores q, k and v as one tensor, rows in that order; yield three tensors instead."""
    for name, tensor in pairs:
        if ".attn.in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace("in_proj_", f"{letter}_proj."), part
        else:
            yield name, tensor


def stored(file, name=None):
    """A .safetensors or .bin file -> the names of its tensors; with `name`, that tensor. ValueError: it is damaged.

    `.bin` is unpickled with weights_only=True, which runs no code from the file.
    """
    from safetensors import safe_open
    try:
        if str(file).endswith(".safetensors"):
            with safe_open(file, "pt") as f:
                return list(f.keys()) if name is None else f.get_tensor(name)
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not all(isinstance(key, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
                   for key, value in tensors.items()):
            raise TypeError("it holds something else than named tensors")
        return list(tensors) if name is None else tensors[name]
    except OSError:
        raise                                                       # its message names the file already
    except Exception as e:                                          # each format raises errors of its own kind
        raise ValueError(f"{file} is damaged or not a checkpoint file ({e}); fetch it again") from e


def read(files):
    """Yield (name, tensor) of all files, in order. Only one tensor is in memory at a time.

    A mapped file keeps every page that was read in memory until it is closed, so it is opened anew for each tensor.
    """
    for file in files:
        for name in stored(file):
            yield name, stored(file, name)


def load_into(model, pairs, rename=lambda name: name, skip=r"rotary_emb\.inv_freq$"):
    """Copy (name, tensor) pairs into model: every parameter is filled once, every tensor is used or matches `skip`.

    `rename` turns a checkpoint's name into a parameter's. ValueError names what is missing, extra or misshapen.
    """
    want, extra = dict(model.named_parameters()), []
    for name, tensor in pairs:
        if re.search(skip, name):
            continue
        slot = want.pop(rename(name), None)                         # popped: a second tensor of that name is extra
        if slot is None:
            extra.append(name)
        elif tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{name} is {tensor.dtype}: quantized weights are not implemented here")
        elif slot.shape != tensor.shape:
            raise ValueError(f"{name}: the checkpoint has {tuple(tensor.shape)}, the config wants {tuple(slot.shape)}")
        else:
            slot.data.copy_(tensor)
            if not slot.data.sum(dtype=torch.float32).isfinite() and not slot.data.isfinite().all():
                raise ValueError(f"{name}: " + ("it holds NaN or infinity, so the file is broken" if not (
                    tensor.isfinite().all()) else f"{slot.dtype} is too narrow for it, try a wider --dtype"))
    if want or extra:
        raise ValueError(f"checkpoint does not fit: {len(want)} parameters missing {sorted(want)[:3]}, "
                         f"{len(extra)} tensors extra {extra[:3]}")


def load(folder, dtype=torch.float32, device="cpu"):
    """A folder in open_clip's layout (open_clip_config.json) or transformers' (config.json) -> Tower in eval mode."""
    # timm's repositories hold open_clip's files and their own side by side; open_clip's are the ones to read.
    folder, open_clip = Path(folder), (Path(folder) / "open_clip_config.json").exists()
    config = folder / ("open_clip_config.json" if open_clip else "config.json")
    names = ("open_clip_model*.safetensors", "open_clip_pytorch_model*.bin") if open_clip else (
        "model*.safetensors", "pytorch_model*.bin")
    files = sorted(folder.glob(names[0])) or sorted(folder.glob(names[1]))
    if not files:
        raise FileNotFoundError(f"{folder}: no {names[0]} and no {names[1]}")
    with torch.device("meta"):                                      # no memory until the shapes are known
        model = Tower(Config.from_json(json.loads(config.read_text(encoding="utf-8")))).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    load_into(model, split_qkv(read(files)), rename, SKIP)
    return model


def main():
    from PIL import Image
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--weights", metavar="DIR", required=True, help="folder with the weights and their config")
    parser.add_argument("--image", metavar="FILE", required=True)
    args = parser.parse_args()
    model = load(args.weights)
    side = model.config.image                                       # distorts it; views.py pads, as LLaVA does
    image = Image.open(args.image).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    with torch.inference_mode():
        patches = model.features(to_pixels(image)[None])[0]         # (P, C)
    norms = patches.norm(dim=-1)
    print(f"{len(patches)} patches of width {patches.shape[1]}; L2 norm {norms.min():.1f} to {norms.max():.1f}, "
          f"median {norms.median():.1f}")


def fail(message):
    """One line on stderr and exit code 2: for what a user can cause."""
    print("error: " + " ".join(str(message).split())[:600], file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        fail(e)
