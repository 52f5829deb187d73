"""python -m pytest tests/test_hub.py

What llava_min.resolve asks of a hub, what it leaves in the cache, and what it says when something is not there. The hub
is a small one on 127.0.0.1; nothing leaves the machine. huggingface_hub reads HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE
once, at its import, so each setting is a fresh Python that resolves a batch of names and prints what it found.
"""
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

import llava_min

pytest.importorskip("huggingface_hub")
ROOT = Path(__file__).resolve().parent.parent


# ----------------------------------------------------------------------------------------------- what the hub holds

def js(**data):
    return json.dumps(data).encode()


def safetensor(*names, fill=0):
    return safetensors.numpy.save({name: np.full(8, fill, np.float32) for name in names})


def pickled(*names):
    file = io.BytesIO()
    torch.save({name: torch.zeros(8) for name in names}, file)
    return file.getvalue()


def sharded(stem, suffix, first, second):
    one, two = (f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2))
    return {f"{stem}.{suffix}.index.json": js(weight_map={"a": one, "b": two}), one: first, two: second}


def hf_layout(fill=0):
    return {"config.json": js(model_type="llava", text_config={}, fill=fill), "tokenizer.json": js(fill=fill),
            "generation_config.json": js(eos_token_id=2),
            **sharded("model", "safetensors", safetensor("a", fill=fill), safetensor("b", fill=fill))}


def original_layout(tower, weights):
    return {"config.json": js(model_type="llava_llama", mm_vision_tower=tower), "tokenizer.model": b"pieces", **weights}


UNWANTED = {"README.md": b"# hello", ".gitattributes": b"", "preprocessor_config.json": js(),
            "tokenizer.model": b"pieces", "pytorch_model.bin": pickled("a", "b"), "flax_model.msgpack": b"flax",
            "more/config.json": js(), "more/model.safetensors": safetensor("c")}
TOWER = {"config.json": js(hidden_size=1024), "pytorch_model.bin": pickled("vision_model.embeddings.class_embedding")}
INSIDE = {"model.safetensors": safetensor("model.vision_tower.vision_tower.vision_model.embeddings.class_embedding")}
BINS = sharded("pytorch_model", "bin", pickled("a"), pickled("b"))
SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NOT_FOR_A_TOWER = {"README.md": b"# hello", "tokenizer.json": js(), "flax_model.msgpack": b"flax"}

REPOS = {                                                           # hub id -> branch or tag -> file -> bytes
    "lab/llava": {"main": hf_layout() | UNWANTED, "v1": hf_layout(fill=1) | UNWANTED},
    "lab/partial": {"main": hf_layout()},
    "lab/private": {"main": hf_layout()},
    "lab/gated": {"main": hf_layout()},
    "lab/gated-single": {"main": {"config.json": js(), "tokenizer.json": js(), "model.safetensors": safetensor("a")}},
    "lab/weightless": {"main": {"config.json": js(), "tokenizer.json": js(), "README.md": b"# hello"}},
    "lab/bins": {"main": original_layout("lab/clip", BINS)},
    "lab/clip": {"main": TOWER | NOT_FOR_A_TOWER},
    "lab/inside": {"main": original_layout("lab/clip-config", INSIDE)},
    "lab/clip-config": {"main": TOWER | NOT_FOR_A_TOWER},
    "lab/moved": {"main": original_layout("/elsewhere/clip", BINS)},
    "lab/clip-new": {"main": TOWER},
    "lab/clip-warm": {"main": TOWER},
    "lab/clip-sharded": {"main": {"config.json": js(), **BINS}},
}
TOKEN = "hf_of_a_reader"                                            # may read lab/private, was not let into lab/gated


def commit(files):
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def etag(name, data):
    """The hub names a large file by its sha256, and what git holds by git's own sha1."""
    large = name.endswith((".safetensors", ".bin", ".msgpack"))
    return hashlib.sha256(data).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


# ---------------------------------------------------------------------------------------------------- the hub

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.log.append((self.command, path, self.headers.get("Authorization")))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?/?", path)
        resolve = re.fullmatch(r"(/large)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            self.answer(api[1], unquote(api[3] or "main"), listing=api[2] or "revision")
        elif resolve:
            self.answer(resolve[2], unquote(resolve[3]), file=unquote(resolve[4]), large=bool(resolve[1]))
        else:
            self.refuse(404, "", "no such page")

    do_HEAD = do_GET

    def answer(self, repo, revision, listing="", file="", large=False):
        who = self.headers.get("Authorization")
        if who not in (None, f"Bearer {TOKEN}"):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if repo not in REPOS or (repo == "lab/private" and not who and not large):
            return self.refuse(404 if who else 401, "RepoNotFound", "Repository not found")
        commits = {commit(files): files for files in REPOS[repo].values()}
        files = REPOS[repo].get(revision) or commits.get(revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if listing == "revision":
            return self.send(js(id=repo, sha=commit(files), siblings=[{"rfilename": name} for name in files]))
        if listing == "tree":
            return self.send(json.dumps([self.entry(name, data) for name, data in files.items()]).encode())
        if repo.startswith("lab/gated"):
            return self.refuse(403 if who else 401, "GatedRepo", f"Access to model {repo} is restricted.")
        if file not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit(files))
        tag, size = etag(file, files[file]), str(len(files[file]))
        if len(tag) == 64 and not large:                            # large files lie on another host
            there = f"{self.server.hub.storage}/large/{repo}/resolve/{commit(files)}/{file}"
            return self.send(b"", 302, Location=there, X_Linked_Etag=f'"{tag}"', X_Linked_Size=size,
                             X_Repo_Commit=commit(files))
        if (repo, file) in self.server.hub.broken and self.command == "GET":
            if (repo, file) in self.server.hub.halved:              # it closed halfway before; now it does not answer
                return self.refuse(503, "", "out of order")
            self.server.hub.halved.append((repo, file))
            return self.send(files[file], sent=len(files[file]) // 2)
        self.send(files[file], ETag=f'"{tag}"', X_Repo_Commit=commit(files))

    def entry(self, name, data):
        tag, plain = etag(name, data), {"type": "file", "path": name, "size": len(data)}
        if len(tag) == 40:
            return plain | {"oid": tag}
        return plain | {"oid": tag[:40], "lfs": {"oid": tag, "size": len(data), "pointerSize": 130}}

    def refuse(self, status, code, message, **headers):
        self.send(js(error=message), status, X_Error_Code=code, X_Error_Message=message, **headers)

    def send(self, body, status=200, sent=None, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])

    def log_message(self, *args):
        pass


class Hub:
    """Two servers, since the hub sends a reader of a large file to another host, which must not see the token."""

    def __init__(self):
        self.log, self.broken, self.halved = [], set(), []
        self.servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
        for server in self.servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def asked(self, repo):
        return [(how, path, who) for how, path, who in self.log if f"/{repo}/" in f"{path}/"]

    def fetched(self, repo):
        """Names of the files whose bytes were asked for."""
        paths = [path for how, path, _ in self.asked(repo) if how == "GET" and "/resolve/" in path]
        return sorted({path.split("/resolve/")[1].split("/", 1)[1] for path in paths})


def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


# ---------------------------------------------------------------------------------------------------- asking it

ASK = """
import dataclasses, json, os, sys, time
import llava_min
answers = {}
for label, call in json.loads(sys.argv[1]).items():
    os.environ["HF_TOKEN"] = call.pop("token", "")                  # the one setting that is read at every request
    start = time.time()
    try:
        answers[label] = dataclasses.asdict(llava_min.resolve(**call))
    except Exception as e:
        answers[label] = {"error": str(e), "kind": type(e).__name__}
    answers[label]["seconds"] = time.time() - start
print(json.dumps(answers, default=str))
"""


class Answer(SimpleNamespace):
    """A resolved Files, or the error instead; asking one for what only the other has fails with what it is."""

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        raise AssertionError(f"no {name} in {self}")

    def names(self):
        return sorted(Path(file).name for file in [self.config, self.tokenizer, self.generation, *self.weights] if file)


def python(home, endpoint, *arguments, **more):
    """A fresh Python with nothing of the caller's own settings. SYSTEMROOT is what sockets need on Windows."""
    settings = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    settings |= {"HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HOME": str(home), "HF_ENDPOINT": endpoint, **more}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=settings,
                          capture_output=True, text=True, timeout=60)


def ask(home, endpoint, calls, first="", **more):
    """{label: arguments of resolve} -> .label: Answer, all resolved in one fresh Python."""
    run = python(home, endpoint, "-c", first + ASK, json.dumps(calls), **more)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout, object_hook=lambda d: Answer(**d))


def one_line(answer, *words):
    """An error a user can read: ValueError, one line, with these words."""
    assert answer.kind == "ValueError", answer
    assert "\n" not in answer.error and len(answer.error) < 1000, answer.error
    for word in words:
        assert re.search(word, answer.error), f"{word!r} not in {answer.error!r}"


OLD, NEW = (commit(REPOS["lab/llava"][branch]) for branch in ("v1", "main"))
REPEATED = {"main": {"name": "lab/llava"}, "tag": {"name": "lab/llava", "revision": "v1"},
            "pinned": {"name": "lab/llava", "revision": OLD}, "bins": {"name": "lab/bins"},
            "inside": {"name": "lab/inside"},
            "override": {"name": "lab/moved", "vision_tower": "lab/clip-new"}}


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    """Everything that is asked of a working hub; it is shut down before the first test looks."""
    home = tmp_path_factory.mktemp("online")
    warm = commit(REPOS["lab/clip-warm"]["main"])                   # transformers' AutoConfig fetches just the config
    for file, text in ((f"snapshots/{warm}/config.json", js(hidden_size=1024).decode()), ("refs/main", warm)):
        file = home / "hub" / "models--lab--clip-warm" / file
        file.parent.mkdir(parents=True)
        file.write_text(text)
    with Hub() as hub:
        answers = ask(home, hub.endpoint, {
            **{label: {**call, "token": TOKEN} for label, call in REPEATED.items()},
            "partial": {"name": "lab/partial"},
            "hidden": {"name": "lab/private"}, "private": {"name": "lab/private", "token": TOKEN},
            "absent": {"name": "lab/absent"}, "absent_known": {"name": "lab/absent", "token": TOKEN},
            "unknown": {"name": "lab/llava", "revision": "v9"}, "stranger": {"name": "lab/gated"},
            "refused": {"name": "lab/gated", "token": TOKEN}, "single": {"name": "lab/gated-single"},
            "wrong_token": {"name": "lab/partial", "revision": "v1", "token": "hf_expired"},
            "weightless": {"name": "lab/weightless"}, "moved": {"name": "lab/moved"},
            "warm": {"name": "lab/bins", "vision_tower": "lab/clip-warm"},
            "no_tower": {"name": "lab/bins", "vision_tower": "lab/absent"}})
    return Answer(hub=hub, home=home, **vars(answers))


@pytest.fixture(scope="module")
def offline(online):
    """The same questions with HF_HUB_OFFLINE=1 and no server, and three that the cache cannot answer."""
    Path(online.partial.weights[1]).unlink()
    calls = {**REPEATED, "partial": {"name": "lab/partial"}, "never": {"name": "llava-1.5-13b"},
             "unseen": {"name": "lab/llava", "revision": "v9"}}
    return ask(online.home, closed_port(), calls, HF_HUB_OFFLINE="1")


# ---------------------------------------------------------------------------------------------------- what is fetched

def test_only_the_needed_files_are_fetched(online):
    needed = sorted(set(hf_layout()))
    assert online.main.names() == [n for n in needed if "index" not in n]
    assert online.hub.fetched("lab/llava") == needed
    cached = [f.relative_to(online.home).parts[4:] for f in online.home.glob("hub/models--lab--llava/snapshots/*/**/*")]
    assert sorted(cached) == sorted((name,) for name in needed * 2)         # two commits, nothing in a folder below


def test_the_files_are_the_hubs_bytes(online):
    files = REPOS["lab/llava"]["main"]
    for path in [online.main.config, online.main.tokenizer, online.main.generation, *online.main.weights]:
        assert Path(path).read_bytes() == files[Path(path).name]


def test_the_endpoint_is_honoured_and_the_token_sent_there_but_not_to_the_storage_host(online):
    asked = online.hub.asked("lab/private")
    assert [who for _, _, who in asked][0] is None                  # the call without a token, which was refused
    assert {who for _, path, who in asked[1:] if not path.startswith("/large")} == {f"Bearer {TOKEN}"}
    assert {who for _, path, who in asked if path.startswith("/large")} == {None}
    assert online.private.names() == online.main.names()


def test_what_the_cache_has_is_not_asked_for_again(online):
    """The tag brought all files of its commit, so the call that names the commit makes no request."""
    gets = [path for how, path, _ in online.hub.asked("lab/llava") if how == "GET"]
    assert "/api/models/lab/llava/revision/v1" in gets and f"/api/models/lab/llava/revision/{OLD}" not in gets
    files = [path for path in gets if "/resolve/" in path]
    assert len(files) == len(set(files))


def test_a_repository_of_bin_shards_works(online):
    assert [Path(file).name for file in online.bins.weights] == sorted(set(BINS) - {"pytorch_model.bin.index.json"})
    assert Path(online.bins.tokenizer).name == "tokenizer.model"


# ---------------------------------------------------------------------------------------------------- revisions

def test_a_revision_pins_the_content(online):
    def seen(answer):
        texts = [Path(file).read_text() for file in (answer.config, answer.tokenizer)]
        return answer.revision, *(json.loads(text)["fill"] for text in texts)
    assert seen(online.main) == (NEW, 0, 0)
    assert seen(online.tag) == seen(online.pinned) == (OLD, 1, 1)
    assert online.pinned.weights == online.tag.weights != online.main.weights


def test_the_commit_is_read_right_in_a_cache_below_a_folder_called_snapshots(online, tmp_path):
    shutil.copytree(online.home, tmp_path / "snapshots" / "home", symlinks=True)
    answer = ask(tmp_path / "snapshots" / "home", closed_port(), {"main": REPEATED["main"]}, HF_HUB_OFFLINE="1").main
    assert answer.revision == NEW


# ---------------------------------------------------------------------------------------------------- vision towers

def test_an_original_checkpoint_brings_the_tower_its_config_names(online):
    assert online.bins.tower.origin == "lab/clip"
    assert online.bins.tower.revision == commit(REPOS["lab/clip"]["main"])
    assert [Path(file).name for file in online.bins.tower.weights] == ["pytorch_model.bin"]


def test_a_towers_repository_gives_its_config_and_weights_and_nothing_else(online):
    assert online.hub.fetched("lab/clip") == ["config.json", "pytorch_model.bin"]


def test_a_towers_weights_are_not_fetched_when_the_checkpoint_has_them(online):
    assert online.inside.tower.weights == [] and Path(online.inside.tower.config).name == "config.json"
    assert online.hub.fetched("lab/clip-config") == ["config.json"]


def test_the_vision_tower_flag_overrides_the_config(online):
    one_line(online.moved, "vision tower of lab/moved", "/elsewhere/clip", "--vision-tower")
    assert online.override.tower.origin == "lab/clip-new" and len(online.override.tower.weights) == 1


def test_a_tower_whose_config_alone_is_cached_still_gets_its_weights(online):
    assert [Path(file).name for file in online.warm.tower.weights] == ["pytorch_model.bin"]


# ---------------------------------------------------------------------------------------------------- what goes wrong

def test_an_unknown_revision_is_one_line_that_says_what_to_do(online):
    one_line(online.unknown, "lab/llava", "v9", "branch|tag|--revision")


def test_a_gated_repository_is_one_line_that_says_what_to_do(online):
    for answer in (online.stranger, online.refused, online.single):
        one_line(answer, "lab/gated", "gated", "licence", "HF_TOKEN")


def test_an_absent_or_hidden_repository_is_one_line_that_says_what_to_do(online):
    for answer in (online.absent, online.absent_known):
        one_line(answer, "lab/absent", "on the hub", "HF_TOKEN")
    one_line(online.hidden, "lab/private", "private", "HF_TOKEN")


def test_an_absent_tower_names_the_flag_that_helps(online):
    one_line(online.no_tower, "vision tower of lab/bins", "lab/absent", "on the hub", "--vision-tower")


def test_a_repository_without_weights_says_what_it_lacks(online):
    one_line(online.weightless, "lab/weightless", "no model.safetensors")


def test_a_wrong_token_is_called_wrong(online):
    one_line(online.wrong_token, "lab/partial", "Invalid credentials|HF_TOKEN")


@pytest.mark.parametrize("name", ["~nobody-of-that-name/llava", "llava", "./llava", "lab/llava/main"])
def test_a_name_that_can_be_nothing_is_refused_in_one_line_without_asking_a_hub(name):
    with pytest.raises(ValueError, match="^[^\n]* is neither a folder, a hub id .owner/name., nor one of [^\n]*$") as e:
        llava_min.resolve(name)
    assert str(e.value).startswith(name)


def test_without_huggingface_hub_a_folder_works_and_a_hub_id_says_what_to_install(tmp_path):
    write(tmp_path / "llava", hf_layout())
    calls = {"folder": {"name": str(tmp_path / "llava")}, "hub": {"name": "llava-1.5-7b"}}
    answers = ask(tmp_path, closed_port(), calls, first="import sys\nsys.modules['huggingface_hub'] = None\n")
    assert len(answers.folder.weights) == 2
    one_line(answers.hub, "llava-1.5-7b", "pip install huggingface_hub", "folder")


def test_a_download_cut_halfway_is_an_error_and_the_next_call_completes_it(tmp_path):
    calls = {"model": {"name": "lab/partial"}, "tower": {"name": "lab/bins"},
             "tower_shards": {"name": "lab/moved", "vision_tower": "lab/clip-sharded"}}
    with Hub() as hub:
        hub.broken = {("lab/partial", SHARD_2), ("lab/clip", "pytorch_model.bin"),
                      ("lab/clip-sharded", "pytorch_model-00002-of-00002.bin")}
        cut = ask(tmp_path, hub.endpoint, calls)
        assert sorted(hub.halved) == sorted(hub.broken)             # each of them did lose its second half
        hub.broken, before = set(), len(hub.log)
        done = ask(tmp_path, hub.endpoint, calls)
        again = [path for how, path, _ in hub.log[before:] if how == "GET"]
    one_line(cut.model, "lab/partial", SHARD_2)
    one_line(cut.tower, "vision tower of lab/bins", "lab/clip", "pytorch_model.bin|model.safetensors")
    one_line(cut.tower_shards, "vision tower of lab/moved", "pytorch_model-00002-of-00002.bin")
    assert SHARD_1 not in cut.model.error and "config.json" not in cut.model.error     # they did arrive
    assert [Path(file).name for file in done.model.weights] == [SHARD_1, SHARD_2]
    for file in done.model.weights:
        assert Path(file).read_bytes() == REPOS["lab/partial"]["main"][Path(file).name]
    assert not any(path.endswith(SHARD_1) for path in again)        # what did arrive is not fetched twice
    assert len(done.tower.tower.weights) == 1 and len(done.tower_shards.tower.weights) == 2


# ---------------------------------------------------------------------------------------------------- folders

def write(folder, files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


def test_a_folder_that_lacks_a_shard_names_exactly_it(tmp_path):
    files = {name: data for name, data in hf_layout().items() if name != SHARD_2}
    with pytest.raises(ValueError, match=f"lacks {SHARD_2}$"):
        llava_min.resolve(write(tmp_path / "llava", files))


def test_a_towers_folder_that_lacks_a_shard_names_it(tmp_path):
    model = write(tmp_path / "llava", original_layout(str(tmp_path / "clip"), BINS))
    write(tmp_path / "clip", {"config.json": js(), **BINS})
    assert len(llava_min.resolve(model).tower.weights) == 2
    (tmp_path / "clip" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match="vision tower of .* lacks pytorch_model-00002-of-00002.bin"):
        llava_min.resolve(model)


def test_a_towers_folder_needs_no_weights_when_the_checkpoint_has_them(tmp_path):
    model = write(tmp_path / "llava", original_layout("/elsewhere/clip", INSIDE))
    files = llava_min.resolve(model, vision_tower=write(tmp_path / "clip", {"config.json": js()}))
    assert files.tower.weights == [] and files.tower.config == tmp_path / "clip" / "config.json"


def test_a_revision_of_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="v1.*folder"):
        llava_min.resolve(write(tmp_path / "llava", hf_layout()), revision="v1")


# ---------------------------------------------------------------------------------------------------- without a network

def test_offline_the_cache_gives_the_same_files_and_commits(online, offline):
    for label in REPEATED:
        first, second = ({**vars(getattr(answers, label)), "seconds": 0} for answers in (online, offline))
        assert first == second and first["revision"]


def test_a_full_cache_needs_no_network_and_no_flag(online, tmp_path):
    answers = ask(online.home, closed_port(), REPEATED)
    for label in REPEATED:
        assert getattr(answers, label).weights == getattr(online, label).weights
        assert getattr(answers, label).seconds < 5


def test_offline_a_partly_filled_cache_names_exactly_the_missing_shard(offline):
    one_line(offline.partial, f"^lab/partial: {SHARD_2} of lab/partial not in the cache", "hf download lab/partial",
             "HF_HUB_OFFLINE")


def test_offline_an_empty_cache_names_the_files_the_repository_and_the_way_out(offline):
    one_line(offline.never, "llava-1.5-13b", r"config\.json", r"tokenizer\.json", r"model\.safetensors",
             "hf download llava-hf/llava-1.5-13b-hf", "HF_HUB_OFFLINE")


def test_offline_a_revision_that_is_not_cached_is_named_with_the_way_to_fetch_it(offline):
    one_line(offline.unseen, "hf download lab/llava --revision v9")


# ---------------------------------------------------------------------------------------------------- the weights' hash

def files_of(answer, place=Path):
    """What weights_hash reads of an answer, each file at place(its path in the cache)."""
    def here(files):
        return [place(file) for file in files]
    tower = answer.tower and llava_min.Files("", "", weights=here(answer.tower.weights))
    return llava_min.Files("", "", weights=here(answer.weights), tower=tower)


def plain(answer, folder):
    """The same weights as ordinary files in a folder."""
    folder.mkdir()

    def copy(file):
        return Path(shutil.copy(file, folder / f"{Path(file).parent.name}-{Path(file).name}"))
    return files_of(answer, copy)


def test_the_hash_of_cached_weights_equals_that_of_the_same_files_in_a_folder(online, tmp_path):
    want = llava_min.weights_hash(plain(online.bins, tmp_path / "plain"))
    assert llava_min.weights_hash(files_of(online.bins)) == want
    assert llava_min.weights_hash(files_of(online.main)) != llava_min.weights_hash(files_of(online.tag))


def test_the_hash_of_cached_weights_reads_none_of_them(online, tmp_path, monkeypatch):
    want = llava_min.weights_hash(plain(online.bins, tmp_path / "plain"))
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("a cached weight file was opened"))
    assert llava_min.weights_hash(files_of(online.bins)) == want


def test_the_hash_is_the_same_where_repositories_share_blobs(online, tmp_path):
    """huggingface_hub 2 keeps a file once for all repositories, named by its Xet hash; the sha256 is a link to it."""
    want = llava_min.weights_hash(files_of(online.tag))
    home = tmp_path / "home"
    shutil.copytree(online.home, home, symlinks=True)
    files = files_of(online.tag, lambda file: home / Path(file).relative_to(online.home))
    for file in files.weights:
        blob = file.parent / file.readlink()
        shared = home / "hub" / "blobs" / "ab" / ("ab" + hashlib.blake2s(blob.read_bytes()).hexdigest()[2:])
        shared.parent.mkdir(parents=True, exist_ok=True)
        os.replace(os.path.realpath(blob), shared)
        os.symlink(os.path.relpath(shared, os.path.realpath(blob.parent)), blob)
        assert file.read_bytes() == REPOS["lab/llava"]["v1"][file.name]
    assert llava_min.weights_hash(files) == want


# ---------------------------------------------------------------------------------------------------- the command line

@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_command_line_without_a_network_ends_in_one_line_within_seconds(photo, tmp_path):
    start = time.time()
    run = python(tmp_path / "home", closed_port(), "llava_min.py", "--model", "llava-1.5-7b", "--image", photo,
                 "--question", "Is it red?")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1 and run.stderr.endswith("\n"), run.stderr
    for word in ("config.json", "tokenizer.json", "model.safetensors", "hf download llava-hf/llava-1.5-7b-hf"):
        assert word in run.stderr
    assert time.time() - start < 20


def test_the_command_line_ends_in_one_line_when_the_hub_refuses(photo, tmp_path):
    with Hub() as hub:
        run = python(tmp_path / "home", hub.endpoint, "llava_min.py", "--model", "lab/gated", "--image", photo,
                     "--question", "Is it red?")
    assert run.returncode == 2 and run.stdout == ""
    assert re.fullmatch(r"error: lab/gated is gated: [^\n]*\n", run.stderr), run.stderr
