"""
qwen2.py - the Qwen2 decoder inside LLaVA-OneVision (0.5B and 7B), in one file.

Needs   torch to run, safetensors to load, tokenizers to read text. Nothing else of this repo: copy it and it works.
Run     python qwen2.py --weights DIR --prompt "The capital of France is"
Matches transformers modeling_qwen2.py, eager and SDPA attention  (tests/test_decoders.py)
Paper   Qwen2, https://arxiv.org/abs/2407.10671; the residual stream of Eq. 1-6 in https://arxiv.org/abs/2411.18620

Shapes  B batch  T tokens  S keys, cached and new  C width  H heads  K key heads  D head size  V vocabulary

Left out on purpose: training, padding inside a batch, quantized weights, .bin files. This file is llama3.py with what
Qwen2 changed (`diff llama3.py qwen2.py`): biases of q, k, v, a head that may be the embeddings' matrix, the tokenizer.
"""
import argparse
import json
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

BOS, EOS = None, ("<|im_end|>", "<|endoftext|>")

# What LLaVA puts before and after the user's message (qwen_1_5 in LLaVA-NeXT's conversation.py).
TEMPLATE = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n")
PAPER_END = ""                         # what the paper's code appends to the whole prompt of this model: nothing


@dataclass(frozen=True)
class Config:
    vocab: int = 152064
    width: int = 3584
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4                  # grouped-query attention: heads / kv_heads queries share a key
    hidden: int = 18944                # SwiGLU inner size
    rope_base: float = 1000000.0
    norm_eps: float = 1e-6
    positions: int = 32768             # the longest sequence it was trained for
    tied: bool = False                 # is the head the embeddings' matrix? (0.5B)

    @property
    def head_size(self):
        return self.width // self.heads

    @classmethod
    def from_json(cls, raw):
        """A config.json, as a dict, -> Config. Of a LLaVA in transformers' layout, pass its text_config. Keys that are
        not there have Qwen2Config's default. ValueError: a setting that would change the arithmetic is not implemented.
        """
        if "text_config" in raw:
            raise ValueError("this config.json describes a whole LLaVA: load it with llava_onevision.py")
        if not isinstance(rope := raw.get("rope_parameters") or {}, dict):  # transformers 5 keeps rope_theta in here
            raise ValueError(f"config.json sets rope_parameters={rope!r}, which is not an object")
        config = check_sizes(cls(
            vocab=raw.get("vocab_size", 151936), width=raw.get("hidden_size", 4096),
            layers=raw.get("num_hidden_layers", 32), heads=raw.get("num_attention_heads", 32),
            kv_heads=raw.get("num_key_value_heads") or 32, hidden=raw.get("intermediate_size", 22016),
            rope_base=rope.get("rope_theta") or raw.get("rope_theta", 10000.0),
            norm_eps=raw.get("rms_norm_eps", 1e-6), positions=raw.get("max_position_embeddings", 32768)))
        # Each of these has one value that the code below implements.
        plain = {"hidden_act": "silu", "attention_bias": True, "mlp_bias": False, "use_sliding_window": False,
                 "rope_scaling": None, "quantization_config": None, "head_dim": config.width // config.heads}
        odd = {key: raw[key] for key, value in plain.items() if raw.get(key) not in (None, value)}
        odd |= {"rope_parameters": rope} if rope.get("rope_type", "default") != "default" else {}
        odd |= {"model_type": raw.get("model_type")} if not reads(raw) else {}
        odd |= {"num_key_value_heads": config.kv_heads} if config.heads % config.kv_heads else {}
        if odd:
            raise ValueError(f"config.json sets {odd}: that would change the arithmetic and is not implemented here")
        return replace(config, tied=raw.get("tie_word_embeddings") is True)


def reads(raw):
    """Is this config.json, as a dict, for this file? Yes if it names Qwen2 as its type, or in its architectures."""
    return any("qwen2" in name.lower() or "llavaqwen" in name.lower().replace("_", "")
               for name in (str(raw.get("model_type")), *map(str, raw.get("architectures") or ())))


# Above these, a size is not a model's but a damaged file's, and building it would take hours.
LARGEST = {"vocab": 10 ** 6, "width": 10 ** 5, "layers": 500, "heads": 1000, "kv_heads": 1000, "hidden": 10 ** 6,
           "positions": 10 ** 8}


def check_sizes(c):
    """ValueError names a size in a Config that no model can have."""
    bad = {key: value for key, value in (vars(c) | {"tied": 1}).items() if not (
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


def repeat_heads(k, H):
    """Repeat each key head for all the query heads that share it: (B, K, S, D) -> (B, H, S, D)."""
    return k.repeat_interleave(H // k.shape[1], 1)


class Block(nn.Module):
    """One layer. Each step is a method of its own, so that an experiment can replace one and keep the others.

    The matrices keep their names in the checkpoint, without the "self_attn." and "mlp." in front (see `rename`).
    """
    kernel = staticmethod(attend_fast)                              # staticmethod(attend): Eq. 3 step by step

    def __init__(self, c):
        super().__init__()
        self.size = c.head_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(c.width, n * c.head_size)         # they have biases
                                                 for n in (c.heads, c.kv_heads, c.kv_heads))
        self.o_proj = nn.Linear(c.heads * c.head_size, c.width, bias=False)
        self.gate_proj = nn.Linear(c.width, c.hidden, bias=False)
        self.up_proj = nn.Linear(c.width, c.hidden, bias=False)
        self.down_proj = nn.Linear(c.hidden, c.width, bias=False)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c.width, c.norm_eps), RMSNorm(c.width, c.norm_eps)

    def qkv(self, x, cos, sin):
        """x (B, T, C) -> q (B, H, T, D), k (B, K, T, D), v as k. q and k are rotated to their positions."""
        B, T, _ = x.shape
        x = self.input_layernorm(x)                                 # normed for reading; the stream itself is not
        q, k, v = (p(x).view(B, T, -1, self.size).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v          # so a score depends on the distance of two tokens

    def weights(self, q, k, mask):
        """How much each query attends to each key, (B, H, T, S); k may hold more positions than q."""
        return attention_weights(q, repeat_heads(k, q.shape[1]), mask)

    def attend(self, q, k, v, mask):
        """What attention adds to the residual stream, a^l: (B, T, C)."""
        return self.output(self.each_head(q, k, v, mask))

    def each_head(self, q, k, v, mask):
        """What each head reads: the mean of the values, weighted by its attention weights, (B, H, T, D)."""
        k, v = (repeat_heads(t, q.shape[1]) for t in (k, v))        # (B, H, S, D)
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
                k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)  # (B, K, S, D)
            cache[:] = k, v
        x = x + self.attend(q, k, v, mask)
        return x + self.mlp(x)


class TiedHead(nn.Module):
    """A head that is the embeddings' matrix: logits are products with the embeddings."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = (embedding,)                               # a tuple: it is not this module's child, too
    weight = property(lambda self: self.embedding[0].weight)

    def forward(self, x):
        return F.linear(x, self.weight)


class Decoder(nn.Module):
    """Embeddings in, residual stream out. An experiment writes its own loop over `layers` instead of `forward`."""

    def __init__(self, c):
        super().__init__()
        self.config, self.embed_tokens = c, nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.width, c.norm_eps)
        self.lm_head = TiedHead(self.embed_tokens) if c.tied else nn.Linear(c.width, c.vocab, bias=False)

    def rope(self, positions):
        """positions (T,) -> cos, sin (T, D) in the weights' dtype."""
        return rope_table(positions, self.config.head_size, self.config.rope_base, self.norm.weight.dtype)

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
    """A tensor's name in a Qwen2 checkpoint -> its name here."""
    return name.removeprefix("model.").replace(".self_attn.", ".").replace(".mlp.", ".")


def read(files):
    """Yield (name, tensor) of all .safetensors files, in order. ValueError: one is damaged."""
    from safetensors import safe_open
    for file in files:
        try:
            with safe_open(file, "pt") as f:
                yield from ((name, f.get_tensor(name)) for name in f.keys())
        except Exception as e:                                      # the library's errors are of its own kind
            raise ValueError(f"{file} is damaged or not a checkpoint file ({e}); fetch it again") from e


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
    """A folder with config.json and model*.safetensors -> Decoder in eval mode. The head is tied if the files hold
    none, whatever config.json says: published ones say both."""
    folder = Path(folder)
    pairs = dict(read(sorted(folder.glob("model*.safetensors"))))
    if not pairs:
        raise FileNotFoundError(f"{folder}: no model*.safetensors")
    config = Config.from_json(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    with torch.device("meta"):                                      # no memory until the shapes are known
        model = Decoder(replace(config, tied="lm_head.weight" not in pairs)).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    load_into(model, pairs.items(), rename)
    return model


SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")                               # how a text is cut into words first
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def load_tokenizer(folder):
    """tokenizer.json, or vocab.json and merges.txt (and added_tokens.json, if there is one) -> tokenizers.Tokenizer."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    whole, vocab, merges, more = (Path(folder, name) for name in (
        "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"))
    if not (whole.exists() or vocab.exists() and merges.exists()):
        raise FileNotFoundError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt")
    try:
        tokenizer = Tokenizer.from_file(str(whole)) if whole.exists() else Tokenizer(
            models.BPE.from_file(str(vocab), str(merges)))
        added = json.loads(more.read_text(encoding="utf-8")) if more.exists() else dict.fromkeys(SPECIAL, 0)
        added = [AddedToken(text, normalized=False) for text in sorted(added, key=added.get)]       # in order of ids
    except Exception as e:                                          # tokenizers raises plain Exceptions
        raise ValueError(f"the tokenizer in {folder} is damaged ({e})") from e
    _ = tokenizer.no_truncation(), tokenizer.no_padding()           # tokenizer.json may turn these on
    if not whole.exists():
        tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([         # each digit is a word of its own
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.add_special_tokens(added)
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--weights", metavar="DIR", required=True, help="a text-only model: config, weights, tokenizer")
    parser.add_argument("--prompt", metavar="TEXT", required=True)
    parser.add_argument("--tokens", metavar="N", type=int, default=20, help="how many to write at most (20)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    args = parser.parse_args()
    model, tokenizer = load(args.weights, getattr(torch, args.dtype)), load_tokenizer(args.weights)
    ids, stop = tokenizer.encode(args.prompt).ids, {tokenizer.token_to_id(t) for t in EOS}  # BOS comes from the file
    new, caches = list(ids), [[] for _ in model.layers]
    with torch.inference_mode():
        for _ in range(args.tokens):                                # the whole prompt first, then one token a step
            at = torch.arange(len(ids) - len(new), len(ids))
            h = model(model.embed_tokens(torch.tensor([new])), at, caches=caches)
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
