"""
bench.py - every performance figure this project publishes, side by side with a named baseline on the same machine.

Needs   transformers beside the project's own requirements (pip install transformers): it is the baseline, and used
        nowhere else.
Run     python bench.py forward                  one clean forward pass at 7B widths against transformers with SDPA
        python bench.py load                     loading a sharded checkpoint: seconds and peak memory

Weights are random; widths are Vicuna-7B's and only the number of layers is cut, to fit a small machine. The two
sides take turns, and what counts is the median of the ratios of neighbours: machines drift, neighbours drift together.
"""
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import vicuna
from runs import Parser, cli, count, machine, versions


def config(layers):
    return replace(vicuna.Config(), layers=layers)


def hf_config(c):
    from transformers import LlamaConfig
    return LlamaConfig(vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers,
                       num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, rms_norm_eps=c.norm_eps,
                       max_position_embeddings=c.positions, rope_theta=c.rope_base)


def fill(model, seed=0):
    """Random weights of a size that keeps activations near 1, in place."""
    draw = torch.Generator(device="cpu").manual_seed(seed)
    for parameter in model.parameters():
        scale = 1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        block = torch.randn(2 ** 20, generator=draw).to(parameter.dtype) * scale    # repeated: drawing 7B takes minutes
        parameter.data.copy_(block.repeat(-(-parameter.numel() // len(block)))[:parameter.numel()].view_as(parameter))
    return model


def interleave(sides, repeats, device):
    """sides: name -> function. Run them in turns -> name -> seconds of each repeat, one warm-up turn not counted."""
    seconds = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def forward(args):
    """Ours and transformers' LlamaForCausalLM with the same weights: embeddings in, logits of the last position out."""
    from transformers import LlamaForCausalLM
    dtype = getattr(torch, args.dtype)
    with torch.device("meta"):
        ours = vicuna.Decoder(config(args.layers)).to(dtype)
    ours = fill(ours.to_empty(device=args.device)).eval()
    with torch.device("meta"):
        theirs = LlamaForCausalLM._from_config(hf_config(ours.config), attn_implementation="sdpa")
    names = {name.removeprefix("model."): name for name in theirs.state_dict()}
    theirs.load_state_dict({names[n]: p for n, p in ours.named_parameters()}, assign=True)  # the same memory
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config).to(args.device)
    theirs.eval()
    for T in args.tokens:
        x = torch.randn(1, T, ours.config.width, generator=torch.Generator().manual_seed(1)).to(args.device, dtype)
        with torch.inference_mode():
            a = ours.lm_head(ours.norm(ours(x)[:, -1:]))
            b = theirs(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits
            gap = ((a - b).float().norm() / b.float().norm()).item()
            seconds = interleave({
                "ours": lambda x=x: ours.lm_head(ours.norm(ours(x)[:, -1:])),
                "transformers": lambda x=x: theirs(inputs_embeds=x, use_cache=False, logits_to_keep=1)},
                args.repeats, args.device)
        ratio = statistics.median(o / t for o, t in zip(*seconds.values(), strict=True))
        print(f"forward, {T} tokens, {args.layers} layers, {args.dtype} on {args.device}: ours / transformers SDPA "
              f"{ratio:.3f} ({', '.join(f'{n} {statistics.median(s):.3f} s' for n, s in seconds.items())}, "
              f"{args.repeats} turns; logits differ by {gap:.1e} relative)")


LOADERS = {
    "ours": "import vicuna; run = lambda: vicuna.load(folder, torch.bfloat16)",
    "transformers": "from transformers import LlamaForCausalLM as M; "
                    "run = lambda: M.from_pretrained(folder, dtype=torch.bfloat16)"}
MEASURE = """
import sys, time, torch
folder = sys.argv[1]
{loader}
def peak():                                        # VmHWM: unlike ru_maxrss it does not start at the parent's
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
torch.ones(8, 8, dtype=torch.bfloat16) @ torch.ones(8, 8, dtype=torch.bfloat16)
before = peak()
start = time.perf_counter()
model = run()
touched = [p.flatten()[::1024].sum().item() for p in model.parameters()]   # what was only mapped is read now
seconds = time.perf_counter() - start
peak = peak() - before
sizes = [p.numel() * p.element_size() for p in model.parameters()]
print(seconds, peak * 1024, sum(sizes), max(sizes))
"""


def load(args):
    """A checkpoint in three shards, loaded in fresh processes that take turns: seconds until every weight can be used,
    and growth of peak memory (Linux only)."""
    from safetensors.torch import save_file
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            model = vicuna.Decoder(config(args.layers)).bfloat16()
        state = fill(model.to_empty(device="cpu")).state_dict()
        names = [n if n.startswith("lm_head") else f"model.{n}" for n in state]
        shards = {n: f"model-{1 + i * 3 // len(names):05d}-of-00003.safetensors" for i, n in enumerate(names)}
        for shard in sorted(set(shards.values())):
            save_file({n: state[n.removeprefix("model.")] for n in names if shards[n] == shard}, f"{folder}/{shard}",
                      {"format": "pt"})
        Path(folder, "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
        Path(folder, "config.json").write_text(hf_config(model.config).to_json_string())
        del model, state
        found = {name: [] for name in LOADERS}
        for _ in range(args.repeats):
            for name, loader in LOADERS.items():
                done = subprocess.run([sys.executable, "-c", MEASURE.format(loader=loader), folder], check=True,
                                      capture_output=True, text=True, cwd=Path(__file__).resolve().parent)
                found[name].append([float(x) for x in done.stdout.split()])
    size, largest = found["ours"][0][2:]
    print(f"load, {size / 1e9:.2f} GB in 3 shards, largest tensor {largest / 1e6:.0f} MB, bfloat16, median of "
          f"{args.repeats}")
    for name, rows in found.items():
        seconds, peak = (statistics.median(column) for column in list(zip(*rows, strict=True))[:2])
        print(f"  {name}: {seconds:.2f} s, peak memory {peak / 1e6:.0f} MB = the model {(peak - size) / 1e6:+.0f} MB")


def main():
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("forward", "load"))
    parser.add_argument("--layers", type=count, default=3, metavar="L", help="decoder layers (3)")
    parser.add_argument("--tokens", type=count, nargs="+", default=[620, 2200], metavar="T",
                        help="sequence lengths (620, as LLaVA-1.5; 2200, as AnyRes)")
    parser.add_argument("--repeats", type=count, default=7, metavar="N", help="turns (7)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    args = parser.parse_args()
    try:
        import transformers
    except ImportError:
        raise ValueError("the baseline is missing: pip install transformers") from None
    box = machine()
    print(f"torch {versions()['torch']}, transformers {transformers.__version__}, {box['cores']} cores, "
          f"{box['threads']} threads, {box['gpus'] or 'no GPU'}")
    {"forward": forward, "load": load}[args.what](args)


if __name__ == "__main__":
    cli(main)
