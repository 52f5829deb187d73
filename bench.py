"""
bench.py - every performance figure that this project publishes, beside a named baseline on the same machine.

Needs   transformers besides the project's own requirements (pip install transformers): it is the baseline, and used
        nowhere else.
Run     python bench.py forward                  one clean forward pass at 7B widths against transformers with SDPA
        python bench.py load                     loading a sharded checkpoint: seconds and peak memory
        python bench.py tree                     how many tokens of branches should go through a layer at once
        python bench.py prune --layers 8         prefill without the image in the upper layers: time and FLOPs saved
        python bench.py noise --model DIR        what bfloat16 and float16 do to a model's curves (llava-tiny)
        python bench.py sweep --model llava-1.5-7b --layers 8          knockout of figures 3-5, all layers of six edges:
                                                 in one pass, the plain way, and the paper's way in transformers

        python bench.py offload --layers 8       knockout.py with the layers on disk, against the model in memory

Weights are random, except for `noise`. Widths are the published models'; only the number of layers is cut, to fit a
small machine. The sides take turns, and the median of the ratios of neighbouring turns counts, so that clock drift
affects all sides alike.
"""
import csv
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":                         # Ctrl-C while torch is imported ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from tqdm import tqdm

import clip_vit
import fork
import knockout
import lens
import maps
import patch
import prune
import score
import siglip_vit
from groups import random_sets
from harness import hub, questions
from harness.baseline import hf_config, papers_forward, theirs_of, theirs_on_meta
from harness.errors import one_line_errors
from harness.experiment import control_layers, control_pool
from harness.flags import Parser
from harness.runs import machine, versions
from harness.shapes import SHAPES, Question, build, facts, fill, write_checkpoint


def interleave(sides, repeats, device, peaks=None):
    """sides: name -> function. Run them in turns -> name -> seconds of each repeat, one warm-up turn not counted.

    peaks: a dict that takes what each needs at most at a time, measured in the warm-up turn.
    """
    seconds = {name: [] for name in sides}
    for turn in tqdm(range(repeats + 1), unit="turn", leave=False):
        for name, run in sides.items():
            if peaks is not None and not turn:
                peaks[name] = peak(run, device)
                continue
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
    dtype = getattr(torch, args.dtype)
    ours = build(args.model, args.layers, dtype, args.device)
    theirs = theirs_of(ours)
    for T in args.tokens:
        x = torch.randn(1, T, ours.config.width, generator=torch.Generator().manual_seed(1)).to(args.device, dtype)
        at = torch.arange(T, device=args.device)
        with torch.inference_mode():
            a = ours.lm_head(ours.norm(ours(x, at)[:, -1:]))
            b = theirs(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits
            gap = ((a - b).float().norm() / b.float().norm()).item()
            seconds = interleave({
                "ours": lambda x=x, at=at: ours.lm_head(ours.norm(ours(x, at)[:, -1:])),
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
    return int(next(line for line in open("/proc/self/status", "rb") if line.startswith(b"VmHWM")).split()[1])
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
        model = build("llava-1.5-7b", args.layers, torch.bfloat16, "cpu")
        names = theirs_on_meta(model.config)[1]
        state = {names[n]: tensor for n, tensor in model.state_dict().items()}
        shards = {n: f"model-{1 + i * 3 // len(state):05d}-of-00003.safetensors" for i, n in enumerate(state)}
        for shard in sorted(set(shards.values())):
            save_file({n: state[n] for n in state if shards[n] == shard}, f"{folder}/{shard}", {"format": "pt"})
        Path(folder, "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": shards}), encoding="utf-8")
        Path(folder, "config.json").write_text(hf_config(model.config).to_json_string(), encoding="utf-8")
        del model, state
        measured = {name: [] for name in LOADERS}
        for _ in range(args.repeats):
            for name, loader in LOADERS.items():
                done = subprocess.run([sys.executable, "-c", MEASURE.format(loader=loader), folder], check=True,
                                      capture_output=True, encoding="utf-8", cwd=Path(__file__).resolve().parent)
                measured[name].append([float(x) for x in done.stdout.split()])
    size, largest = measured["ours"][0][2:]
    print(f"load, {size / 1e9:.2f} GB in 3 shards, largest tensor {largest / 1e6:.0f} MB, bfloat16, median of "
          f"{args.repeats}")
    for name, rows in measured.items():
        seconds, peak = (statistics.median(column) for column in list(zip(*rows, strict=True))[:2])
        print(f"  {name}: {seconds:.2f} s, peak memory {peak / 1e6:.0f} MB = the model {(peak - size) / 1e6:+.0f} MB")


def encoders(name, width, dtype, device, with_theirs):
    """[ours, theirs]: functions that take a photo's views through tower and projector. Ours runs the tower in float32,
    as llava_min does, theirs in `dtype`, as the paper's code."""
    file, layer = (siglip_vit, -1) if "onevision" in name else (clip_vit, -2)
    c = file.Config()
    pixels = torch.randn(SHAPES[name][2], 3, c.image, c.image, generator=torch.Generator().manual_seed(2)).to(device)
    layers = torch.nn.Linear(c.width, width), torch.nn.GELU(), torch.nn.Linear(width, width)
    projector = fill(torch.nn.Sequential(*layers)).to(device, dtype)
    tower = fill(file.Tower(c)).to(device).eval()
    ways = [lambda: projector(tower.features(pixels, layer).to(dtype))]
    if with_theirs:
        from transformers import CLIPVisionConfig, CLIPVisionModel
        other = CLIPVisionModel(CLIPVisionConfig(
            hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers, num_attention_heads=c.heads,
            image_size=c.image, patch_size=c.patch)).to(device, dtype).eval()
        ways.append(lambda: projector(other(pixels.to(dtype), output_hidden_states=True).hidden_states[-2][:, 1:]))
    return ways


@torch.inference_mode()
def sweep(args):
    """Knockout of figures 3-5 for one question, six edges, every layer: one pass, the plain way, the paper's way."""
    dtype, k = getattr(torch, args.dtype), 9
    baseline = bool(find_spec("transformers")) and "onevision" not in args.model
    if not baseline:
        print("the paper's way is left out: it needs transformers, and has no OneVision")
    decoder = build(args.model, args.layers, dtype, args.device)
    q, L, c = Question(args.model, decoder, args.after), len(decoder.layers), decoder.config
    encode = encoders(args.model, c.width, dtype, args.device, baseline)
    clean = fork.to_mask(fork.causal(q.T)).to(args.device)
    curves = {}

    def whole(cuts):
        return knockout.sweep(decoder, q.clean(decoder), cuts, 0, k)

    def controlled():
        """What knockout.py does with --control 10."""
        where, layers = knockout.windows(k, L), control_layers(L)
        random = [knockout.Cut(some, target, [where[l] for l in layers]) for i, (source, target) in enumerate(q.cuts)
                  for some in random_sets(control_pool(source, target, q.T), len(source), 10, i)]
        run = q.clean(decoder)
        ends = knockout.cut_ends(decoder, run, [knockout.Cut(*edge, where) for edge in q.cuts] + random)
        score.score(decoder, torch.cat(ends), score.Answer((0,)))

    def patching():
        other = q.clean(decoder)                                    # two runs; the other has another photo
        patch.patch_ends(decoder, q.clean(decoder), other, groups)

    def mapping():
        """maps.py: every patch -> question, in the window around the middle layer."""
        maps.cut_blocks(decoder, q.clean(decoder), [[i] for i in q.cuts[1][0]], asked, [knockout.windows(k, L)[L // 2]],
                        score.Answer((0,)))

    asked, stream = q.cuts[3][1], q.clean(decoder).stream
    groups = [q.cuts[1][0], asked, [q.T - 1]]                       # image, question, last
    sides = {"clean forward": lambda: fork.unembed(decoder, decoder(q.x, q.positions, clean)[0, -1]),
             "sweep, six edges": lambda: curves.update(sweep=whole(q.cuts)),
             "six edges, 10 controls each": controlled,
             "patching, three groups": patching,
             "map of every patch, one window": mapping,
             "sweep, question->last": lambda: whole(q.cuts[:1]),
             "lens, last position": lambda: lens.lens(decoder, stream, [-1]),
             "module knockout, both": lambda: lens.module_curves(decoder, q.clean(decoder), asked, k),
             "photo encoded, ours": encode[0]}
    peaks, chosen = {}, lambda name: not args.sides or any(word in name for word in args.sides)
    sides = {name: run for name, run in sides.items() if chosen(name) or name in ("clean forward", "sweep, six edges")}
    seconds = interleave(sides, args.repeats, args.device, peaks)

    # Every point of a curve costs the other two sides the same: so many of them, evenly spread, are timed in turns.
    points = [(e, l) for e in range(len(q.cuts)) for l in range(L)]
    timed = points[::max(1, len(points) // args.sample)][:args.sample]
    slow = {"plain loop": lambda mask, layers: fork.unembed(
        decoder, knockout.forward(decoder, q.x, q.positions, clean, mask, layers)[0, -1])}
    if baseline:
        theirs, wide = theirs_of(decoder), clean.to(dtype)[None, None]
        slow["the paper's way"] = lambda mask, layers: papers_forward(theirs, encode[1], q.x, wide,
                                                                      mask.to(dtype)[None, None], layers)
    slow = {name: run for name, run in slow.items() if chosen(name)}
    gaps = {name: [] for name in slow}
    for turn, (e, l) in enumerate(tqdm([points[0], *timed], unit="point", leave=False)):   # the first warms up
        mask = knockout.edge_mask(decoder, q.T, *q.cuts[e]).to(args.device)
        for name, run in slow.items():
            wait(args.device)
            start = time.perf_counter()
            p = fork.probability(run(mask, knockout.window(l, k, L)), 0)
            if turn:
                seconds.setdefault(name, []).append(time.perf_counter() - start)
                gaps[name].append(abs(p / curves["sweep"][e][l] - 1))
            else:
                peaks[name] = peak(lambda run=run, mask=mask: run(mask, ()), args.device)
    one, forwards = statistics.median(seconds["clean forward"]), 1 + len(points)
    counts = {"clean forward": 1, "sweep, six edges": knockout.token_layers(q.T, L, q.cuts, k),
              "six edges, 10 controls each": knockout.token_layers(q.T, L, q.cuts, k) - 1 + knockout.token_layers(
                  q.T, L, q.cuts * 10, k, control_layers(L)),
              "patching, three groups": patch.token_layers(q.T, L, groups),
              "map of every patch, one window": knockout.token_layers(
                  q.T, L, [([i], asked) for i in groups[0]], k, [L // 2]),
              "sweep, question->last": knockout.token_layers(q.T, L, q.cuts[:1], k), **dict.fromkeys(slow, forwards),
              "module knockout, both": 1 + ((2 * sum(L - 1 - l for l in range(L)) + L - 1) * (q.T - min(asked))
                                            + (2 * L + 1) * len(asked)) / (q.T * L)}
    floors = {"clean forward": 1, "sweep, six edges": floor(c, q.T, L, q.cuts, k),
              "sweep, question->last": floor(c, q.T, L, q.cuts[:1], k), **dict.fromkeys(slow, forwards)}
    rows = []
    for name, spent in seconds.items():
        times = [s * (forwards if name in slow else 1) for s in spent]
        middle = statistics.median(times)
        rows.append([name, round(middle, 3), round(min(times), 3), round(max(times), 3), round(middle / one, 2),
                     *(round(v, 2) if (v := table.get(name)) else "" for table in (counts, floors)),
                     round(peaks[name] / 1e6), len(spent)])
    head = ["side", "seconds", "fastest", "slowest", "clean forwards", "token-layers", "FLOPs", "peak MB", "timed"]
    print(f"{args.model}, {L} layers, {args.dtype} on {args.device}, {q.T} tokens, window {k}, {forwards} forwards the "
          f"plain way; token-layers and FLOPs in clean forwards; peak memory on top of the weights")
    table([head, *rows], args.out / f"sweep_{args.model}_{L}_{q.T}_{args.dtype}_{args.device}.csv")
    ours = statistics.median(seconds["sweep, six edges"])
    for name, gap in gaps.items():
        print(f"{name}: {statistics.median(seconds[name]) * forwards / ours:.1f} times the sweep; probabilities differ "
              f"by {statistics.median(gap):.1e} in the median, {max(gap):.1e} at most, relative")


def tree(args):
    """One layer for all 3 L branches of figures 4 and 5, with more or fewer of them lined up in attention."""
    for name in ("llava-1.5-7b", "llava-1.5-13b"):
        decoder = build(name, 1, getattr(torch, args.dtype), args.device)
        for past in (613, 2237):
            time_tree(args, name, decoder, past)


@torch.inference_mode()
def time_tree(args, name, decoder, past):
    best, at_once = fork.IN_SEQUENCE, fork.AT_ONCE
    module, sizes, _ = SHAPES[name]
    c, n, L = decoder.config, 29, module.Config(**sizes).layers
    random = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=random).to(decoder.lm_head.weight)
    x, kv = draw(3 * L, n, c.width), [draw(1, c.kv_heads, past, c.width // c.heads) for _ in range(2)]
    mask = fork.to_mask(fork.causal(n, past + n))[None, None].to(x)
    cos, sin = decoder.rope(torch.arange(past, past + n, device=args.device))
    which = torch.zeros(len(x), dtype=torch.long, device=args.device)

    def run(in_attention, in_layer):
        fork.IN_SEQUENCE = in_attention
        for some in x.split(in_layer // n):
            fork.branch_layer(decoder.layers[0], some, cos, sin, kv, mask, which[:len(some)])
    ways = [(tokens, at_once) for tokens in (n, 2 * n, 128, 256, 512, 1024) if tokens != best]
    ways += [(best, tokens) for tokens in (256, 512, 1024, 2048, len(x) * n)]
    seconds = interleave({way: partial(run, *way) for way in ways}, args.repeats, args.device)
    fork.IN_SEQUENCE, base = best, seconds[best, at_once]
    print(f"one layer of {name}, {len(x)} branches of {n} tokens after {past}, {args.dtype} on {args.device}: "
          f"{statistics.median(base):.3f} s with {best} tokens in attention, {at_once} in a layer; as shares of that:")
    for (in_attention, in_layer), spent in seconds.items():
        share = statistics.median(a / b for a, b in zip(spent, base, strict=True))
        print(f"    {in_attention:5} in attention, {in_layer:5} in a layer: {share:.2f}")


@torch.inference_mode()
def drop(args):
    """Prefill without the image in the upper layers: time saved, against FLOPs saved."""
    decoder = build(args.model, args.layers, getattr(torch, args.dtype), args.device)
    q, L, c = Question(args.model, decoder), len(decoder.layers), decoder.config
    image = q.cuts[1][0]
    counts = [round(L * part) for part in (0, 0.25, 0.5, 0.75)]
    sides = {X: partial(prune.prefill, decoder, q.x, q.positions, image, L - X) for X in counts}
    seconds = interleave(sides, args.repeats, args.device)
    print(f"{args.model}, {L} layers, {args.dtype} on {args.device}, {q.T} tokens, {len(image)} of them the image's; "
          f"prefill in {statistics.median(seconds[0]):.3f} s with all of them")
    rows = [["layers without", "time", "FLOPs", "time saved / FLOPs saved"]]
    for X in counts[1:]:
        spent = statistics.median(a / b for a, b in zip(seconds[X], seconds[0], strict=True))
        work = (prune.flops(c, [q.T] * (L - X) + [q.T - len(image)] * X) / prune.flops(c, [q.T] * L))
        rows.append([X, f"{spent:.3f}", f"{work:.3f}", f"{(1 - spent) / (1 - work):.2f}"])
    table(rows, args.out / f"prune_{args.model}_{L}_{args.dtype}_{args.device}.csv")


def bundled(model):
    """-> for 20 bundled questions of each task (task, embeddings, positions, the cuts of figures 3-5)."""
    asked = []
    for q in questions.read_any(questions.BUNDLED, questions.BUNDLED.parent / "images", None, 20):
        p = q.prompt(model)
        groups = q.groups(p)
        asked.append((q.task, model.embed(p), p.positions,
                      [[groups.positions(g) for g in edge.split("->")] for edge in knockout.EDGES]))
    return asked


@torch.inference_mode()
def noise(args):
    """Knockout in each dtype against float32: of figures 3-5 on the bundled questions; of facts, if the model is
    text-only."""
    checkpoint, k = hub.resolve(args.model), Parser.window(args.model)
    config, folder = hub.read_config(checkpoint.files), checkpoint.files.config.parent
    curves, tokens = {}, []
    for dtype in ("float32", "bfloat16", "float16"):
        if config.vision:
            model = hub.load(checkpoint, dtype=dtype, device=args.device)
            decoder, asked = model.decoder, bundled(model)
        else:
            decoder = config.decoder_file.load(folder, getattr(torch, dtype), args.device)
            asked = facts(decoder, config.decoder_file.load_tokenizer(folder))
        changes = []
        for i, (_, x, positions, cuts) in enumerate(asked):
            clean = fork.clean_pass(decoder, x, positions)
            logits = fork.unembed(decoder, clean.stream[-1][0, -1])
            tokens += [logits.argmax().item()] if dtype == "float32" else []
            base = fork.probability(logits, tokens[i])
            changes.append([[knockout.percent(base, v) for v in values]
                            for values in knockout.sweep(decoder, clean, cuts, tokens[i], k)])
        curves[dtype] = torch.tensor(changes, dtype=torch.float64)  # (questions, edges, L)
    tasks = [[i for i, (task, *_) in enumerate(asked) if task == name] for name in sorted({a[0] for a in asked})]
    print(f"{args.model}, {len(asked)} {'questions' if config.vision else 'facts'}, {len(asked[0][3])} edges, window "
          f"{k}, on {args.device}: change_percent against float32's, in percentage points")
    rows = [["dtype", "a point: median", "mean", "95 %", "most", "a mean curve: most"]]
    for dtype in ("bfloat16", "float16"):
        off = (curves[dtype] - curves["float32"]).abs()
        mean = max((curves[dtype][task].mean(0) - curves["float32"][task].mean(0)).abs().max() for task in tasks)
        values = (off.median(), off.mean(), off.quantile(0.95), off.max(), mean)
        rows.append([dtype, *(f"{v.item():.2g}" for v in values)])
    table(rows, args.out / f"noise_{Path(args.model).name}_{args.device}.csv")


def offload(args):
    """knockout.py on a random checkpoint in bfloat16: layers on disk, several questions together, against the model in
    memory where that fits. Seconds include loading; peak memory is the process's."""
    n, rows, found, texts = args.together, [["layers", "seconds a question", "peak memory, GB"]], {}, set()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, args.model, args.layers)
        files = hub.resolve(folder).files
        sides = {f"on disk, {n} together": ("disk", "--together", n)}
        if hub.pick_offload("auto", files, getattr(torch, args.dtype), "cpu") == "off":
            sides |= {"in memory": ("off",), "on disk, one by one": ("disk", "--together", 1)}
        gigabytes = sum(os.path.getsize(file) for file in files.weights) / 1e9
        for turn in range(args.repeats):
            for name, how in sides.items():
                out = Path(folder, f"{len(how)}-{how[-1]}-{turn}")
                command = [sys.executable, Path(__file__).with_name("knockout.py"), "--model", folder, "--all",
                           "--limit", n, "--tasks", "ChooseAttr", "--window", 9, "--dtype", args.dtype, "--out", out,
                           "--offload", *how]
                start = time.perf_counter()
                child = os.spawnv(os.P_NOWAIT, sys.executable, list(map(str, command)))
                _, status, usage = os.wait4(child, 0)
                if status:
                    raise ValueError(f"{name}: knockout.py ended with {os.waitstatus_to_exitcode(status)}")
                found.setdefault(name, []).append(((time.perf_counter() - start) / n, usage.ru_maxrss * 1024 / 1e9))
                print(f"{name}: {found[name][-1]}", flush=True)
                texts.add((out / "knockout.csv").read_bytes())
    if len(texts) > 1:
        raise ValueError("the sides' CSVs differ")
    rows += [[name, *(f"{statistics.median(v):.2f}" for v in zip(*values, strict=True))]
             for name, values in found.items()]
    print(f"{args.model}, {args.layers or 'all'} layers, {gigabytes:.1f} GB in bfloat16, used in {args.dtype}, six "
          f"edges, {n} questions; every CSV is the same, to the byte")
    table(rows, args.out / f"offload_{args.model}_{args.layers or 'all'}_{args.dtype}.csv")


def table(rows, file):
    """Print rows, the first of them the head, and write them as CSV."""
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print("| " + " | ".join(map(str, row)) + " |")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows(rows)
    print(f"wrote {file}")


def floor(c, T, L, cuts, k):
    """FLOPs of a clean pass and a sweep, in units of the clean pass's; what a mask hides is not counted."""
    last = prune.layer_flops(c, T - 1, T)
    return 1 + sum(prune.layer_flops(c, min(target), T) * (L - 1 - knockout.window(l, k, L).start) + last
                   for _, target in cuts for l in range(L)) / (L * prune.layer_flops(c, 0, T))


def peak(run, device):
    """The most memory that run() needs at a time, in bytes, beyond what was in use before (on a CPU: Linux only)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    ctypes.CDLL(None).malloc_trim(0)                                # give back what is free first

    def status(key):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        line = next(line for line in lines if line.startswith(key))
        return int(line.split()[1]) * 1024
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")                  # reset the peak
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def main(argv=None):
    with one_line_errors():
        run(parse(Parser(__doc__), argv))


def parse(parser, argv=None):
    """The command line -> args."""
    parser.add_argument("what", choices=("forward", "load", "tree", "prune", "noise", "sweep", "offload"))
    parser.add_argument("--model", metavar="NAME", help=f"whose widths: {', '.join(SHAPES)} (the first); "
                        "noise: any model, as knockout.py takes it (llava-tiny)")
    parser.add_argument("--random", action="store_true", help="changes nothing: weights are always random, but noise's")
    parser.add_argument("--layers", type=parser.count, metavar="L", help="decoder layers (3; sweep: all)")
    parser.add_argument("--sample", type=parser.count, default=24, metavar="N",
                        help="sweep: points of the slow sides' curves that are timed (24)")
    parser.add_argument("--sides", nargs="+", metavar="WORD", help="sweep: of its sides only those with WORD in their "
                        "names, besides the clean forward and the six edges (all)")
    parser.add_argument("--after", type=parser.count, default=29, metavar="N",
                        help="sweep: tokens from the question on, 13 at least (29, the paper's median)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), metavar="DIR", help="sweep: its CSV (out/bench)")
    parser.add_argument("--tokens", type=parser.count, nargs="+", default=[620, 2200], metavar="T",
                        help="sequence lengths (620, as LLaVA-1.5; 2200, as AnyRes)")
    parser.add_argument("--together", type=parser.count, default=8, metavar="N", help="offload: questions (8)")
    parser.add_argument("--repeats", type=parser.count, default=7, metavar="N", help="turns (7)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="of the arithmetic (bfloat16; offload: float32)")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("float32" if args.what == "offload" else "bfloat16")
    args.model = args.model or ("llava-tiny" if args.what == "noise" else "llava-1.5-7b")
    if args.what != "noise" and args.model not in SHAPES:
        parser.error(f"argument --model: {args.model} is none of {', '.join(SHAPES)}")
    if args.what in ("forward", "load") and not args.layers:
        args.layers = 3
    if args.after < 13:
        raise ValueError(f"--after {args.after}: the question has 12 tokens, and the last position comes after it")
    return args


def run(args):
    box, theirs = machine(), find_spec("transformers") and metadata.version("transformers")
    if args.what in ("forward", "load") and not theirs:
        raise ValueError("the baseline is missing: pip install transformers")
    print(f"torch {versions()['torch']}, transformers {theirs}, {box['cores']} cores, {box['threads']} threads, "
          f"{box['gpus'] or 'no GPU'}")
    {"forward": forward, "load": load, "tree": tree, "prune": drop, "noise": noise, "sweep": sweep,
     "offload": offload}[args.what](args)


if __name__ == "__main__":
    main()
