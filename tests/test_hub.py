"""python -m pytest tests/test_hub.py

What harness/hub.py asks of a hub, what it leaves in the cache, and what it says when something is not there. The hub is
home_hub.py's, on this machine; nothing goes out to the network.
"""
import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from commands import refused
from home_hub import (
    BINS,
    INSIDE,
    REPOS,
    SHARD_1,
    SHARD_2,
    TOKEN,
    Answer,
    Hub,
    ask,
    closed_port,
    commit,
    hf_layout,
    js,
    one_line,
    original_layout,
    python,
)

from harness.hub import main, resolve, weights_hash
from llava_min import Files

pytest.importorskip("huggingface_hub")
slow = pytest.mark.slow                                             # a hub and fresh Pythons, seconds each

OLD, NEW = (commit(REPOS["lab/llava"][branch]) for branch in ("v1", "main"))
REPEATED = {"main": {"name": "lab/llava"}, "tag": {"name": "lab/llava", "revision": "v1"},
            "pinned": {"name": "lab/llava", "revision": OLD}, "bins": {"name": "lab/bins"},
            "inside": {"name": "lab/inside"},
            "override": {"name": "lab/moved", "vision_tower": "lab/clip-new"}}


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    """Everything that is asked of a working hub; it is shut down before the first test."""
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
    Path(online.partial.files.weights[1]).unlink()
    calls = {**REPEATED, "partial": {"name": "lab/partial"}, "never": {"name": "llava-1.5-13b"},
             "unseen": {"name": "lab/llava", "revision": "v9"}}
    return ask(online.home, closed_port(), calls, HF_HUB_OFFLINE="1")


# ---------------------------------------------------------------------------------------------------- what is fetched

@slow
def test_only_the_needed_files_are_fetched(online):
    needed = sorted(set(hf_layout()))
    assert online.main.names() == [n for n in needed if "index" not in n]
    assert online.hub.fetched("lab/llava") == needed
    cached = [f.relative_to(online.home).parts[4:] for f in online.home.glob("hub/models--lab--llava/snapshots/*/**/*")]
    assert sorted(cached) == sorted((name,) for name in needed * 2)         # two commits, nothing in a folder below


@slow
def test_the_files_are_the_hubs_bytes(online):
    held, files = REPOS["lab/llava"]["main"], online.main.files
    for path in [files.config, files.tokenizer, files.generation, *files.weights]:
        assert Path(path).read_bytes() == held[Path(path).name]


@slow
def test_the_endpoint_is_honoured_and_the_token_sent_there_but_not_to_the_storage_host(online):
    asked = online.hub.asked("lab/private")
    assert [who for _, _, who in asked][0] is None                  # the call without a token, which was refused
    assert {who for _, path, who in asked[1:] if not path.startswith("/large")} == {f"Bearer {TOKEN}"}
    assert {who for _, path, who in asked if path.startswith("/large")} == {None}
    assert online.private.names() == online.main.names()


@slow
def test_what_the_cache_has_is_not_asked_for_again(online):
    """The tag brought all files of its commit, so the call that names the commit makes no request."""
    gets = [path for how, path, _ in online.hub.asked("lab/llava") if how == "GET"]
    assert "/api/models/lab/llava/revision/v1" in gets and f"/api/models/lab/llava/revision/{OLD}" not in gets
    files = [path for path in gets if "/resolve/" in path]
    assert len(files) == len(set(files))


@slow
def test_a_repository_of_bin_shards_works(online):
    files = online.bins.files
    assert [Path(file).name for file in files.weights] == sorted(set(BINS) - {"pytorch_model.bin.index.json"})
    assert Path(files.tokenizer).name == "tokenizer.model"


# ---------------------------------------------------------------------------------------------------- revisions

@slow
def test_a_revision_pins_the_content(online):
    def content(answer):
        texts = [Path(file).read_text() for file in (answer.files.config, answer.files.tokenizer)]
        return answer.revision, *(json.loads(text)["fill"] for text in texts)
    assert content(online.main) == (NEW, 0, 0)
    assert content(online.tag) == content(online.pinned) == (OLD, 1, 1)
    assert online.pinned.files.weights == online.tag.files.weights != online.main.files.weights


@slow
def test_the_commit_is_read_right_in_a_cache_below_a_folder_called_snapshots(online, tmp_path):
    shutil.copytree(online.home, tmp_path / "snapshots" / "home", symlinks=True)
    answer = ask(tmp_path / "snapshots" / "home", closed_port(), {"main": REPEATED["main"]}, HF_HUB_OFFLINE="1").main
    assert answer.revision == NEW


# ---------------------------------------------------------------------------------------------------- vision towers

@slow
def test_an_original_checkpoint_brings_the_tower_its_config_names(online):
    assert online.bins.tower.origin == "lab/clip"
    assert online.bins.tower.revision == commit(REPOS["lab/clip"]["main"])
    assert [Path(file).name for file in online.bins.tower.files.weights] == ["pytorch_model.bin"]
    assert online.bins.files.tower == online.bins.tower.files       # what is loaded is what was fetched


@slow
def test_a_towers_repository_gives_its_config_and_weights_and_nothing_else(online):
    assert online.hub.fetched("lab/clip") == ["config.json", "pytorch_model.bin"]


@slow
def test_a_towers_weights_are_not_fetched_when_the_checkpoint_has_them(online):
    tower = online.inside.tower.files
    assert tower.weights == [] and Path(tower.config).name == "config.json" and online.inside.files.tower == tower
    assert online.hub.fetched("lab/clip-config") == ["config.json"]


@slow
def test_the_vision_tower_flag_overrides_the_config(online):
    one_line(online.moved, "vision tower of lab/moved", "/elsewhere/clip", "--vision-tower")
    assert online.override.tower.origin == "lab/clip-new" and len(online.override.files.tower.weights) == 1


@slow
def test_a_tower_whose_config_alone_is_cached_still_gets_its_weights(online):
    assert [Path(file).name for file in online.warm.files.tower.weights] == ["pytorch_model.bin"]


# ---------------------------------------------------------------------------------------------------- what goes wrong

@slow
def test_an_unknown_revision_is_one_line_that_says_what_to_do(online):
    one_line(online.unknown, "lab/llava", "v9", "branch|tag|--revision")


@slow
def test_a_gated_repository_is_one_line_that_says_what_to_do(online):
    for answer in (online.stranger, online.refused, online.single):
        one_line(answer, "lab/gated", "gated", "licence", "HF_TOKEN")


@slow
def test_an_absent_or_hidden_repository_is_one_line_that_says_what_to_do(online):
    for answer in (online.absent, online.absent_known):
        one_line(answer, "lab/absent", "on the hub", "HF_TOKEN")
    one_line(online.hidden, "lab/private", "private", "HF_TOKEN")


@slow
def test_an_absent_tower_names_the_flag_that_helps(online):
    one_line(online.no_tower, "vision tower of lab/bins", "lab/absent", "on the hub", "--vision-tower")


@slow
def test_a_repository_without_weights_says_what_it_lacks(online):
    one_line(online.weightless, "lab/weightless", "no model.safetensors")


@slow
def test_a_wrong_token_is_called_wrong(online):
    one_line(online.wrong_token, "lab/partial", "Invalid credentials|HF_TOKEN")


@pytest.mark.parametrize("name", ["~nobody-of-that-name/llava", "llava", "./llava", "lab/llava/main"])
def test_a_name_that_is_no_folder_and_no_hub_id_is_refused_in_one_line_without_asking_a_hub(name):
    with pytest.raises(ValueError, match="^[^\n]* is neither a folder, a hub id .owner/name., nor one of [^\n]*$") as e:
        resolve(name)
    assert str(e.value).startswith(name)


@slow
def test_without_huggingface_hub_a_folder_works_and_a_hub_id_says_what_to_install(tmp_path):
    write(tmp_path / "llava", hf_layout())
    calls = {"folder": {"name": str(tmp_path / "llava")}, "hub": {"name": "llava-1.5-7b"}}
    answers = ask(tmp_path, closed_port(), calls, first="import sys\nsys.modules['huggingface_hub'] = None\n")
    assert len(answers.folder.files.weights) == 2
    one_line(answers.hub, "llava-1.5-7b", "pip install huggingface_hub", "folder")


@slow
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
    assert [Path(file).name for file in done.model.files.weights] == [SHARD_1, SHARD_2]
    for file in done.model.files.weights:
        assert Path(file).read_bytes() == REPOS["lab/partial"]["main"][Path(file).name]
    assert not any(path.endswith(SHARD_1) for path in again)        # what did arrive is not fetched twice
    assert len(done.tower.files.tower.weights) == 1 and len(done.tower_shards.files.tower.weights) == 2


# ---------------------------------------------------------------------------------------------------- folders

def write(folder, files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


def test_a_folder_that_lacks_a_shard_names_exactly_it(tmp_path):
    files = {name: data for name, data in hf_layout().items() if name != SHARD_2}
    with pytest.raises(ValueError, match=f"lacks {SHARD_2}$"):
        resolve(write(tmp_path / "llava", files))


def test_a_towers_folder_that_lacks_a_shard_names_it(tmp_path):
    model = write(tmp_path / "llava", original_layout(str(tmp_path / "clip"), BINS))
    write(tmp_path / "clip", {"config.json": js(), **BINS})
    assert len(resolve(model).files.tower.weights) == 2
    (tmp_path / "clip" / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match="vision tower of .* lacks pytorch_model-00002-of-00002.bin"):
        resolve(model)


def test_a_towers_folder_needs_no_weights_when_the_checkpoint_has_them(tmp_path):
    model = write(tmp_path / "llava", original_layout("/elsewhere/clip", INSIDE))
    tower = resolve(model, vision_tower=write(tmp_path / "clip", {"config.json": js()})).files.tower
    assert tower.weights == () and tower.config == tmp_path / "clip" / "config.json"


def test_a_revision_of_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="v1.*folder"):
        resolve(write(tmp_path / "llava", hf_layout()), revision="v1")


# ---------------------------------------------------------------------------------------------------- without a network

@slow
def test_offline_the_cache_gives_the_same_files_and_commits(online, offline):
    for label in REPEATED:
        first, second = ({**vars(getattr(answers, label)), "seconds": 0} for answers in (online, offline))
        assert first == second and first["revision"]


@slow
def test_a_full_cache_needs_no_network_and_no_flag(online, tmp_path):
    answers = ask(online.home, closed_port(), REPEATED)
    for label in REPEATED:
        assert getattr(answers, label).files == getattr(online, label).files
        assert getattr(answers, label).seconds < 5


@slow
def test_offline_a_partly_filled_cache_names_exactly_the_missing_shard(offline):
    one_line(offline.partial, f"^lab/partial: {SHARD_2} of lab/partial not in the cache", "hf download lab/partial",
             "HF_HUB_OFFLINE")


@slow
def test_offline_an_empty_cache_names_the_files_the_repository_and_the_way_out(offline):
    one_line(offline.never, "llava-1.5-13b", r"config\.json", r"tokenizer\.json", r"model\.safetensors",
             "hf download llava-hf/llava-1.5-13b-hf", "HF_HUB_OFFLINE")


@slow
def test_offline_a_revision_that_is_not_cached_is_named_with_the_way_to_fetch_it(offline):
    one_line(offline.unseen, "hf download lab/llava --revision v9")


# ---------------------------------------------------------------------------------------------------- the weights' hash

def files_of(answer, place=Path):
    """What weights_hash reads of an answer, each file at place(its path in the cache)."""
    def here(files):
        return Files(weights=tuple(map(place, files.weights)), tower=files.tower and here(files.tower))
    return here(answer.files)


def plain(answer, folder):
    """The same weights as ordinary files in a folder."""
    folder.mkdir()

    def copy(file):
        return Path(shutil.copy(file, folder / f"{Path(file).parent.name}-{Path(file).name}"))
    return files_of(answer, copy)


@slow
def test_the_hash_of_cached_weights_equals_that_of_the_same_files_in_a_folder(online, tmp_path):
    want = weights_hash(plain(online.bins, tmp_path / "plain"))
    assert weights_hash(files_of(online.bins)) == want
    assert weights_hash(files_of(online.main)) != weights_hash(files_of(online.tag))
    assert weights_hash(replace(files_of(online.bins), tower=None)) != want            # the tower's are part of it


@slow
def test_the_hash_of_cached_weights_reads_none_of_them(online, tmp_path, monkeypatch):
    want = weights_hash(plain(online.bins, tmp_path / "plain"))
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("a cached weight file was opened"))
    assert weights_hash(files_of(online.bins)) == want


@slow
def test_the_hash_is_the_same_where_repositories_share_blobs(online, tmp_path):
    """huggingface_hub 2 keeps a file once for all repositories, named by its Xet hash; the sha256 is a link to it."""
    want = weights_hash(files_of(online.tag))
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
    assert weights_hash(files) == want


# ---------------------------------------------------------------------------------------------------- command lines

@slow
def test_an_instrument_without_a_network_ends_in_one_line_within_seconds(photo, tmp_path):
    start = time.time()
    run = python(tmp_path / "home", closed_port(), "knockout.py", "--model", "llava-1.5-7b", "--image", photo,
                 "--question", "Is it red?", "--out", tmp_path / "out")
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1 and run.stderr.endswith("\n"), run.stderr
    for word in ("config.json", "tokenizer.json", "model.safetensors", "hf download llava-hf/llava-1.5-7b-hf"):
        assert word in run.stderr
    assert time.time() - start < 20


@slow
def test_an_instrument_ends_in_one_line_when_the_hub_refuses(photo, tmp_path):
    with Hub() as hub:
        run = python(tmp_path / "home", hub.endpoint, "lens.py", "--model", "lab/gated", "--image", photo,
                     "--question", "Is it red?", "--out", tmp_path / "out")
    assert run.returncode == 2 and run.stdout == ""
    assert re.fullmatch(r"error: lab/gated is gated: [^\n]*\n", run.stderr), run.stderr


@slow
def test_the_hubs_own_command_fetches_a_model_and_prints_its_folders(tmp_path):
    command = "-m", "harness.hub", "lab/moved", "--vision-tower", "lab/clip-new"
    with Hub() as hub:
        run = python(tmp_path, hub.endpoint, *command)
    assert run.returncode == 0, run.stderr
    model, tower = (tmp_path / "hub" / f"models--lab--{name}" / "snapshots" / commit(REPOS[f"lab/{name}"]["main"])
                    for name in ("moved", "clip-new"))
    assert run.stdout == f"{model} --vision-tower {tower}\n"
    files = resolve(str(model), vision_tower=str(tower)).files      # they are folders that the flags take
    assert (len(files.weights), len(files.tower.weights)) == (2, 1)


@slow
def test_the_hubs_own_command_without_a_network_ends_in_one_line(tmp_path):
    run = python(tmp_path, closed_port(), "-m", "harness.hub", "llava-1.5-7b")
    assert run.returncode == 2 and run.stdout == ""
    assert re.fullmatch(r"error: llava-1\.5-7b: [^\n]*hf download llava-hf/llava-1\.5-7b-hf[^\n]*\n", run.stderr)


@pytest.mark.parametrize("argv, words", [
    ([], "required"), (["llava"], "nor one of llava-tiny"), (["llava-tiny", "--revision", "v1"], "only the hub keeps")])
def test_a_name_that_the_hubs_own_command_cannot_fetch_is_refused_in_one_line(call, argv, words):
    refused(call(main, *argv), words)
