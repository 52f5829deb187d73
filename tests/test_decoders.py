"""python -m pytest tests/test_decoders.py

The two decoders: the contract that instruments rely on, the arithmetic against closed forms and against transformers'
eager attention; and of all files at the top level, the definitions that are copies and the files that work alone.
"""
import ast
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import llama3
import qwen2
import vicuna

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"vocab": 50, "width": 64, "layers": 3, "heads": 4, "hidden": 96}
FILES = {"vicuna": (vicuna, vicuna.Config(**SMALL, kv_heads=4)),
         "llama3": (llama3, llama3.Config(**SMALL, kv_heads=2))}
both = pytest.mark.parametrize("file, c", FILES.values(), ids=FILES)
THREE = FILES | {"qwen2": (qwen2, qwen2.Config(**SMALL, kv_heads=2)),
                 "qwen2 tied": (qwen2, qwen2.Config(**SMALL, kv_heads=2, tied=True))}
three = pytest.mark.parametrize("file, c", THREE.values(), ids=THREE)
KERNELS = {"attend": vicuna.attend, "attend_fast": vicuna.attend_fast}
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])


def filled(module, seed=0):
    """Random weights large enough that attention is not flat."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        scale = 0.2 if "norm" in name else 1.0 if "embed" in name else 1 / math.sqrt(p.shape[-1])
        p.data = torch.randn(p.shape, generator=g) * scale + ("norm" in name)
    return module.eval().requires_grad_(False)


def noise(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_mask(T, seed=2):
    """A causal mask with a third of its other edges cut."""
    keep = vicuna.causal(T) & (noise(T, T, seed=seed) > -0.4) | torch.eye(T, dtype=torch.bool)
    return vicuna.to_mask(keep)


NINE = torch.arange(9)                                              # the positions of most sequences here


# ---------------------------------------------------------------------------------------------------- the contract

@both
def test_a_loop_over_the_public_parts_is_the_decoders_own_forward(file, c):
    model, ids = filled(file.Decoder(c)), torch.arange(9)[None]
    x = model.embed_tokens(ids)
    cos, sin = model.rope(NINE)
    assert x.shape == (1, 9, c.width) and cos.shape == sin.shape == (9, c.head_size)
    assert len(model.layers) == c.layers and c.head_size == 16
    h = x
    for layer in model.layers:
        h = layer(h, cos, sin, None)
    assert torch.equal(h, model(x, NINE))
    assert model.lm_head(model.norm(h)).shape == (1, 9, c.vocab)


@both
@pytest.mark.parametrize("shape", [(9, 9), (1, 9, 9), (1, 1, 9, 9), (1, 4, 9, 9), (1, 9), (1, 1, 1, 9)])
def test_a_mask_of_any_broadcastable_shape_is_an_argument_of_every_layer(file, c, shape):
    model, x = filled(file.Decoder(c)), noise(1, 9, c.width)
    mask = random_mask(9)
    mask = mask if shape[-2] == 9 else torch.zeros(9).index_fill(0, torch.tensor([2, 5]), -math.inf)
    (cos, sin), layer = model.rope(NINE), model.layers[0]
    same_mask = mask.expand(1, 4, 9, 9)
    torch.testing.assert_close(layer(x, cos, sin, mask.expand(shape)), layer(x, cos, sin, same_mask), rtol=0, atol=1e-5)
    torch.testing.assert_close(model(x, NINE, mask.expand(shape)), model(x, NINE, same_mask), rtol=0, atol=2e-5)
    assert not torch.allclose(model(x, NINE, same_mask), model(x, NINE), atol=1e-2)


@both
def test_a_mask_of_one_row_per_head_cuts_only_that_head(file, c):
    model, x = filled(file.Decoder(c)), noise(1, 9, c.width)
    keep = vicuna.causal(9).repeat(1, c.heads, 1, 1)
    keep[0, 2, 8, 1:4] = False
    (cos, sin), layer = model.rope(NINE), model.layers[0]
    inner = []
    layer.o_proj.register_forward_pre_hook(lambda module, args: inner.append(args[0].view(9, c.heads, -1)))
    layer(x, cos, sin, None)
    layer(x, cos, sin, vicuna.to_mask(keep))
    plain, cut = inner
    moved = (plain - cut).abs().amax(-1) > 1e-5
    assert moved.nonzero().tolist() == [[8, 2]]


@both
def test_adding_zeros_is_plain_causal_attention(file, c):
    model, x = filled(file.Decoder(c)), noise(1, 9, c.width)
    mask = vicuna.to_mask(vicuna.causal(9))
    torch.testing.assert_close(model(x, NINE, mask), model(x, NINE), rtol=0, atol=1e-5)


@both
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_cut_edge_carries_nothing(file, c, kernel, monkeypatch):
    monkeypatch.setattr(file.Block, "kernel", staticmethod(kernel))
    model, x = filled(file.Decoder(c)), noise(1, 9, c.width)
    keep = vicuna.causal(9)
    keep[3:, 1:3] = False
    mask, other = vicuna.to_mask(keep), x.clone()
    other[0, 1:3] += 10 * noise(2, c.width)
    assert torch.equal(model(x, NINE, mask)[0, 3:], model(other, NINE, mask)[0, 3:])
    assert not torch.allclose(model(x, NINE)[0, 3:], model(other, NINE)[0, 3:])  # without the cut it does


@both
def test_tokens_that_follow_a_cache_give_what_one_pass_gives(file, c):
    model, x = filled(file.Decoder(c)), noise(1, 12, c.width)
    at, caches = torch.arange(12), [[] for _ in model.layers]
    parts = [model(x[:, a:b], at[a:b], caches=caches) for a, b in ((0, 5), (5, 6), (6, 7), (7, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), model(x, at), rtol=0, atol=1e-5)
    assert [k.shape for k, _ in caches] == [(1, c.kv_heads, 12, c.head_size)] * c.layers


@both
def test_a_cached_step_may_take_a_mask_over_all_keys(file, c):
    model, x = filled(file.Decoder(c)), noise(1, 8, c.width)
    mask, caches = random_mask(8), [[] for _ in model.layers]
    at = torch.arange(8)
    model(x[:, :6], at[:6], mask[:6, :6], caches)
    torch.testing.assert_close(model(x[:, 6:], at[6:], mask[6:], caches), model(x, at, mask)[:, 6:], rtol=0, atol=1e-5)


def test_a_query_that_would_attend_to_nothing_is_an_error_that_names_it():
    keep = vicuna.causal(5)
    keep[3] = keep[1] = False
    with pytest.raises(ValueError, match=r"\[1, 3\] would attend to nothing"):
        vicuna.to_mask(keep)
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        vicuna.to_mask(keep.expand(1, 4, 5, 5))
    with pytest.raises(ValueError, match=r"\[3\]"):                 # the queries are the last of the positions
        vicuna.to_mask(keep[2:])


# ---------------------------------------------------------------------------------------------------- arithmetic

@pytest.mark.parametrize("mask", [None, "random"])
@pytest.mark.parametrize("T, S", [(7, 7), (1, 7), (3, 7), (1, 1)])
def test_the_fused_kernel_is_attention_as_written(T, S, mask):
    q, k, v = noise(2, 4, T, 16), noise(2, 4, S, 16, seed=3), noise(2, 4, S, 16, seed=4)
    mask = random_mask(S)[S - T:] if mask else None
    torch.testing.assert_close(vicuna.attend_fast(q, k, v, mask), vicuna.attend(q, k, v, mask), rtol=0, atol=2e-6)


@every_dtype
def test_the_fused_kernel_is_as_exact_as_attention_as_written(dtype):
    q, k, v = (noise(1, 4, 7, 16, seed=s, dtype=dtype) for s in (1, 2, 3))
    mask = random_mask(7)
    true = vicuna.attend(q.double(), k.double(), v.double(), mask)
    for kernel in (vicuna.attend, vicuna.attend_fast):
        assert (kernel(q, k, v, mask) - true).abs().max() < 8 * torch.finfo(dtype).eps


def test_attention_is_equation_3_written_with_loops():
    q, k, v, mask = noise(1, 2, 5, 8), noise(1, 2, 5, 8, seed=3), noise(1, 2, 5, 8, seed=4), random_mask(5)
    out = vicuna.attend(q, k, v, mask)
    for h in range(2):
        for t in range(5):
            e = [math.exp(sum(a * b for a, b in zip(q[0, h, t].tolist(), k[0, h, s].tolist(), strict=True))
                          / math.sqrt(8)) if mask[t, s] == 0 else 0.0 for s in range(5)]
            by_hand = sum(w / sum(e) * v[0, h, s] for s, w in enumerate(e))
            torch.testing.assert_close(out[0, h, t], by_hand, rtol=1e-5, atol=1e-6)


def test_queries_are_the_last_positions_of_a_longer_sequence():
    assert vicuna.causal(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert vicuna.causal(2, 4).tolist() == [[True, True, True, False], [True] * 4]
    assert vicuna.causal(1, 3).tolist() == [[True] * 3]


def test_rms_norm_is_its_closed_form():
    norm, x = filled(vicuna.RMSNorm(8, eps=0.5)), noise(3, 8)
    by_hand = [[w * a / math.sqrt(sum(b * b for b in row) / 8 + 0.5)
                for w, a in zip(norm.weight.tolist(), row, strict=True)] for row in x.tolist()]
    torch.testing.assert_close(norm(x), torch.tensor(by_hand))


def test_rms_norm_takes_its_statistics_in_float32():
    norm = vicuna.RMSNorm(8, eps=1e-5).half()
    x = torch.full((1, 8), 300.0).half()                            # its square is beyond float16
    assert torch.equal(norm(x), torch.ones(1, 8).half())


def test_rotation_turns_each_pair_by_position_times_its_frequency():
    x, positions, base = noise(1, 1, 3, 8), torch.tensor([0, 1, 700]), 10000.0
    out = vicuna.rotate(x, *vicuna.rope_table(positions, 8, base, torch.float32))
    for t, m in enumerate(positions.tolist()):
        for i in range(4):                                          # pair (i, i + D/2) as a complex number
            turned = complex(x[0, 0, t, i], x[0, 0, t, i + 4]) * complex(
                math.cos(m * base ** (-2 * i / 8)), math.sin(m * base ** (-2 * i / 8)))
            assert out[0, 0, t, i].item() == pytest.approx(turned.real, abs=2e-4)
            assert out[0, 0, t, i + 4].item() == pytest.approx(turned.imag, abs=2e-4)


def test_a_rotated_product_depends_only_on_how_far_apart_two_positions_are():
    q, k = noise(1, 1, 1, 16), noise(1, 1, 1, 16, seed=5)

    def score(m, n):
        return (vicuna.rotate(q, *vicuna.rope_table(torch.tensor([m]), 16, 500000.0, torch.float32))
                @ vicuna.rotate(k, *vicuna.rope_table(torch.tensor([n]), 16, 500000.0, torch.float32)).mT).item()
    assert score(5, 2) == pytest.approx(score(1003, 1000), abs=1e-3)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-2)


@every_dtype
def test_angles_are_exact_at_far_positions_in_any_dtype(dtype):
    cos, sin = vicuna.rope_table(torch.tensor([4000, 4001]), 16, 10000.0, dtype)
    assert cos.dtype == dtype
    for row, m in enumerate((4000, 4001)):
        angles = [m * 10000.0 ** (-2 * i / 16) for i in range(8)] * 2
        torch.testing.assert_close(cos[row].double(), torch.tensor(angles, dtype=torch.double).cos(), rtol=0, atol=4e-3)
        torch.testing.assert_close(sin[row].double(), torch.tensor(angles, dtype=torch.double).sin(), rtol=0, atol=4e-3)


def test_grouped_keys_are_a_dense_model_with_each_key_head_repeated():
    c = FILES["llama3"][1]
    grouped, x = filled(llama3.Decoder(c)), noise(1, 9, c.width)
    dense = vicuna.Decoder(vicuna.Config(**SMALL, kv_heads=4, rope_base=c.rope_base, norm_eps=c.norm_eps))
    state = grouped.state_dict()
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:                    # key head j serves query heads 2j and 2j + 1
            state[name] = torch.cat([head for head in tensor.chunk(2) for _ in range(2)])
    dense.load_state_dict(state)
    torch.testing.assert_close(dense(x, NINE), grouped(x, NINE), rtol=0, atol=1e-5)


def test_llama3_with_as_many_key_heads_as_heads_is_vicuna():
    c, x = replace(FILES["llama3"][1], kv_heads=4, rope_base=10000.0), noise(1, 9, 64)
    assert torch.equal(filled(llama3.Decoder(c))(x, NINE), filled(vicuna.Decoder(FILES["vicuna"][1]))(x, NINE))


# ---------------------------------------------------------------------------------------------------- config.json

REAL = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "vocab_size": 32000,
        "max_position_embeddings": 4096, "hidden_act": "silu", "rope_scaling": None, "model_type": "llama"}


def test_a_published_config_is_read_whole():
    assert vicuna.Config.from_json(REAL) == vicuna.Config(
        vocab=32000, width=5120, layers=40, heads=40, kv_heads=40, hidden=13824, rope_base=10000.0, norm_eps=1e-5,
        positions=4096)


@both
def test_keys_that_transformers_omits_have_llama_configs_defaults(file, c):
    config = file.Config.from_json({})
    assert config == file.Config(vocab=32000, width=4096, layers=32, heads=32, kv_heads=32, hidden=11008,
                                 rope_base=10000.0, norm_eps=1e-6, positions=2048)


@both
def test_rope_theta_is_read_where_transformers_5_writes_it(file, c):
    raw = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    assert file.Config.from_json(raw).rope_base == 500000.0
    assert file.Config.from_json({"rope_theta": 500000.0}).rope_base == 500000.0


@both
@pytest.mark.parametrize("odd", [
    {"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True},
    {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"quantization_config": {"bits": 4}}, {"sliding_window": 4096},
    {"head_dim": 64}, {"model_type": "mistral"}, {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0}}],
    ids=lambda odd: next(iter(odd)))
def test_a_setting_that_would_change_the_arithmetic_is_refused_by_name(file, c, odd):
    with pytest.raises(ValueError, match=next(iter(odd))):
        file.Config.from_json({**REAL, **odd})


def test_each_decoder_refuses_key_heads_it_cannot_serve():
    with pytest.raises(ValueError, match="num_key_value_heads"):
        vicuna.Config.from_json({**REAL, "num_key_value_heads": 8})
    with pytest.raises(ValueError, match="num_key_value_heads"):
        llama3.Config.from_json({**REAL, "num_key_value_heads": 7})
    assert llama3.Config.from_json({**REAL, "num_key_value_heads": 8}).kv_heads == 8


@both
@pytest.mark.parametrize("sizes", [{"hidden_size": 5121}, {"hidden_size": 120}, {"num_hidden_layers": 0},
                                   {"vocab_size": -1}, {"intermediate_size": True}], ids=lambda sizes: str(sizes)[1:-1])
def test_sizes_that_no_model_can_have_are_refused(file, c, sizes):
    raw = REAL if file is vicuna else REAL | {"num_key_value_heads": 8}
    assert file.Config.from_json(raw).head_size == 128
    with pytest.raises(ValueError, match="impossible sizes in the config"):
        file.Config.from_json(raw | sizes)


# ---------------------------------------------------------------------------------------------------- transformers

def twin(file, c, dtype):
    """transformers' model with the same weights as `filled`, eager attention, its angles in float32."""
    hf = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    kind, more = ("Qwen2", {"tie_word_embeddings": c.tied}) if file is qwen2 else ("Llama", {})
    config = getattr(hf, f"{kind}Config")(
        **more, vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, rms_norm_eps=c.norm_eps, rope_theta=c.rope_base,
        max_position_embeddings=c.positions, attn_implementation="eager")
    theirs, ours = getattr(hf, f"{kind}ForCausalLM")(config).eval().requires_grad_(False), filled(file.Decoder(c))
    state, names = ours.state_dict(), {name: file.rename(name) for name in theirs.state_dict()}
    if getattr(c, "tied", False):                                   # theirs names one matrix twice
        del names["lm_head.weight"]
    assert sorted(names.values()) == sorted(state)                  # each of their names is one of ours, and its own
    theirs.load_state_dict({name: state[mine] for name, mine in names.items()}, strict=not getattr(c, "tied", False))
    angles = theirs.model.rotary_emb.inv_freq.clone()
    theirs.to(dtype).model.rotary_emb.inv_freq = angles             # .to() rounds this buffer
    return theirs, ours.to(dtype)


@three
@every_dtype
def test_every_hidden_state_is_transformers_own_bit_for_bit_with_attention_as_written(file, c, dtype, monkeypatch):
    monkeypatch.setattr(file.Block, "kernel", staticmethod(file.attend))
    theirs, model = twin(file, c, dtype)                            # D = 16, so that 1 / sqrt(D) is exact
    ids = torch.randint(c.vocab, (1, 30), generator=torch.Generator().manual_seed(6))
    reference = theirs(ids, output_hidden_states=True)
    x, (cos, sin) = model.embed_tokens(ids), model.rope(torch.arange(30))
    for i, layer in enumerate(model.layers):
        assert torch.equal(x, reference.hidden_states[i]), f"before layer {i}"
        x = layer(x, cos, sin, None)
    assert torch.equal(model.norm(x), reference.hidden_states[-1])
    assert torch.equal(model.lm_head(model.norm(x)), reference.logits)


@three
@every_dtype
def test_the_fused_kernel_gives_transformers_logits_within_rounding(file, c, dtype):
    theirs, model = twin(file, c, dtype)
    ids = torch.randint(c.vocab, (1, 30), generator=torch.Generator().manual_seed(6))
    h = model(model.embed_tokens(ids), torch.arange(30))
    ours, reference = model.lm_head(model.norm(h)), theirs(ids).logits
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (ours - reference).abs().max() <= bound * reference.abs().max()


@three
@every_dtype
def test_one_norm_one_rotation_one_mlp_and_one_layer_alone_are_transformers_own(file, c, dtype, monkeypatch):
    monkeypatch.setattr(file.Block, "kernel", staticmethod(file.attend))
    theirs, model = twin(file, c, dtype)
    x, positions = noise(1, 7, c.width, dtype=dtype), torch.arange(300, 307)
    mine, other = model.layers[1], theirs.model.layers[1]
    assert torch.equal(model.norm(x), theirs.model.norm(x))
    cos, sin = model.rope(positions)
    their_cos, their_sin = theirs.model.rotary_emb(x, positions[None])
    assert torch.equal(cos, their_cos[0]) and torch.equal(sin, their_sin[0])
    assert torch.equal(mine.mlp(x), other.mlp(other.post_attention_layernorm(x)))
    mask = random_mask(7)
    assert torch.equal(mine(x, cos, sin, mask), other(x, attention_mask=mask.to(dtype)[None, None],
                                                      position_embeddings=(their_cos, their_sin)))


# ---------------------------------------------------------------------------------------------------- copies

def definitions(file):
    """Functions and classes of a file, and methods as Class.method -> their syntax trees, docstrings included."""
    top = [node for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if hasattr(node, "name")]
    methods = {f"{node.name}.{part.name}": part for node in top if isinstance(node, ast.ClassDef)
               for part in node.body if hasattr(part, "name")}
    return {name: ast.dump(node) for name, node in ({node.name: node for node in top} | methods).items()}


@pytest.mark.parametrize("name", [
    "check_sizes", "RMSNorm", "rope_table", "rotate", "causal", "additive", "to_mask", "attention_weights", "attend",
    "attend_fast", "Block.attend", "Block.output", "Block.mlp", "Block.forward", "Decoder", "rename", "load", "main"])
def test_what_both_decoders_define_is_one_text(name):
    assert definitions("vicuna.py")[name] == definitions("llama3.py")[name]


@pytest.mark.parametrize("name", ["causal", "additive", "to_mask"])
def test_a_mask_is_made_in_one_way_in_decoders_and_in_fork(name):
    assert definitions("fork.py")[name] == definitions("vicuna.py")[name] == definitions("llama3.py")[name]


@pytest.mark.parametrize("name", [
    "RMSNorm", "rope_table", "rotate", "causal", "additive", "attention_weights", "attend", "attend_fast",
    "repeat_heads", "Block.qkv", "Block.weights", "Block.attend", "Block.each_head", "Block.output", "Block.mlp",
    "Block.forward", "Decoder.forward", "load_into", "fail"])
def test_what_qwen2_did_not_change_is_llama3s_text(name):
    assert definitions("qwen2.py")[name] == definitions("llama3.py")[name]


@pytest.mark.parametrize("name", ["check_sizes", "Block", "Encoder"])
def test_what_both_towers_define_is_one_text(name):
    assert definitions("siglip_vit.py")[name] == definitions("clip_vit.py")[name]


@pytest.mark.parametrize("name", ["stored", "read", "load_into", "fail"])
def test_what_all_leaves_but_qwen2_define_is_one_text(name):
    assert definitions("vicuna.py")[name] == definitions("llama3.py")[name] == definitions("clip_vit.py")[name]
    assert definitions("siglip_vit.py")[name] == definitions("clip_vit.py")[name]


COPY_SETS = {"vicuna.py": [], "llama3.py": [], "clip_vit.py": [], "views.py": [], "fork.py": [],
             "siglip_vit.py": [], "qwen2.py": [], "llava_onevision.py": [
                 "views.py", "clip_vit.py", "vicuna.py", "llama3.py", "llava_min.py", "siglip_vit.py", "qwen2.py"],
             "llava_min.py": ["views.py", "clip_vit.py", "vicuna.py", "llama3.py"], "groups.py": ["views.py"],
             "knockout.py": ["fork.py"], "lens.py": ["fork.py", "knockout.py"], "prune.py": ["fork.py", "knockout.py"],
             "patch.py": ["fork.py", "knockout.py", "score.py"], "score.py": ["fork.py"], "heads.py": [],
             "maps.py": ["fork.py", "knockout.py", "score.py"], "eval_gqa.py": []}

# Imports one module from each folder below the working directory, where to open anything of the repository is an error;
# prints what it imported from there. A virtual environment may lie in the repository. One process for all: most of its
# time is torch's import.
ALONE = """
import sys
from importlib import import_module
from pathlib import Path

root, here = Path(sys.argv[1]), Path.cwd()

def watch(event, args):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], str):
        path = Path(args[0]).absolute()
        assert not path.is_relative_to(root) or path.is_relative_to(sys.prefix) or path.is_relative_to(here), path

sys.addaudithook(watch)
others = [path for path in sys.path if Path(path) != root]
for folder in sorted(here.iterdir()):
    sys.path[:] = [str(folder), *others]
    import_module(folder.name)
    files = {name: Path(m.__file__) for name, m in list(sys.modules.items()) if getattr(m, "__file__", None)}
    mine = {name: file for name, file in files.items() if file.is_relative_to(here)}
    print(folder.name, *sorted(file.name for file in mine.values() if file.parent == folder), len(mine))
    for name in mine:
        del sys.modules[name]
sys.path.insert(0, str(root))
try:
    import harness
except AssertionError:
    print("no repository")
"""


@pytest.mark.slow
def test_every_file_works_when_copied_with_its_copy_set_and_needs_all_of_it(tmp_path):
    for file, others in COPY_SETS.items():
        folder = tmp_path / file.removesuffix(".py")
        folder.mkdir()
        for f in (file, *others):
            shutil.copy(ROOT / f, folder)
    done = subprocess.run([sys.executable, "-I", "-c", ALONE, ROOT], cwd=tmp_path, env={"PATH": ""},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *(f"{file.removesuffix('.py')} {' '.join(sorted([file, *others]))} {1 + len(others)}"
          for file, others in sorted(COPY_SETS.items())), "no repository"]
