"""
siglip_vit.py - the SigLIP vision transformer in LLaVA-OneVision (SO400M/14 at 384 px), in one file.

Needs   torch to run, safetensors to load, numpy and pillow to read a photo. Copy it and it works.
Run     python siglip_vit.py --weights DIR --image photo.jpg
Matches transformers modeling_siglip.py, and the original LLaVA-NeXT  (tests/test_onevision.py)
Paper   SigLIP, https://arxiv.org/abs/2303.15343

Shapes  N images  P patches  C width  H heads  D head size  I image side in px

Left out on purpose: the text tower, the attention-pooling head, training. What differs from clip_vit.py: no class
token, no norm before the first block, a bias in the patch embedding, the tanh form of GELU, other constants.
"""
import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# RGB, of pixels scaled to [0, 1].
MEAN = STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Config:
    width: int = 1152
    layers: int = 27
    heads: int = 16
    hidden: int = 4304
    image: int = 384                               # I, px
    patch: int = 14                                # px; of 384 = 27 * 14 + 6, the last 6 are not read
    norm_eps: float = 1e-6

    @classmethod
    def from_json(cls, raw):
        """A config.json of a SigLIP folder, or its vision_config, as a dict, -> Config.

        transformers leaves out keys that have SiglipVisionConfig's default value; they are filled in here.
        ValueError names a setting that is not implemented.
        """
        kind, raw = raw.get("model_type", "siglip"), raw.get("vision_config") or raw    # a whole SigLIP, or its tower
        config = cls(width=raw.get("hidden_size", 768), layers=raw.get("num_hidden_layers", 12),
                     heads=raw.get("num_attention_heads", 12), hidden=raw.get("intermediate_size", 3072),
                     image=raw.get("image_size", 224), patch=raw.get("patch_size", 16),
                     norm_eps=raw.get("layer_norm_eps", 1e-6))
        # Each of these has one value that the code below implements.
        plain = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
        odd = {key: raw[key] for key, value in plain.items() if raw.get(key, value) != value}
        odd |= {"model_type": kind} if kind not in ("siglip", "siglip_vision_model") else {}
        if odd:
            raise ValueError(f"vision config sets {odd}: that is not SigLIP and is not implemented here")
        return check_sizes(config)


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
    """A PIL RGB image (any size) -> float32 (3, height, width), scaled to [-1, 1]."""
    import numpy as np
    # The factor is applied in float64 and rounded, the rest is float32, as in the reference's image processor.
    x = (np.asarray(image.convert("RGB")) * (1 / 255)).astype(np.float32)       # (h, w, 3)
    x = (x - np.array(MEAN, dtype=np.float32)) / np.array(STD, dtype=np.float32)
    return torch.from_numpy(x).permute(2, 0, 1).contiguous()


class Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch, c.patch)          # one linear map for each patch
        self.position_embedding = nn.Embedding((c.image // c.patch) ** 2, c.width)

    def forward(self, pixels):
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (N, P, C), patches row by row
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
        # No mask: every patch attends to every other. As in the reference, softmax is in float32, unlike in clip_vit.
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5      # (N, H, P, P)
        probs = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return self.out_proj((probs @ v).transpose(1, 2).reshape(N, T, C))  # heads side by side, then mixed


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.width, c.hidden), nn.Linear(c.hidden, c.width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


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
        self.config, self.embeddings, self.encoder = c, Embeddings(c), Encoder(c)

    def features(self, pixels, layer=-1):
        """pixels (N, 3, I, I) -> hidden state `layer` (N, P, C): a feature for each patch, row by row.

        Numbered as transformers' hidden_states: 0 is the input of the first block, -1 the output of the last one.
        LLaVA-OneVision's checkpoints lack SigLIP's last block, and -1 is what they read: before post_layernorm.
        """
        x = self.embeddings(pixels.to(self.embeddings.patch_embedding.weight.dtype))
        for block in self.encoder.layers[:layer % (len(self.encoder.layers) + 1)]:
            x = block(x)                                            # blocks above `layer` need not run
        return x


# ---------------------------------------------------------------------------------------------------- loading

# Tensors of a SigLIP that LLaVA-OneVision does not use: text tower, pooling head, the norm before it, a buffer.
SKIP = r"^(vision_model\.)?(post_layernorm|head)\.|position_ids$|^text_model\.|^logit_(scale|bias)$"


def rename(name):
    """A tensor's name in a SigLIP folder of transformers' -> its name here."""
    return name.removeprefix("vision_model.")


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
    """A folder with config.json and model*.safetensors (or pytorch_model*.bin) -> Tower in eval mode."""
    folder = Path(folder)
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"{folder}: no model*.safetensors and no pytorch_model*.bin")
    with torch.device("meta"):                                      # no memory until the shapes are known
        model = Tower(Config.from_json(json.loads((folder / "config.json").read_text(encoding="utf-8")))).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    load_into(model, read(files), rename, SKIP)
    return model


def main():
    from PIL import Image
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--weights", metavar="DIR", required=True, help="folder with the weights and their config")
    parser.add_argument("--image", metavar="FILE", required=True)
    args = parser.parse_args()
    model = load(args.weights)
    side = model.config.image                                       # distorts it, as OneVision's first view
    image = Image.open(args.image).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    with torch.inference_mode():
        norms = model.features(to_pixels(image)[None])[0].norm(dim=-1)          # (P,)
    print(f"{len(norms)} patches; L2 norm {norms.min():.1f} to {norms.max():.1f}, median {norms.median():.1f}")


def fail(message):
    """One line on stderr and exit code 2: for what a user can cause."""
    print("error: " + " ".join(str(message).split())[:600], file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        fail(e)
