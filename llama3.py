"""
llama3.py - the Llama-3 decoder inside Llama3-LLaVA-NeXT-8B, with grouped keys, in one file.

Needs   torch to run, safetensors to load, tokenizers to read text. Nothing else of this repo: copy it and it works.
Run     python llama3.py --weights DIR --prompt "The capital of France is"
Matches transformers modeling_llama.py, eager and SDPA attention  (tests/test_decoders.py)
Paper   Llama 3, https://arxiv.org/abs/2407.21783; the residual stream of Eq. 1-6 in https://arxiv.org/abs/2411.18620

Shapes  B batch  T tokens  S keys in view  C width  H heads  K key heads  D head size  V vocabulary

Left out on purpose: training, dropout, padding inside a batch, quantized weights. This file is vicuna.py plus what
Llama-3 changed: `diff vicuna.py llama3.py` is the list.
"""
import argparse
import base64
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

BOS, EOS = "<|begin_of_text|>", ("<|end_of_text|>", "<|eot_id|>")


@dataclass(frozen=True)
class Config:
    vocab: int = 128256
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8                  # each key head serves heads / kv_heads query heads
    hidden: int = 14336                # SwiGLU inner size
    rope_base: float = 500000.0
    norm_eps: float = 1e-5
    positions: int = 8192              # longest sequence it was trained for

    @classmethod
    def from_json(cls, raw):
        """A config.json as a dict -> Config; of a LLaVA in transformers' layout its text_config. What transformers
        omits from the file is filled with LlamaConfig's defaults. ValueError names what would change the arithmetic."""
        if "text_config" in raw:
            raise ValueError("config.json is a LLaVA's: llava_min.py reads it; a decoder's is its text_config")
        rope = raw.get("rope_parameters") or {}                     # how transformers 5 spells rope_theta
        config = cls(vocab=raw.get("vocab_size", 32000), width=raw.get("hidden_size", 4096),
                     layers=raw.get("num_hidden_layers", 32), heads=raw.get("num_attention_heads", 32),
                     kv_heads=raw.get("num_key_value_heads") or raw.get("num_attention_heads", 32),
                     hidden=raw.get("intermediate_size", 11008),
                     rope_base=rope.get("rope_theta") or raw.get("rope_theta", 10000.0),
                     norm_eps=raw.get("rms_norm_eps", 1e-6), positions=raw.get("max_position_embeddings", 2048))
        plain = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
                 "rope_scaling": None, "quantization_config": None, "sliding_window": None,
                 "head_dim": config.width // config.heads}
        odd = {key: raw[key] for key, value in plain.items() if raw.get(key) not in (None, value)}
        if rope.get("rope_type", "default") != "default":
            odd["rope_parameters"] = rope
        if raw.get("model_type", "llama") not in ("llama", "llava", "llava_llama"):
            odd["model_type"] = raw["model_type"]
        if config.heads % config.kv_heads:
            odd["num_key_value_heads"] = config.kv_heads
        if odd:
            raise ValueError(f"config.json sets {odd}: that would change the arithmetic and is not implemented here")
        return config


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        h = F.rms_norm(x.float(), self.weight.shape, eps=self.eps)  # statistics in fp32, as the reference
        return self.weight * h.to(x.dtype)                          # cast back first, then the weight


def rope_table(positions, size, base, dtype):
    """positions (T,) -> cos, sin (T, size). Angles in fp32: in bf16 positions beyond 256 would collide."""
    inv_freq = 1.0 / base ** (torch.arange(0, size, 2, device=positions.device).float() / size)
    angles = positions.float()[:, None] * inv_freq                  # (T, D/2)
    angles = torch.cat((angles, angles), -1)                        # (T, D)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i + D/2}) by its angle. x (B, H, T, D), cos and sin (T, D) -> (B, H, T, D)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def causal(T, S=None, device=None):
    """keep (T, S), True = may look, for T queries that are the last of S positions.

    causal(3) is  1 0 0
                  1 1 0
                  1 1 1
    """
    S = T if S is None else S
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def to_mask(keep):
    """bool keep (..., T, S), True = may look -> the paper's additive M (Eq. 4, 7): 0 keeps an edge, -inf cuts it.

    Combine masks as bools and convert once, here: the most negative finite number twice is -inf.
    ValueError names the query rows that would see nothing (their softmax is NaN).
    """
    blind = ~keep.any(-1)
    if blind.any():
        first = keep.shape[-1] - keep.shape[-2]                     # the rows are the last T of S positions
        rows = sorted({first + row for row in blind.nonzero()[:, -1].tolist()})
        raise ValueError(f"query position(s) {rows[:4]} may look at nothing: every key is cut")
    return torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, -math.inf)


def attend(q, k, v, mask):
    """Attention with an additive mask, in the open (Eq. 3): softmax(Q K^T / sqrt(D) + M) V.

    q (B, H, T, D)  k, v (B, H, S, D)  mask broadcasts to (B, H, T, S), None is plain causal  ->  (B, H, T, D)
    """
    if mask is None:
        mask = to_mask(causal(q.shape[2], k.shape[2], q.device))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])       # (B, H, T, S)
    probs = (scores.float() + mask).softmax(-1).to(q.dtype)         # fp32 softmax, as the reference
    return probs @ v


def attend_fast(q, k, v, mask):
    """`attend` through torch's fused kernel: same arguments, same result up to rounding, no (T, S) score matrix."""
    T, S = q.shape[2], k.shape[2]
    if mask is None and 1 < T < S:                                  # is_causal would align T < S top left
        mask = to_mask(causal(T, S, q.device))
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # one new token sees everything
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))  # CUDA wants q's dtype; 0, -inf fit any


class Attention(nn.Module):
    kernel = staticmethod(attend_fast)                              # staticmethod(attend): Eq. 3 as written

    def __init__(self, c):
        super().__init__()
        self.size, self.group = c.width // c.heads, c.heads // c.kv_heads
        self.q_proj = nn.Linear(c.width, c.heads * self.size, bias=False)
        self.k_proj = nn.Linear(c.width, c.kv_heads * self.size, bias=False)
        self.v_proj = nn.Linear(c.width, c.kv_heads * self.size, bias=False)
        self.o_proj = nn.Linear(c.heads * self.size, c.width, bias=False)

    def qkv(self, x, cos, sin):
        """x (B, T, C) -> q (B, H, T, D), k (B, K, T, D), both rotated, v as k."""
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.size).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x, cos, sin, mask, cache=None):
        B, T, _ = x.shape
        q, k, v = self.qkv(x, cos, sin)
        if cache is not None:                                       # [] before the prefill, then [k, v]
            if cache:
                k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)  # (B, K, S, D)
            cache[:] = k, v
        k, v = (t.repeat_interleave(self.group, 1) for t in (k, v))  # (B, H, S, D)
        out = self.kernel(q, k, v, mask)                            # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.hidden, bias=False)
        self.up_proj = nn.Linear(c.width, c.hidden, bias=False)
        self.down_proj = nn.Linear(c.hidden, c.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(c.width, c.norm_eps), RMSNorm(c.width, c.norm_eps)

    def forward(self, x, cos, sin, mask, cache=None):
        """h^l = h^(l-1) + a^l + f^l (Eq. 1). x (B, T, C) -> (B, T, C); mask additive (B, H, T, S), None is causal."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """An instrument writes its own loop over layers, from public parts: embed_tokens, rope, layers and what is in them,
    norm, lm_head."""

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
        return rope_table(positions, c.width // c.heads, c.rope_base, self.norm.weight.dtype)

    def forward(self, x, mask=None, caches=None):
        """Embeddings x (B, T, C) -> last residual stream (B, T, C), before `norm` and `lm_head`.

        caches: one list per layer, [] before the first call; x then holds the tokens that follow those already cached.
        """
        past = caches[0][0].shape[2] if caches and caches[0] else 0
        cos, sin = self.rope(torch.arange(past, past + x.shape[1], device=x.device))
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, caches[i] if caches is not None else None)
        return x


# ---------------------------------------------------------------------------------------------------- loading

def read(files):
    """Stream (name, tensor) from .safetensors or .bin files, in order, one tensor in memory at a time.

    A mapped file's pages count as ours until it is closed, so each tensor opens it anew: peak memory is the model plus
    one tensor, not plus a shard. `.bin` is unpickled with weights_only=True, which runs no code from the file.
    """
    from safetensors import safe_open
    for file in map(str, files):
        try:
            if file.endswith(".safetensors"):
                with safe_open(file, "pt") as f:
                    names = list(f.keys())
                for name in names:
                    with safe_open(file, "pt") as f:
                        yield name, f.get_tensor(name)
            else:
                for name in torch.load(file, map_location="cpu", weights_only=True, mmap=True):
                    yield name, torch.load(file, map_location="cpu", weights_only=True, mmap=True)[name]
        except OSError:
            raise                                                   # its message names the file already
        except Exception as e:                                      # each format has its own error classes
            raise ValueError(f"{file} is damaged or not a checkpoint file ({e}); fetch it again") from e


def load_into(model, pairs, rename=lambda name: name, skip=r"rotary_emb\.inv_freq$"):
    """Copy (name, tensor) pairs into model: every parameter filled once, every tensor used or matching `skip`.

    ValueError names what is missing, extra or misshapen. `rename` turns a checkpoint name into a parameter name.
    """
    want, extra = dict(model.named_parameters()), []
    for name, tensor in pairs:
        if re.search(skip, name):
            continue
        slot = want.pop(rename(name), None)
        if slot is None:
            extra.append(name)
        elif tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{name} is {tensor.dtype}: quantized weights are not implemented here")
        elif slot.shape != tensor.shape:
            raise ValueError(f"{name}: the checkpoint has {tuple(tensor.shape)}, the config wants {tuple(slot.shape)}")
        else:
            slot.data.copy_(tensor)
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
        model = Decoder(Config.from_json(json.loads((folder / "config.json").read_text()))).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    load_into(model, read(files), rename=lambda name: name.removeprefix("model."))
    return model


def load_tokenizer(folder):
    """tokenizer.json, or the tiktoken tokenizer.model that Meta ships -> tokenizers.Tokenizer."""
    from tokenizers import Tokenizer
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        try:
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as e:                                      # tokenizers raises nothing more special
            raise ValueError(f"{folder / 'tokenizer.json'} is damaged or not a tokenizer ({e})") from e
    if (folder / "tokenizer.model").exists():
        return from_tiktoken((folder / "tokenizer.model").read_bytes())
    raise FileNotFoundError(f"{folder}: no tokenizer.json and no tokenizer.model")


SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4)),
           "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
           *(f"<|reserved_special_token_{i}|>" for i in range(5, 251))]
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")                               # meta-llama/llama3 tokenizer.py


def from_tiktoken(data):
    """The bytes of a tiktoken rank file, one "base64 rank" a line -> a tokenizers.Tokenizer with the same ids.

    Ranks are the ids; a merge is any split of a token into two tokens, lowest rank first.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    try:
        lines = map(bytes.split, data.splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if not ranks:
            raise ValueError("it is empty")
    except ValueError as e:
        raise ValueError(f"tokenizer.model is not a tiktoken rank file ({e})") from e
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's alphabet: a letter for each byte
    hidden = (b for b in range(256) if b not in printable)
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    spell = {token: "".join(letter[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [(spell[a], spell[b]) for a, b in sorted(splits, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    tokenizer = Tokenizer(models.BPE({spell[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, len(ranks))])
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
    ids, stop = tokenizer.encode(args.prompt).ids, {tokenizer.token_to_id(t) for t in EOS}
    new, caches = list(ids), [[] for _ in model.layers]
    with torch.inference_mode():
        for _ in range(args.tokens):                                # greedy, one row a step after the prefill
            h = model(model.embed_tokens(torch.tensor([new])), caches=caches)
            new = [model.lm_head(model.norm(h[:, -1])).argmax(-1).item()]
            if new[0] in stop:
                break
            ids += new
    print(tokenizer.decode(ids))


def fail(message):
    """One line on stderr and exit code 2: what a user can cause."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        fail(e)
