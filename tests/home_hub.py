"""
home_hub.py - a small Hugging Face hub on 127.0.0.1: tests ask it what they may not ask the real one.

Run     a test imports it:  with Hub() as hub: answers = ask(home, hub.endpoint, {"main": {"name": "lab/llava"}})

It serves REPOS, over the part of the hub's HTTP interface that huggingface_hub uses, and keeps a log of the requests.
huggingface_hub reads HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE once, at its import. Each setting is therefore a fresh
Python, in which `ask` resolves a batch of names.
"""
import hashlib
import http.server
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import numpy as np
import safetensors.numpy
import torch

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------------- what it holds

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


# ---------------------------------------------------------------------------------------------------- how it answers

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
from harness import hub
answers = {}
for label, call in json.loads(sys.argv[1]).items():
    os.environ["HF_TOKEN"] = call.pop("token", "")                  # the one setting that is read at every request
    start = time.time()
    try:
        answers[label] = dataclasses.asdict(hub.resolve(**call))
    except Exception as e:
        answers[label] = {"error": str(e), "kind": type(e).__name__}
    answers[label]["seconds"] = time.time() - start
print(json.dumps(answers, default=str))
"""


class Answer(SimpleNamespace):
    """A resolved Checkpoint, or the error in its place. An attribute it does not have fails and shows all of it."""

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        raise AssertionError(f"no {name} in {self}")

    def names(self):
        f = self.files
        return sorted(Path(file).name for file in (f.config, f.tokenizer, f.generation, *f.weights) if file)


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
