"""
vicuna.py - the LLaMA-2 decoder inside LLaVA-1.5 and LLaVA-1.6 (Vicuna-1.5, 7B and 13B), in one file.

Needs   torch to run, safetensors to load, tokenizers to read text. Nothing else of this repo: copy it and it works.
Run     python vicuna.py --weights DIR --prompt "The capital of France is"
Matches transformers modeling_llama.py, eager and SDPA attention  (tests/test_decoders.py)
Paper   Llama 2, https://arxiv.org/abs/2307.09288; the residual stream of Eq. 1-6 in https://arxiv.org/abs/2411.18620

Shapes  B batch  T tokens  S keys, cached and new  C width  H heads  K key heads  D head size  V vocabulary

Left out on purpose: training, dropout, padding inside a batch, quantized weights. llama3.py is this file with what
Llama-3 changed: `diff vicuna.py llama3.py` is the list.
"""
import argparse
import json
import math
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

BOS, EOS = "<s>", ("</s>",)

# What LLaVA puts before and after the user's message (vicuna_v1 in its conversation.py).
TEMPLATE = ("A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ", " ASSISTANT:")
PAPER_END = ""                         # what the paper's code appends to the whole prompt of this model: nothing


@dataclass(frozen=True)
class Config:
    vocab: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    hidden: int = 11008                # SwiGLU inner size
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    positions: int = 4096              # the longest sequence it was trained for

    @property
    def head_size(self):
        return self.width // self.heads

    @classmethod
    def from_json(cls, raw):
        """A config.json, as a dict, -> Config. Of a LLaVA in transformers' layout, pass its text_config.

        transformers leaves out keys that have LlamaConfig's default value; they are filled in here.
        ValueError names a setting that would change the arithmetic and is not implemented.
        """
        if "text_config" in raw:
            raise ValueError("this config.json describes a whole LLaVA: load it with llava_min.py")
        rope = raw.get("rope_parameters") or {}                     # transformers 5 keeps rope_theta in here
        if not isinstance(rope, dict):
            raise ValueError(f"config.json sets rope_parameters={rope!r}, which is not an object")
        config = cls(vocab=raw.get("vocab_size", 32000), width=raw.get("hidden_size", 4096),
                     layers=raw.get("num_hidden_layers", 32), heads=raw.get("num_attention_heads", 32),
                     kv_heads=raw.get("num_key_value_heads") or raw.get("num_attention_heads", 32),
                     hidden=raw.get("intermediate_size", 11008),
                     rope_base=rope.get("rope_theta") or raw.get("rope_theta", 10000.0),
                     norm_eps=raw.get("rms_norm_eps", 1e-6), positions=raw.get("max_position_embeddings", 2048))
        check_sizes(config)
        # Each of these has one value that the code below implements. Anything else must not pass silently.
        plain = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
                 "rope_scaling": None, "quantization_config": None, "sliding_window": None,
                 "head_dim": config.width // config.heads}
        odd = {key: raw[key] for key, value in plain.items() if raw.get(key) not in (None, value)}
        if rope.get("rope_type", "default") != "default":
            odd["rope_parameters"] = rope
        if raw.get("model_type", "llama") not in ("llama", "llava", "llava_llama"):
            odd["model_type"] = raw["model_type"]
        if not reads(raw):
            odd["num_key_value_heads"] = config.kv_heads            # grouped-query attention is llama3.py's
        if odd:
            raise ValueError(f"config.json sets {odd}: that would change the arithmetic and is not implemented here")
        return config


def reads(raw):
    """Is this config.json, as a dict, for this file? Yes if each query head has a key head of its own."""
    heads = raw.get("num_attention_heads", 32)
    return (raw.get("num_key_value_heads") or heads) == heads


# Above these, a size is not a model's but a damaged file's, and building it would take hours.
LARGEST = {"vocab": 10 ** 6, "width": 10 ** 5, "layers": 500, "heads": 1000, "kv_heads": 1000, "hidden": 10 ** 6,
           "positions": 10 ** 8}


def check_sizes(c):
    """ValueError names a size in a Config that no model can have."""
    bad = {key: value for key, value in vars(c).items() if not (
        type(value) in ((int,) if key in LARGEST else (int, float)) and 0 < value <= LARGEST.get(key, 10 ** 9))}
    if bad:
        raise ValueError(f"impossible sizes in the config: {str(bad)[:300]}")
    if c.width % c.heads or c.head_size % 2:                        # rope rotates pairs
        raise ValueError(f"impossible sizes in the config: width {c.width} for {c.heads} heads")
    return c


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        h = F.rms_norm(x.float(), self.weight.shape, eps=self.eps)  # mean square in fp32, as the reference
        return self.weight * h.to(x.dtype)                          # cast back first, then the weight


def rope_table(positions, size, base, dtype):
    """positions (T,) -> cos, sin (T, D): the angles that rotate a query or key at each position (RoPE).

    Computed in fp32: in bf16, positions beyond 256 would share angles.
    """
    # Pair i turns by base^(-2i/D) per position: the first ones fast, the last ones hardly at all.
    inv_freq = 1.0 / base ** (torch.arange(0, size, 2, device=positions.device).float() / size)
    angles = positions.float()[:, None] * inv_freq                  # (T, D/2)
    angles = torch.cat((angles, angles), -1)                        # (T, D)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotate each pair (x_i, x_{i + D/2}) by its angle. x (B, H, T, D) -> the same; cos, sin (T, D) broadcast to it."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin                   # (a, b) -> (a cos - b sin, b cos + a sin)


def causal(T, S=None, device=None):
    """keep (T, S), True = may attend, for T queries that are the last of S positions.

    causal(3) is  1 0 0
                  1 1 0
                  1 1 1
    """
    S = T if S is None else S
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def additive(keep):
    """keep (..., T, S), True = may attend -> the paper's additive M (Eq. 4, 7): 0 keeps an edge, -inf cuts it."""
    return torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, -math.inf)


def to_mask(keep):
    """`additive`, for masks that somebody made: combine them as bools and convert once, here.

    A query without a key is noticed before its softmax is NaN. ValueError names such query positions. To look, the CPU
    waits for the device that keep is on.
    """
    blind = ~keep.any(-1)
    if blind.any():
        first = keep.shape[-1] - keep.shape[-2]                     # the queries are the last T of S positions
        positions = sorted({first + t for t in blind.nonzero()[:, -1].tolist()})
        raise ValueError(f"query position(s) {positions[:4]} would attend to nothing: every key is cut")
    return additive(keep)


def attention_weights(q, k, mask):
    """How much each query attends to each key: softmax(Q K^T / sqrt(D) + M), the first half of Eq. 3.

    q (B, H, T, D)  k (B, H, S, D)  mask broadcasts to (B, H, T, S), None is plain causal  ->  (B, H, T, S)
    """
    if mask is None:
        mask = additive(causal(q.shape[2], k.shape[2], q.device))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])       # (B, H, T, S)
    return (scores.float() + mask).softmax(-1).to(q.dtype)          # softmax in fp32, as the reference


def attend(q, k, v, mask):
    """Attention with an additive mask, step by step (Eq. 3).

    q (B, H, T, D)  k, v (B, H, S, D)  mask broadcasts to (B, H, T, S), None is plain causal  ->  (B, H, T, D)
    """
    return attention_weights(q, k, mask) @ v


def attend_fast(q, k, v, mask):
    """`attend` by torch's fused kernel: the same up to rounding, and the (T, S) scores are never stored as a whole."""
    T, S = q.shape[2], k.shape[2]
    if mask is None and 1 < T < S:                                  # is_causal counts from the first key, not the last
        mask = additive(causal(T, S, q.device))
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # a single new token attends to everything
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))  # 0 and -inf are exact in any


class Block(nn.Module):
    """One layer. Each step is a method of its own, so that an experiment can replace one and keep the others.

    The matrices keep their names in the checkpoint, without the "self_attn." and "mlp." in front (see `rename`).
    """
    kernel = staticmethod(attend_fast)                              # staticmethod(attend): Eq. 3 step by step

    def __init__(self, c):
        super().__init__()
        self.size = c.head_size
        self.q_proj = nn.Linear(c.width, c.heads * c.head_size, bias=False)
        self.k_proj = nn.Linear(c.width, c.heads * c.head_size, bias=False)
        self.v_proj = nn.Linear(c.width, c.heads * c.head_size, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_size, c.width, bias=False)
        self.gate_proj = nn.Linear(c.width, c.hidden, bias=False)
        self.up_proj = nn.Linear(c.width, c.hidden, bias=False)
        self.down_proj = nn.Linear(c.hidden, c.width, bias=False)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c.width, c.norm_eps), RMSNorm(c.width, c.norm_eps)

    def qkv(self, x, cos, sin):
        """x (B, T, C) -> q (B, H, T, D), k (B, H, T, D), v as k. q and k are rotated to their positions."""
        B, T, _ = x.shape
        x = self.input_layernorm(x)                                 # normed for reading; the stream itself is not
        q, k, v = (p(x).view(B, T, -1, self.size).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v          # so a score depends on the distance of two tokens

    def weights(self, q, k, mask):
        """How much each query attends to each key, (B, H, T, S); k may hold more positions than q."""
        return attention_weights(q, k, mask)

    def attend(self, q, k, v, mask):
        """What attention adds to the residual stream, a^l: (B, T, C)."""
        return self.output(self.each_head(q, k, v, mask))

    def each_head(self, q, k, v, mask):
        """What each head reads: the mean of the values, weighted by its attention weights, (B, H, T, D)."""
        return self.kernel(q, k, v, mask)

    def output(self, out):
        """Heads side by side, mixed by o_proj: (B, H, T, D) -> (B, T, C)."""
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def mlp(self, x):
        """What the MLP (SwiGLU) adds to the residual stream, f^l: (B, T, C)."""
        x = self.post_attention_layernorm(x)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def forward(self, x, cos, sin, mask, cache=None):
        """h^l = h^(l-1) + a^l + f^l (Eq. 1). x (B, T, C) -> (B, T, C).

        mask: additive, broadcasts to (B, H, T, S); None is causal. cache: this layer's list [keys, values], [] before
        the first call. The queries attend to the cached keys as well, and the new keys and values are added to it.
        """
        q, k, v = self.qkv(x, cos, sin)
        if cache is not None:                                       # the cached keys first, then the new ones
            if cache:
                k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)  # (B, H, S, D)
            cache[:] = k, v
        x = x + self.attend(q, k, v, mask)
        return x + self.mlp(x)


class Decoder(nn.Module):
    """Embeddings in, residual stream out. An experiment writes its own loop over `layers` instead of `forward`."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.norm_eps)
        self.lm_head = nn.Linear(c.width, c.vocab, bias=False)

    def rope(self, positions):
        """positions (T,) -> cos, sin (T, D) in the weights' dtype."""
        c = self.config
        return rope_table(positions, c.head_size, c.rope_base, self.norm.weight.dtype)

    def forward(self, x, positions, mask=None, caches=None):
        """Embeddings x (B, T, C) at `positions` (T,) -> residual stream after the last layer (B, T, C).

        lm_head(norm(...)) turns it into logits. caches: one list per layer, see Block.forward; x then holds only the
        tokens that follow the cached ones.
        """
        cos, sin = self.rope(positions)                             # once for all layers
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, caches[i] if caches is not None else None)
        return x


# ---------------------------------------------------------------------------------------------------- loading

def rename(name):
    """A tensor's name in a LLaMA checkpoint -> its name here."""
    return name.removeprefix("model.").replace(".self_attn.", ".").replace(".mlp.", ".")


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
    """A folder with config.json and model*.safetensors (or pytorch_model*.bin) -> Decoder in eval mode."""
    folder = Path(folder)
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"{folder}: no model*.safetensors and no pytorch_model*.bin")
    with torch.device("meta"):                                      # no memory until the shapes are known
        model = Decoder(Config.from_json(json.loads((folder / "config.json").read_text(encoding="utf-8")))).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    load_into(model, read(files), rename)
    return model


def load_tokenizer(folder):
    """tokenizer.json, or the sentencepiece tokenizer.model that the original repos ship -> tokenizers.Tokenizer."""
    from tokenizers import Tokenizer
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as e:                                      # tokenizers raises plain Exceptions
            raise ValueError(f"{folder / 'tokenizer.json'} is damaged or not a tokenizer ({e})") from e
        tokenizer.no_truncation()                                   # tokenizer.json may turn these on
        tokenizer.no_padding()
        return tokenizer
    if (folder / "tokenizer.model").exists():
        return from_sentencepiece((folder / "tokenizer.model").read_bytes())
    raise FileNotFoundError(f"{folder}: no tokenizer.json and no tokenizer.model")


def fields(data):
    """Protobuf wire format: yield (field number, value) of one message; a value is int, bytes or 4 or 8 raw bytes."""
    def varint(at):
        value = shift = 0
        while True:                                                 # 7 bits a byte; the top bit says that more follow
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                return value, at

    at = 0
    while at < len(data):
        key, at = varint(at)
        kind = key & 7
        if kind == 0:                                               # a number
            value, at = varint(at)
        elif kind in (1, 2, 5):                                     # 8 bytes, as many bytes as it says, 4 bytes
            size, at = varint(at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            value, at = data[at:at + size], at + size
            if at > len(data):
                raise IndexError("it ends in the middle of a field")
        else:
            raise ValueError(f"tokenizer.model is not a sentencepiece model (protobuf wire type {kind})")
        yield key >> 3, value


def from_sentencepiece(data):
    """The bytes of a sentencepiece BPE model -> a tokenizers.Tokenizer with the same ids (sentencepiece_model.proto).

    sentencepiece keeps scores, not merges: a merge is any split of a piece into two pieces, best score first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    pieces, algorithm = [], None                                    # (text, score, type); the index is the id
    try:
        for number, value in fields(data):
            if number == 1:
                piece = {1: b"", 2: bytes(4), 3: 1, **dict(fields(value))}  # type 1 (normal) is left out of the file
                pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece[3]))
            elif number == 2:
                algorithm = dict(fields(value)).get(3, 1)           # trainer_spec.model_type
        if algorithm is None:
            raise IndexError("it ends before its trainer_spec")
    except (IndexError, TypeError, UnicodeDecodeError, struct.error) as e:
        raise ValueError(f"tokenizer.model is not a sentencepiece model ({e})") from e
    if algorithm != 2:
        raise ValueError(f"tokenizer.model is not a BPE model (model_type {algorithm})")
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    # The kinds of piece that matter here; the others are bytes (6) and what a user added (4).
    NORMAL, UNKNOWN, CONTROL = 1, 2, 3
    merges = []
    for text, score, kind in pieces:
        if kind == NORMAL:
            splits = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in vocab and text[i:] in vocab]
            merges += [(score, pair) for pair in sorted(splits, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    merges.sort(key=lambda m: (m[0], len(m[1][0]), len(m[1][1])), reverse=True)  # stable: ties keep the order of ids
    unknown = next(text for text, _, kind in pieces if kind == UNKNOWN)
    tokenizer = Tokenizer(models.BPE(vocab, [pair for _, pair in merges], unk_token=unknown, fuse_unk=True,
                                     byte_fallback=True))
    # A text gets a space in front, and every space becomes "▁", a letter like any other.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text, _, kind in pieces
                                  if kind in (UNKNOWN, CONTROL)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--weights", metavar="DIR", required=True,
                        help="folder of a text-only model: config.json, weights, a tokenizer")
    parser.add_argument("--prompt", metavar="TEXT", required=True)
    parser.add_argument("--tokens", metavar="N", type=int, default=20, help="how many to write at most (20)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    args = parser.parse_args()
    model, tokenizer = load(args.weights, getattr(torch, args.dtype)), load_tokenizer(args.weights)
    ids, stop = tokenizer.encode(args.prompt).ids, {tokenizer.token_to_id(t) for t in EOS}  # BOS comes from the file
    new, caches = list(ids), [[] for _ in model.layers]
    with torch.inference_mode():
        for _ in range(args.tokens):                                # the whole prompt first, then one token a step
            positions = torch.arange(len(ids) - len(new), len(ids))
            h = model(model.embed_tokens(torch.tensor([new])), positions, caches=caches)
            new = [model.lm_head(model.norm(h[:, -1])).argmax(-1).item()]
            if new[0] in stop:
                break
            ids += new
    sys.stdout.reconfigure(errors="replace")                        # "?" for a letter that the terminal lacks
    print(tokenizer.decode(ids))


def fail(message):
    """One line on stderr and exit code 2: for what a user can cause."""
    print("error: " + " ".join(str(message).split())[:600], file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        fail(e)
