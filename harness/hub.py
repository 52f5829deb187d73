"""
harness/hub.py - names -> local files: registered models, the hub, its cache; and which device and dtype to use.

Run     python -m harness.hub llava-1.5-7b          fetches what is not there yet, and prints where it is
        python llava_min.py --model $(python -m harness.hub llava-1.5-7b) --image photo.jpg --question "Is it red?"
Use     model = load("llava-1.5-7b")                or a hub id, or a folder
        checkpoint = resolve("llava-1.5-7b")        its files, found or fetched, before anything is loaded
Needs   llava_min.py; huggingface_hub, for names that are no folder.

HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT are honoured, by huggingface_hub. What the cache holds is used without
asking the hub for a newer version; --revision pins one.
"""
import argparse
import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import llava_min
import llava_onevision
from harness.errors import one_line_errors
from llava_min import Files, find_files, pick, read_json, tower_kind
from offload import Layers, Tensors
from offload import load as load_layers
from vicuna import fail

MODELS = {"llava-1.5-7b": "llava-hf/llava-1.5-7b-hf", "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
          "llava-v1.6-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
          "llava-v1.6-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
          "llama3-llava-next-8b": "llava-hf/llama3-llava-next-8b-hf",
          "llava-onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
          "llava-onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf", "vicuna-1.5-13b": "lmsys/vicuna-13b-v1.5"}
BUNDLED = {name: Path(__file__).resolve().parents[1] / "tiny" / name for name in ("llava-tiny", "llava-tiny-anyres")}


@dataclass(frozen=True)
class Checkpoint:
    """A model's files, and where they came from."""
    name: str                                      # what was asked for
    origin: str                                    # the hub id, or the folder
    revision: str | None                           # the hub's commit
    files: Files
    tower: "Checkpoint | None" = None              # the vision tower, where it came from elsewhere


def resolve(name, revision=None, vision_tower=None, weights=True):
    """A name, and --revision and --vision-tower, -> Checkpoint; what the cache lacks is downloaded.

    weights: without them, configs and tokenizer alone. ValueError says what is missing, and what to do.
    """
    def find_tower(tower, kind):
        try:
            return find(tower, kind)
        except ValueError as e:
            raise ValueError(f"the vision tower of {name}: {e}; --vision-tower takes a folder or hub id") from e

    if vision_tower:
        find_tower(vision_tower, "tower config")                    # a slip here should not cost the model's download
    model = find(name, "model" if weights else "texts", revision)
    if kind := tower_kind(model.files):
        kind = kind if weights else "tower config"
        tower = find_tower(vision_tower or read_json(model.files.config)["mm_vision_tower"], kind)
        model = replace(model, files=replace(model.files, tower=tower.files), tower=tower)
    return model


def find(name, kind="model", revision=None):
    """A folder, a registered name or a hub id -> Checkpoint. kind: see llava_min.pick."""
    folder = BUNDLED.get(name) or Path(os.path.expanduser(name))    # Path's own raises where there is no such user
    if name and folder.is_dir():
        if revision:
            raise ValueError(f"--revision {revision}: {name} is a folder, and only the hub keeps revisions")
        return Checkpoint(name, str(folder), None, find_files(folder, kind))
    if name in BUNDLED:
        raise ValueError(f"{name} is bundled with llava-flow, but {folder} is missing; copy tiny/ from the repository")
    repo = MODELS.get(name, name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or name.startswith("."):
        raise ValueError(f"{name or 'an empty name'} is neither a folder, a hub id (owner/name), nor one of "
                         f"{', '.join([*BUNDLED, *MODELS])}")
    files = fetch(name, repo, kind, revision)
    return Checkpoint(name, repo, files.config.parent.name, files)  # .../snapshots/COMMIT/config.json


def fetch(name, repo, kind, revision):
    """A hub id -> Files in the cache, downloaded where they are missing. ValueError: what went wrong, in one line."""
    try:
        from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise ValueError(f"{name} is not a folder; to fetch it from the hub, pip install huggingface_hub") from None

    def cached(file):
        path = try_to_load_from_cache(repo, file, revision=revision)
        return Path(path) if isinstance(path, str) else None

    def lacking(why):
        pin = f" --revision {revision}" if revision else ""
        return ValueError(f"{name}: {', '.join(pick(cached, kind)[1])} of {repo} not in the cache "
                          f"{constants.HF_HUB_CACHE}; run `hf download {repo}{pin}` where there is a network, "
                          f"or pass a folder that has them ({why})")

    found, missing = pick(cached, kind)
    if not missing:
        return found
    if constants.HF_HUB_OFFLINE:
        raise lacking("HF_HUB_OFFLINE is set")
    try:                                                            # one request tells what the repository holds
        listed = {f.rfilename for f in HfApi().model_info(repo, revision=revision, timeout=15).siblings}

        def offered(file):                                          # an index is fetched: it names the shards
            if file.endswith(".index.json") and file in listed:
                return Path(hf_hub_download(repo, file, revision=revision))
            return Path(file) if file in listed else None

        wanted = pick(offered, kind)[0]
        files = [wanted.config, wanted.tokenizer, wanted.generation, *wanted.weights]
        snapshot_download(repo, revision=revision, allow_patterns=[str(file) for file in files if file])
    except GatedRepoError:
        raise ValueError(f"{repo} is gated: accept its licence on its hub page, then set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise ValueError(f"{repo} has no revision {revision}; --revision takes a branch, tag or commit that its "
                         "hub page lists") from None
    except RepositoryNotFoundError:
        raise ValueError(f"{repo} is neither a folder nor on the hub (if it is private: set HF_TOKEN)") from None
    except Exception as e:                                          # each hub version has network errors of its own
        first = (str(e) or type(e).__name__).splitlines()[0]
        words = " ".join((getattr(e, "server_message", None) or "").split())             # the hub's own words, if any
        raise lacking(f"hub: {first}{words and ': '}{words}") from e
    found, missing = pick(cached, kind)
    if missing:
        raise ValueError(f"{repo} has no {', '.join(missing)}")
    return found


# ---------------------------------------------------------------------------------------------------- loading

def family(files):
    """The module whose LLaVA a checkpoint is: llava_min or llava_onevision."""
    return llava_onevision if llava_onevision.reads(read_json(files.config)) else llava_min


def read_config(files, preprocess="llava"):
    """Files -> the Config of their family."""
    return family(files).read_config(files, preprocess)


def load(name, *, dtype="auto", device="auto", revision=None, vision_tower=None, preprocess="llava", offload="off"):
    """A registered name, a hub id or a folder (or a Checkpoint) -> llava_min.LLaVA. dtype, device, offload: as the
    flags."""
    checkpoint = name if isinstance(name, Checkpoint) else resolve(name, revision, vision_tower)
    device, files = pick_device(device), checkpoint.files
    dtype = pick_dtype(dtype, device, files)
    where = pick_offload(offload, files, dtype, device)
    if where == "off":
        return family(files).load(files, dtype, device, preprocess=preprocess)
    return load_layers(files, dtype, device, where == "cpu", preprocess, family(files))


def pick_device(name):
    """--device -> "cuda", "mps" or "cpu". Under torchrun each process takes the GPU of its own number."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch sees no Apple GPU here; use --device cpu")
    return name


def pick_dtype(name, device, files):
    """--dtype -> torch dtype. auto: float32 on a CPU, or if config.json says so; else float16, as in the paper."""
    raw = read_json(files.config)
    if name == "auto" and (device == "cpu" or "float32" in (raw.get("torch_dtype"), raw.get("dtype"))):
        return torch.float32
    return torch.float16 if name == "auto" else getattr(torch, name)


ROOM = 1.5e9                                       # bytes for a question's own tensors, and for torch


def pick_offload(name, files, dtype, device):
    """--offload -> "off", "cpu" or "disk". auto: the first one for which the memory suffices. ValueError: an Apple GPU
    has no memory of its own."""
    if device == "mps":
        if name in ("cpu", "disk"):
            raise ValueError(f"--offload {name}: with --device mps weights are in host memory anyway; use --device cpu")
        return "off"
    if name != "auto":
        return name
    everything = [*files.weights, *(files.tower.weights if files.tower else ())]
    sizes = Tensors(everything)
    if sizes.bytes(dtype.itemsize) + ROOM < free_memory(device):
        return "off"
    return "cpu" if sizes.bytes() + 2 * ROOM < free_memory("cpu") and device != "cpu" else "disk"


def free_memory(device):
    """Bytes that a program can still take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):                                # not Linux: all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def together(model):
    """How many questions go through the layers together: one if these are in memory, else half of what is free, up to
    16."""
    d, c = model.decoder, model.config
    if not isinstance(d.layers, Layers):
        return 1
    tokens = 700 if c.aspect == "pad" else 7500 if c.geometry.most else 2400
    kept = 3 * c.text.layers if model.store is list else 1          # streams and caches, unless they are on a Shelf
    branches = 6 * 30 * c.text.layers                               # tokens of six edges at every layer
    one = d.norm.weight.itemsize * c.text.width * (tokens * (3 + kept) + branches)
    free = free_memory(model.device.type) - 2 * sum(p.nbytes for p in d.layers.blocks[0].parameters())
    return int(max(1, min(16, 0.5 * free // one)))


def describe(model, checkpoint):
    """A loaded model in one line: where it came from, its size, dtypes and device."""
    c, where = model.config, checkpoint.origin
    if checkpoint.revision:
        where += f"@{checkpoint.revision[:8]}"
    tower = ""
    if c.vision:
        elsewhere = checkpoint.tower and checkpoint.tower.files.weights
        tower = (f", vision tower {checkpoint.tower.origin if elsewhere else 'in the checkpoint'} in "
                 f"{dtype_name(next(model.vision_tower.parameters()))}")
    layers = model.decoder.layers
    offloaded = "" if not isinstance(layers, Layers) else f", layers {'in host memory' if layers.held else 'on disk'}"
    return (f"model {checkpoint.name} ({where}): {c.text.layers} layers, width {c.text.width}, "
            f"{dtype_name(model.decoder.norm.weight)} on {model.device}{tower}{offloaded}")


def dtype_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def weights_hash(files):
    """sha256 (hex) over the sha256 of every weight file. The hub's cache names files by it, unread."""
    total = hashlib.sha256()
    for file in [*files.weights, *(files.tower.weights if files.tower else [])]:
        # One hop: the blob it links to is named by the sha256. Where repositories share blobs, that blob is a link too,
        # to a file that is named by another hash. Elsewhere, a link's name says nothing.
        name = os.path.basename(os.readlink(file)) if os.path.islink(file) else ""
        snapshots = Path(file).absolute().parents[1]
        if not (re.fullmatch("[0-9a-f]{64}", name) and snapshots.name == "snapshots" and (
                snapshots.parent / "blobs" / name).exists()):
            with open(file, "rb") as f:
                name = hashlib.file_digest(f, "sha256").hexdigest()
        total.update(name.encode())
    return total.hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("model", metavar="NAME", help=f"{', '.join([*BUNDLED, *MODELS])}, a hub id or a folder")
    parser.add_argument("--revision", metavar="REV", help="hub branch, tag or commit (main)")
    parser.add_argument("--vision-tower", metavar="NAME", help="folder or hub id, instead of the one in config.json")
    args = parser.parse_args()
    checkpoint = resolve(args.model, args.revision, args.vision_tower)
    tower = f" --vision-tower {checkpoint.tower.files.config.parent}" if checkpoint.tower else ""
    print(f"{checkpoint.files.config.parent}{tower}")               # as llava_min.py takes it


if __name__ == "__main__":
    with one_line_errors():
        main()
