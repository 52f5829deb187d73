"""python -m pytest tests/test_loading.py

One set of weights in every layout, spelling and file format must come out bit for bit the same; a checkpoint that does
not fit, or is damaged, must end in a sentence that names what is wrong; and loading must not need more memory than the
model and one tensor.
"""
import io
import json
import os
import pickle
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import world
from safetensors.torch import load_file, save_file

import clip_vit
import llama3
import vicuna
from harness import hub
from llava_min import load

ROOT = Path(__file__).resolve().parent.parent
WITH_IMAGE = [kind for kind, k in world.KINDS.items() if k.image]


def ours(name):
    """A name of the original layout -> our model's parameter name."""
    name = name.replace("model.vision_tower.vision_tower.vision_model.", "vision_tower.")
    name = re.sub(r"^model\.(mm_projector\.|image_newline)", r"\1", name)
    name = re.sub(r"^(model\.|(?=lm_head))(?!mm_|image)", "decoder.", name)
    return re.sub(r"^(decoder\.layers\.\d\.)(self_attn|mlp)\.", r"\1", name)


def assert_holds(model, kind):
    want = {ours(name): tensor for name, tensor in world.weights(kind).items() if "post_layernorm" not in name
            or ".layers." in name}
    got = dict(model.named_parameters())
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor.float(), want[name]), name
    assert not any(p.requires_grad for p in got.values()) and not model.training


# ------------------------------------------------------------------------------------------------- what must be equal

@pytest.mark.parametrize("kind, layout, pack", [
    pytest.param(kind, layout, pack, marks=[pytest.mark.slow] * (pack != "one"))
    for kind, k in world.KINDS.items() for layout in world.LAYOUTS
    if k.image or layout == "original" for pack in ("one", "sharded", "bin", "bin-sharded")
    if layout in ("original", "hf") or pack == "one"])
def test_every_layout_and_file_format_gives_the_same_parameters_and_config(kind, layout, pack, tmp_path, model):
    loaded = load(world.write(tmp_path, kind, layout, pack))
    assert_holds(loaded, kind)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    reference = model(kind).config
    unused = {} if reference.aspect == "anyres" else {"pinpoints": loaded.config.pinpoints}
    assert loaded.config == replace(reference, **unused)
    assert loaded.decoder.lm_head.weight.shape[0] == world.vocab_size(kind)
    question = "Is the cup on the table red or blue?"
    image = world.picture(90, 60) if loaded.config.vision else None
    assert loaded.prompt(question, image).ids == model(kind).prompt(question, image).ids


@pytest.mark.parametrize("kind", world.KINDS)
def test_a_config_holds_the_numbers_of_the_checkpoint(kind, model):
    k, c = world.KINDS[kind], model(kind).config
    file = llama3 if k.llama3 else vicuna
    assert c.text == file.Config(world.vocab_size(kind), k.width, k.layers, k.heads, k.kv_heads, k.hidden, k.theta,
                                 k.eps, k.positions)
    if k.image:
        assert c.vision == clip_vit.Config(32, 3, 4, 64, k.image, 14)
        assert c.aspect == ("anyres" if k.anyres else "pad") and c.layer == -2
        assert c.pinpoints == (tuple(map(tuple, k.pinpoints)) if k.anyres else ())


@pytest.mark.parametrize("kind", WITH_IMAGE)
def test_rows_that_pad_the_vocabulary_are_cut_off_and_take_no_part_in_a_softmax(kind, checkpoint, model):
    padded = load_file(checkpoint(kind, "hf") / "model.safetensors")["language_model.lm_head.weight"]
    assert len(padded) == world.padded_vocab_size(kind) > world.vocab_size(kind)
    loaded = load(checkpoint(kind, "hf"))
    p = loaded.prompt("Is the cup on the table red or blue?", world.picture(60, 90))
    with torch.inference_mode():
        h = loaded.decoder.norm(loaded.decoder(loaded.embed(p), p.positions))[0, -1]
        logits = loaded(p)[0, -1]
    assert len(logits) == world.vocab_size(kind)
    assert torch.equal(logits, model(kind)(p)[0, -1])
    uncut = (padded.float() @ h).softmax(-1)
    assert logits.softmax(-1).max() > 1.5 * uncut[:len(logits)].max()  # with them the numbers would be far off


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", world.KINDS)
def test_weights_stored_in_any_dtype_are_cast_to_the_wanted_one(kind, dtype, tmp_path):
    loaded = load(world.write(tmp_path, kind, dtype=dtype), torch.bfloat16)
    assert_holds(loaded, kind)
    assert {p.dtype for p in loaded.decoder.parameters()} == {torch.bfloat16}


def test_the_tower_of_1_5_stays_in_float32_and_the_others_follow_the_decoder(checkpoint):
    for kind in WITH_IMAGE:
        loaded = load(checkpoint(kind), torch.bfloat16)
        assert {p.dtype for p in loaded.decoder.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in loaded.vision_tower.parameters()} == {
            torch.float32 if kind == "llava-1.5" else torch.bfloat16}


@pytest.mark.parametrize("spelling, pack", [("hf", "one"), ("hf", "bin"), ("open_clip", "one")])
def test_1_5_takes_its_tower_from_any_clip_folder_that_it_is_given(spelling, pack, checkpoint, tmp_path):
    world.write_clip(tmp_path / "tower", "llava-1.5", spelling, pack)
    assert_holds(load(checkpoint("llava-1.5"), vision_tower=tmp_path / "tower"), "llava-1.5")


def test_1_6_reads_its_own_tower_and_only_the_config_of_the_named_one(checkpoint, tmp_path):
    world.write_clip(tmp_path, "llava-1.5")                         # same shapes, other weights
    assert_holds(load(checkpoint("llava-1.6"), vision_tower=tmp_path), "llava-1.6")


@pytest.mark.parametrize("pack", ["one", "sharded", "bin", "bin-sharded"])
def test_a_decoder_file_alone_loads_a_text_model(pack, tmp_path, model):
    alone, whole = vicuna.load(world.write(tmp_path, "vicuna", pack=pack)), model("vicuna").decoder
    assert alone.config == whole.config
    for name, p in whole.named_parameters():
        assert torch.equal(alone.get_parameter(name), p), name


@pytest.fixture
def llama3_text_model(tmp_path):
    """A folder with the decoder of llama3-next alone, as a Llama-3 repository holds it."""
    raw = world.original_config("llama3-next", "none") | {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    world.save(tmp_path, {name: tensor for name, tensor in world.weights("llama3-next").items()
                          if not re.search("mm_projector|vision_tower|image_newline", name)}, "one")
    world.write_llama3_tokenizer(tmp_path, "model")
    return tmp_path


def test_llama3_alone_loads_a_text_model(llama3_text_model, model):
    alone, whole = llama3.load(llama3_text_model), model("llama3-next").decoder
    assert alone.config == whole.config
    assert all(torch.equal(alone.get_parameter(name), p) for name, p in whole.named_parameters())


@pytest.mark.parametrize("file", [vicuna, llama3], ids=lambda file: file.__name__)
def test_a_decoder_file_is_a_program_that_continues_a_text(file, checkpoint, llama3_text_model, capsys, monkeypatch):
    folder = checkpoint("vicuna") if file is vicuna else llama3_text_model
    monkeypatch.setattr(sys, "argv", [file.__name__, "--weights", str(folder), "--prompt", "Is the cup red?",
                                      "--tokens", "5", "--dtype", "float32"])
    file.main()
    model, tokenizer = file.load(folder), file.load_tokenizer(folder)
    ids = tokenizer.encode("Is the cup red?").ids
    for _ in range(5):                                              # no cache: everything again for each token
        h = model(model.embed_tokens(torch.tensor([ids])), torch.arange(len(ids)))
        ids.append(model.lm_head(model.norm(h))[0, -1].argmax().item())
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"
    assert tokenizer.decode(ids).startswith("Is the cup red?")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(sys, "argv", [*sys.argv[:4], "Is the café red?", *sys.argv[5:]])
    file.main()                                                     # on a terminal without accents
    sys.stdout.seek(0)
    assert sys.stdout.read().startswith("Is the caf? red?")


@pytest.mark.parametrize("layout", ["hf", "hf5", "memory5"])
@pytest.mark.parametrize("kind", WITH_IMAGE)
def test_transformers_finds_every_weight_in_these_layouts_too(kind, layout, checkpoint):
    hf = pytest.importorskip("transformers", reason="transformers is not installed")
    cls = getattr(hf, "LlavaNextForConditionalGeneration" if world.KINDS[kind].anyres else
                  "LlavaForConditionalGeneration")
    theirs, info = cls.from_pretrained(checkpoint(kind, layout), dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    V = world.vocab_size(kind)
    assert torch.equal(theirs.lm_head.weight[:V], world.weights(kind)["lm_head.weight"])


# ------------------------------------------------------------------------------------------------- what must be refused

def edited(tmp_path, kind, layout, change):
    """A copy of a checkpoint whose tensors went through `change`."""
    folder = world.write(tmp_path, kind, layout)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("layout, name", [
    ("original", "model.layers.2.mlp.up_proj.weight"), ("original", "model.image_newline"),
    ("original", "lm_head.weight"),
    ("hf", "multi_modal_projector.linear_2.bias"), ("hf5", "vision_tower.encoder.layers.0.self_attn.k_proj.bias"),
    ("memory", "model.language_model.norm.weight")])
def test_a_missing_tensor_is_named(layout, name, tmp_path):
    folder = edited(tmp_path, "llava-1.6", layout, lambda tensors: tensors.pop(name))
    missing = {"model.layers.2.mlp.up_proj.weight": "decoder.layers.2.up_proj.weight",
               "model.image_newline": "image_newline", "lm_head.weight": "decoder.lm_head.weight",
               "multi_modal_projector.linear_2.bias": "mm_projector.2.bias",
               "vision_tower.encoder.layers.0.self_attn.k_proj.bias":
                   "vision_tower.encoder.layers.0.self_attn.k_proj.bias",
               "model.language_model.norm.weight": "decoder.norm.weight"}[name]
    with pytest.raises(ValueError, match=re.escape(f"1 parameters missing ['{missing}'], 0 tensors extra")):
        load(folder)


@pytest.mark.parametrize("name", ["model.layers.4.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias",
                                  "model.mm_projector.4.weight", "adapter.weight"])
def test_an_extra_tensor_is_named(name, tmp_path):
    folder = edited(tmp_path, "llava-1.6", "original", lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(ValueError, match=re.escape(f"0 parameters missing [], 1 tensors extra ['{name}']")):
        load(folder)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.mm_projector.0.weight",
                                  "model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"])
def test_a_misshapen_tensor_is_named_with_both_shapes(name, tmp_path):
    folder = edited(tmp_path, "llava-1.6", "original",
                    lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    rows, cols = world.weights("llava-1.6")[name].shape
    sentence = f"{name}: the checkpoint has ({rows - 1}, {cols}), the config wants ({rows}, {cols})"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load(folder)


def test_a_vocabulary_shorter_than_the_config_says_is_refused(tmp_path):
    folder = edited(tmp_path, "llava-1.6", "hf", lambda tensors: tensors.update(
        {"language_model.lm_head.weight": tensors["language_model.lm_head.weight"][:100].clone()}))
    with pytest.raises(ValueError, match=r"lm_head.weight: the checkpoint has \(100, 48\)"):
        load(folder)


def test_the_same_tensor_under_two_names_is_refused(tmp_path):
    folder = edited(tmp_path, "llava-1.6", "original", lambda tensors: tensors.update(
        {"language_model.model.norm.weight": tensors["model.norm.weight"].clone()}))
    with pytest.raises(ValueError, match="1 tensors extra"):
        load(folder)


def test_a_decoder_file_alone_names_what_is_missing_extra_or_misshapen(tmp_path):
    folder = world.write(tmp_path, "vicuna")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if n != "model.norm.weight"}, file)
    with pytest.raises(ValueError, match=r"1 parameters missing \['norm.weight'\]"):
        vicuna.load(folder)
    save_file(tensors | {"model.mm_projector.0.weight": torch.ones(2)}, file)
    with pytest.raises(ValueError, match=r"1 tensors extra \['model.mm_projector.0.weight'\]"):
        vicuna.load(folder)
    save_file(tensors | {"model.norm.weight": torch.ones(47)}, file)
    with pytest.raises(ValueError, match=r"model.norm.weight: the checkpoint has \(47,\), the config wants \(48,\)"):
        vicuna.load(folder)


def damage_header(data):
    return data[:8] + b"#" + data[9:]


def damage_length(data):
    return b"\xff" * 8 + data[8:]


@pytest.mark.parametrize("damage", [damage_header, damage_length, lambda data: data[:-100], lambda data: data[:100],
                                    lambda data: data[:4], lambda data: b""],
                         ids=["header", "length", "short by 100 bytes", "100 bytes", "4 bytes", "empty"])
@pytest.mark.parametrize("kind", ["vicuna", "llava-1.5", "llava-1.6"])
def test_a_damaged_safetensors_file_is_named(kind, damage, tmp_path):
    folder = world.write(tmp_path, kind, pack="sharded")
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{re.escape(file.name)} is damaged"):
        load(folder)
    if kind == "vicuna":
        with pytest.raises(ValueError, match=rf"{re.escape(file.name)} is damaged"):
            vicuna.load(folder)


@pytest.mark.parametrize("damage", [lambda data: data[:-1000], lambda data: data[:100], lambda data: b"not a zip file"],
                         ids=["short by 1000 bytes", "100 bytes", "text"])
@pytest.mark.parametrize("kind", ["vicuna", "llava-1.6"])
def test_a_damaged_bin_file_is_named(kind, damage, tmp_path):
    folder = world.write(tmp_path, kind, pack="bin")
    file = folder / "pytorch_model.bin"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged"):
        load(folder)


class Trap:
    """Unpickled by a careless reader, this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["vicuna", "llava-1.6"])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_a_bin_file_that_would_run_code_is_refused_before_it_does(kind, form, tmp_path):
    folder, sprung = world.write(tmp_path / "model", kind, pack="bin"), tmp_path / "sprung"
    file = folder / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    tensors["model.norm.weight"] = Trap(sprung)
    if form == "plain pickle":
        file.write_bytes(pickle.dumps(tensors))
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged"):
        load(folder)
    for leaf in (vicuna, llama3, clip_vit):
        with pytest.raises(ValueError, match="pytorch_model.bin is damaged or not a checkpoint file"):
            dict(leaf.read([file]))
    assert not sprung.exists()
    if form == "zip":
        torch.load(file, weights_only=False)
        assert sprung.exists()                                      # the trap is a real one


@pytest.mark.parametrize("pack", ["one", "bin"])
def test_on_the_command_line_a_damaged_file_is_one_line_and_exit_code_2(pack, tmp_path, capsys, monkeypatch):
    folder = world.write(tmp_path, "vicuna", pack=pack)
    if pack == "bin":
        torch.save({"model.norm.weight": Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    else:
        (folder / "model.safetensors").write_bytes(b"not a checkpoint")
    monkeypatch.setattr(sys, "argv", ["llava_min.py", "--model", str(folder), "--question", "why?"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "llava_min.py"), run_name="__main__")
    out = capsys.readouterr()
    assert stop.value.code == 2 and out.out == ""
    assert re.fullmatch(r"error: .*model\.(bin|safetensors) is damaged.*\n", out.err), out.err


def test_a_shard_that_the_index_names_but_the_folder_lacks_is_named(tmp_path):
    folder = world.write(tmp_path, "vicuna", pack="sharded")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks model-00002-of-00003.safetensors"):
        load(folder)


@pytest.mark.parametrize("index", ["{}", "[]", "nonsense", '{"weight_map": []}'])
def test_an_index_that_is_none_is_an_error_that_names_it(index, tmp_path):
    folder = world.write(tmp_path, "vicuna", pack="sharded")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        load(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.model", "model.safetensors"])
def test_a_file_that_a_folder_lacks_is_named(file, tmp_path):
    folder = world.write(tmp_path, "vicuna")
    (folder / file).unlink()
    with pytest.raises(ValueError, match=f"lacks .*{re.escape(file)}"):
        load(folder)


def test_1_5_without_a_tower_anywhere_says_how_to_name_one(tmp_path):
    folder = world.write(tmp_path, "llava-1.5", tower=str(tmp_path / "nowhere"))
    for loader in (load, hub.load):
        with pytest.raises(ValueError, match=r"vision tower of .*nowhere.*--vision-tower"):
            loader(str(folder))
    world.write_clip(tmp_path / "nowhere", "llava-1.5", pack=None)
    for loader in (load, hub.load):
        with pytest.raises(ValueError, match=r"nowhere lacks model\.safetensors.*--vision-tower"):
            loader(str(folder))


@pytest.mark.parametrize("kind, change", [
    ("llava-1.5", {"image_aspect_ratio": "square"}), ("llava-1.5", {"image_aspect_ratio": None}),
    ("llava-1.5", {"mm_projector_type": "linear"}), ("llava-1.5", {"mm_vision_select_feature": "cls_patch"}),
    ("llava-1.5", {"mm_use_im_start_end": True}), ("llava-1.5", {"mm_patch_merge_type": "spatial"}),
    ("llava-1.6", {"mm_patch_merge_type": "flat"}), ("llava-1.6", {"mm_resampler_type": "spatial_pool"}),
    ("llava-1.6", {"rope_scaling": {"type": "linear", "factor": 2}}), ("llama3-next", {"attention_bias": True})],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else x)
def test_a_setting_of_the_original_config_that_is_not_implemented_is_refused_by_name(kind, change, tmp_path):
    folder = world.write(tmp_path, kind)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=next(iter(change))):
        load(folder)


@pytest.mark.parametrize("change", [
    {"vision_feature_select_strategy": "full"}, {"projector_hidden_act": "relu"}, {"vision_feature_layer": [-2, -5]},
    {"multimodal_projector_bias": False}, {"use_image_newline_parameter": False}, {"model_type": "video_llava"}],
    ids=lambda change: next(iter(change)))
def test_a_setting_of_the_hub_config_that_is_not_implemented_is_refused_by_name(change, tmp_path):
    folder = world.write(tmp_path, "llava-1.6", "hf")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=next(iter(change))):
        load(folder)


# ---------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import {file}

def peak():
    try:                                    # of this process image alone: ru_maxrss starts at the parent's peak
        status = open("/proc/self/status").read()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

{file}.load(sys.argv[2])                    # a small one first: imports and buffers are not the checkpoint's
before = peak()
model = {file}.load(sys.argv[3])
print(peak() - before, sum(p.nbytes for p in model.parameters()), max(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs /proc or getrusage to measure memory")
@pytest.mark.parametrize("pack", ["one", "bin"])
@pytest.mark.parametrize("file", ["vicuna", "llava_min"])
def test_loading_needs_the_memory_of_the_model_and_one_tensor(file, pack, tmp_path):
    small, big = world.write(tmp_path / "small", "vicuna", pack=pack), tmp_path / "big"
    big.mkdir()
    width, hidden, raw = 1024, 2816, json.loads((small / "config.json").read_text())
    raw |= {"hidden_size": width, "intermediate_size": hidden, "num_attention_heads": 8, "num_key_value_heads": 8}
    (big / "config.json").write_text(json.dumps(raw))
    (big / "tokenizer.model").write_bytes((small / "tokenizer.model").read_bytes())
    sizes = {48: width, 96: hidden}
    tensors = {name: torch.ones([sizes.get(n, n) for n in t.shape]) for name, t in world.weights("vicuna").items()}
    world.save(big, tensors, pack)
    total = sum(t.nbytes for t in tensors.values())
    del tensors
    done = subprocess.run([sys.executable, "-c", MEASURE.format(file=file), str(ROOT), str(small), str(big)],
                          capture_output=True, text=True, check=True)
    growth, model, tensor = map(int, done.stdout.split())
    slack = 80e6
    assert model == total > 200e6
    assert growth > 0.9 * model                                     # else nothing was measured
    assert growth < model + tensor + slack < model + total / 2, f"{growth / 1e6:.0f} MB for {model / 1e6:.0f} MB"
