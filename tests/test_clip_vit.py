"""python -m pytest tests/test_clip_vit.py

The vision tower against open_clip and transformers themselves, built here with random weights and read from the files
they would publish, and against the settings it must refuse.
"""
import json
import math

import numpy as np
import pytest
import torch
import world
from PIL import Image
from safetensors.torch import save_file

import clip_vit

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56,
        "patch_size": 14}


def randomize(module, seed=0):
    """No parameter may keep a value, 0 or 1, that would hide a missing one."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        scale = 0.2 if p.dim() < 2 else 1.5 / math.sqrt(p[0].numel())
        p.data = torch.randn(p.shape, generator=g) * scale + (p.dim() == 1 and name.endswith("weight"))
    return module.eval().requires_grad_(False)


def pixels(n=2, side=56):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(4))


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- open_clip

@pytest.fixture(scope="module")
def open_clip_twin(tmp_path_factory):
    """A small open_clip CLIP, text tower and all, and our tower loaded from the two files its hub repositories hold."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed: nothing to compare with")
    config = {"embed_dim": 24, "quick_gelu": True,
              "vision_cfg": {"image_size": 56, "layers": 3, "width": 32, "head_width": 8, "patch_size": 14},
              "text_cfg": {"context_length": 12, "vocab_size": 30, "width": 16, "heads": 2, "layers": 3}}
    theirs = randomize(open_clip.CLIP(**config))
    folder = tmp_path_factory.mktemp("open_clip")
    save_file(theirs.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return theirs, clip_vit.load(folder)


def test_every_hidden_state_is_open_clips_own(open_clip_twin):
    theirs, ours = open_clip_twin
    states = []
    for module in (theirs.visual.ln_pre, *theirs.visual.transformer.resblocks):
        module.register_forward_hook(lambda module, args, out: states.append(out))
    theirs.encode_image(pixels())
    assert len(states) == 4
    for layer, state in enumerate(states):
        same(ours(pixels(), layer), state)
        same(ours(pixels(), layer - 4), state)                      # -1 is the last, as in transformers
    assert not torch.allclose(ours(pixels(), -1), ours(pixels(), -2), atol=1e-2)


def test_llavas_features_are_open_clips_intermediate_of_the_last_block_but_one(open_clip_twin):
    theirs, ours = open_clip_twin
    out = theirs.visual.forward_intermediates(pixels(), indices=[1], stop_early=True, normalize_intermediates=False,
                                              intermediates_only=True, output_fmt="NLC")
    same(ours.features(pixels()), out["image_intermediates"][0])
    assert torch.equal(ours.features(pixels()), ours(pixels())[:, 1:])


def test_a_tower_has_the_sizes_of_its_open_clip_config(open_clip_twin):
    _, ours = open_clip_twin
    assert ours.config == clip_vit.Config(width=32, layers=3, heads=4, hidden=128, image=56, patch=14)
    assert ours.config.side == 4


# ---------------------------------------------------------------------------------------------------- transformers

def test_every_hidden_state_is_transformers_own_whole_clip_and_tower_alone(tmp_path):
    hf = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
            "vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2}
    whole = randomize(hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=TINY)))
    states = whole.vision_model(pixels(), output_hidden_states=True).hidden_states
    assert len(states) == 4
    alone = hf.CLIPVisionModel(hf.CLIPVisionConfig(**TINY))
    alone.load_state_dict({name: t for name, t in (*whole.vision_model.state_dict().items(),
                                                   *((f"vision_model.{n}", t) for n, t in
                                                     whole.vision_model.state_dict().items()))
                           if name in alone.state_dict()})
    for folder, model in (("whole", whole), ("alone", alone)):
        model.save_pretrained(tmp_path / folder)
        ours = clip_vit.load(tmp_path / folder)
        for layer, state in enumerate(states):
            same(ours(pixels(), layer), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tower_in_half_precision_is_transformers_own_bit_for_bit(dtype, tmp_path):
    hf = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    wide = TINY | {"hidden_size": 64, "attn_implementation": "eager"}  # D = 16, so that 1 / sqrt(D) is exact
    theirs = randomize(hf.CLIPVisionModel(hf.CLIPVisionConfig(**wide))).to(dtype)
    theirs.save_pretrained(tmp_path)
    ours = clip_vit.load(tmp_path, dtype)
    for layer, state in enumerate(theirs(pixels().to(dtype), output_hidden_states=True).hidden_states):
        assert torch.equal(ours(pixels(), layer), state), f"hidden state {layer}"


# ---------------------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("pack", ["one", "sharded", "bin", "bin-sharded"])
@pytest.mark.parametrize("spelling", ["hf", "open_clip"])
def test_one_tower_in_any_spelling_and_file_is_loaded_bit_for_bit(spelling, pack, tmp_path):
    model = clip_vit.load(world.write_clip(tmp_path, "llava-1.5", spelling, pack))
    prefix = "model.vision_tower.vision_tower.vision_model."
    want = {name.removeprefix(prefix): t for name, t in world.weights("llava-1.5").items() if name.startswith(prefix)}
    got = dict(model.named_parameters())
    assert want.keys() - got.keys() == {"post_layernorm.weight", "post_layernorm.bias"}  # LLaVA stops before it
    assert got.keys() <= want.keys()
    for name in got:
        assert torch.equal(got[name], want[name]), name


def test_what_llava_does_not_use_is_skipped_by_name_and_nothing_else_is(tmp_path):
    world.write_clip(tmp_path, "llava-1.5")
    from safetensors.torch import load_file
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # OpenAI's old files hold this buffer
    save_file(tensors, tmp_path / "model.safetensors")
    clip_vit.load(tmp_path)
    save_file(tensors | {"vision_model.encoder.layers.3.mlp.fc1.bias": torch.zeros(64)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors extra \['vision_model.encoder.layers.3.mlp.fc1.bias'\]"):
        clip_vit.load(tmp_path)


def test_a_folder_without_config_or_weights_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        clip_vit.load(tmp_path)
    world.write_clip(tmp_path, "llava-1.5", pack=None)
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        clip_vit.load(tmp_path)


def test_the_file_is_a_program_that_measures_a_photos_features(tmp_path, capsys, monkeypatch):
    world.write_clip(tmp_path, "llava-1.5")
    world.picture(90, 60).save(tmp_path / "photo.png")
    monkeypatch.setattr("sys.argv", ["clip_vit", "--weights", str(tmp_path), "--image", str(tmp_path / "photo.png")])
    clip_vit.main()
    squeezed = clip_vit.to_pixels(world.picture(90, 60).resize((56, 56), Image.Resampling.BICUBIC))
    norms = clip_vit.load(tmp_path)(squeezed[None])[0, 1:].norm(dim=-1)
    assert capsys.readouterr().out == (f"16 patches of width 32; L2 norm {norms.min():.1f} to {norms.max():.1f}, "
                                       f"median {norms.median():.1f}\n")


# ---------------------------------------------------------------------------------------------------- configs

def test_keys_that_transformers_omits_have_clip_vision_configs_defaults():
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
             "image_size": 336, "patch_size": 14, "projection_dim": 768, "model_type": "clip_vision_model"}
    assert clip_vit.Config.from_json(large) == clip_vit.Config()    # the released ViT-L/14-336
    assert clip_vit.Config.from_json({"model_type": "clip", "vision_config": large}) == clip_vit.Config()
    assert clip_vit.Config.from_json({"model_type": "clip", "vision_config": {"patch_size": 16}}) == clip_vit.Config(
        width=768, layers=12, heads=12, hidden=3072, image=224, patch=16)


def test_open_clips_released_config_is_the_released_tower():
    raw = {"embed_dim": 768, "quick_gelu": True, "text_cfg": {"width": 768},
           "vision_cfg": {"image_size": 336, "layers": 24, "width": 1024, "patch_size": 14}}
    assert clip_vit.Config.from_json({"model_cfg": raw}) == clip_vit.Config()


@pytest.mark.parametrize("odd", [{"hidden_act": "gelu"}, {"num_channels": 1}, {"model_type": "siglip_vision_model"}],
                         ids=lambda odd: next(iter(odd)))
def test_a_setting_that_is_not_openais_clip_is_refused_by_name(odd):
    with pytest.raises(ValueError, match=next(iter(odd))):
        clip_vit.Config.from_json({**TINY, **odd})
    with pytest.raises(ValueError, match=next(iter(odd))):
        clip_vit.Config.from_json({"model_type": "clip", "vision_config": {**TINY, **odd}})


@pytest.mark.parametrize("odd", [{"quick_gelu": False}, {"pool_type": "avg"}, {"no_ln_pre": True}, {"ls_init_value": 1},
                                 {"timm_model_name": "vit_base"}], ids=lambda odd: next(iter(odd)))
def test_an_open_clip_setting_that_is_not_openais_clip_is_refused_by_name(odd):
    raw = {"quick_gelu": True, "vision_cfg": {"image_size": 56, "layers": 3, "width": 64, "patch_size": 14}}
    (raw if "quick_gelu" in odd else raw["vision_cfg"]).update(odd)
    with pytest.raises(ValueError, match=next(iter(odd))):
        clip_vit.Config.from_json({"model_cfg": raw})


@pytest.mark.parametrize("sizes", [{"hidden_size": 33}, {"num_attention_heads": 0}, {"patch_size": -14}],
                         ids=lambda sizes: next(iter(sizes)))
def test_sizes_that_no_model_can_have_are_refused(sizes):
    with pytest.raises(ValueError, match="impossible sizes in the config"):
        clip_vit.Config.from_json(TINY | sizes)


def test_an_open_clip_config_that_says_nothing_of_its_gelu_is_refused():
    """open_clip takes the plain one then."""
    with pytest.raises(ValueError, match="quick_gelu"):
        clip_vit.Config.from_json({"model_cfg": {"vision_cfg": {"image_size": 56, "layers": 3, "width": 64,
                                                                "patch_size": 14}}})


# ---------------------------------------------------------------------------------------------------- pixels

@pytest.mark.parametrize("size", world.PICTURES)
def test_pixels_are_scaled_to_one_then_normalised_by_channel(size):
    image = world.picture(*size)
    x = clip_vit.to_pixels(image)
    assert x.shape == (3, size[1], size[0]) and x.dtype == torch.float32
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    by_hand = (np.asarray(image).astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(x.permute(1, 2, 0).numpy(), by_hand, rtol=0, atol=1e-6)


def test_a_grey_picture_becomes_three_equal_channels():
    x = clip_vit.to_pixels(Image.new("L", (4, 3), 128)) * torch.tensor(clip_vit.STD)[:, None, None]
    x += torch.tensor(clip_vit.MEAN)[:, None, None]
    torch.testing.assert_close(x, torch.full((3, 3, 4), 128 / 255))
