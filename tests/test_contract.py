"""python -m pytest tests/test_contract.py -v

The contract of a model file (decoder, vision tower, whole model): what instruments rely on, checked for every file that
is registered below. A new model is added to these lists; no instrument changes for it.
"""
import ast
import copy
import math
from pathlib import Path

import pytest
import torch
import world
import world_onevision

import clip_vit
import lens
import llava_min
import prune
import qwen2
import siglip_vit
from fork import causal, clean_pass, to_mask, unembed
from knockout import curve, cut, edge_mask, forward, sweep

ROOT = Path(__file__).resolve().parents[1]
DECODERS = {file.__name__: file for file in (*llava_min.DECODERS, qwen2)}
TOWERS = {file.__name__: file for file in (clip_vit, siglip_vit)}
MODELS = [*world.KINDS, *world_onevision.KINDS]    # whole models; these write a tiny checkpoint of each
T = 11                                             # tokens of the prompts below
every_decoder = pytest.mark.parametrize("file", DECODERS.values(), ids=DECODERS)


def filled(module, seed=0):
    """Random weights, large enough that attention is not flat."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        scale = 0.2 if p.dim() == 1 else 1.0 if "embed" in name else 1.4 / math.sqrt(p.shape[-1])
        p.data = torch.randn(p.shape, generator=g) * scale + (p.dim() == 1 and name.endswith("weight"))
    return module.double().eval().requires_grad_(False)


def small(file):
    """A small random decoder of a file, in float64, with as many key heads as the file wants."""
    sizes = {"vocab_size": 60, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
             "intermediate_size": 80, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}
    kinds = {"num_key_value_heads": 4}, {"num_key_value_heads": 2}, {"num_key_value_heads": 2, "model_type": "qwen2"}
    raw = next(sizes | kind for kind in kinds if file.reads(kind | {"num_attention_heads": 4}))
    return filled(file.Decoder(file.Config.from_json(raw)))


@pytest.fixture(scope="module", params=DECODERS.values(), ids=DECODERS)
def case(request):
    """(decoder, embeddings (1, T, C), positions (T,)) of every registered decoder."""
    d = small(request.param)
    x = d.embed_tokens(torch.randint(60, (1, T), generator=torch.Generator().manual_seed(1)))
    return d, x, torch.arange(T)


# ---------------------------------------------------------------------------------------------------- decoder files

@every_decoder
def test_a_decoder_file_has_config_tokenizer_template_and_tokens(file):
    before, after = file.TEMPLATE
    assert isinstance(before, str) and isinstance(after, str) and isinstance(file.PAPER_END, str)
    assert file.BOS is None or isinstance(file.BOS, str)
    assert file.EOS and all(isinstance(token, str) for token in file.EOS)
    assert all(map(callable, (file.Config.from_json, file.load_tokenizer, file.reads, file.rename)))


@pytest.mark.parametrize("file", llava_min.DECODERS, ids=lambda file: file.__name__)
def test_a_config_json_belongs_to_one_file_alone(file):
    raw = {"num_attention_heads": 4, "num_key_value_heads": small(file).config.kv_heads}
    assert [f for f in DECODERS.values() if f.reads(raw)] == [file]


def test_a_decoder_has_the_parts_and_sizes_that_instruments_use(case):
    d, x, positions = case
    c = d.config
    assert (c.layers, c.heads, c.width, c.vocab, c.positions) == (4, 4, 48, 60, 64) and c.heads % c.kv_heads == 0
    assert c.head_size * c.heads == c.width and len(d.layers) == c.layers
    cos, sin = d.rope(positions)
    assert x.shape == (1, T, 48) and cos.shape == sin.shape == (T, c.head_size)
    assert d.lm_head(d.norm(x)).shape == (1, T, 60)


def test_a_blocks_steps_have_these_shapes(case):
    d, x, positions = case
    c, layer, (cos, sin) = d.config, d.layers[0], d.rope(positions)
    q, k, v = layer.qkv(x, cos, sin)
    assert q.shape == (1, c.heads, T, c.head_size) and k.shape == v.shape == (1, c.kv_heads, T, c.head_size)
    assert layer.each_head(q, k, v, None).shape == q.shape
    assert layer.weights(q, k, None).shape == (1, c.heads, T, T)
    assert layer.attend(q, k, v, None).shape == layer.mlp(x).shape == x.shape


def test_a_block_adds_attention_and_then_the_mlp_to_the_stream_and_nothing_else(case):
    """Eq. 1, to the bit."""
    d, x, positions = case
    mask = to_mask(cut(causal(T), [2, 3], [7, 8]))
    for layer in d.layers:
        q, k, v = layer.qkv(x, *d.rope(positions))
        a = layer.attend(q, k, v, mask)
        assert torch.equal(a, layer.output(layer.each_head(q, k, v, mask)))
        assert torch.equal(layer(x, *d.rope(positions), mask), (x + a) + layer.mlp(x + a))


def test_weights_are_what_the_kernel_uses_and_a_cut_edge_has_none(case):
    d, x, positions = case
    c, layer = d.config, d.layers[1]
    q, k, v = layer.qkv(x, *d.rope(positions))
    mask = to_mask(cut(causal(T), [2, 3], [7, 8]))
    w = layer.weights(q, k, mask)
    torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]), rtol=1e-6, atol=1e-6)
    assert (w[:, :, [7, 8]][..., [2, 3]] == 0).all() and (w[:, :, 9, [2, 3]] > 0).all()
    served = v.repeat_interleave(c.heads // c.kv_heads, 1)          # one key head serves its neighbours
    torch.testing.assert_close(layer.each_head(q, k, v, mask), w @ served, rtol=1e-5, atol=1e-6)
    own = k.repeat_interleave(c.heads // c.kv_heads, 1)             # a key head for each query head is taken, too
    assert torch.equal(layer.attend(q, own, served, mask), layer.attend(q, k, v, mask))


def test_rotation_depends_on_the_positions_that_come_with_the_prompt(case):
    d, x, positions = case
    whole, shifted = d(x, positions), d(x, positions + 7)
    torch.testing.assert_close(whole, shifted, rtol=1e-5, atol=1e-5)    # only distances count ...
    assert not torch.allclose(whole, d(x, 2 * positions), atol=1e-3)    # ... and these are twice as large


# ---------------------------------------------------------------------------------------------------- interventions

def test_an_empty_cut_gives_the_same_bits(case):
    d, x, positions = case
    clean, empty = to_mask(causal(T)), edge_mask(d, T, [], [5])
    base = forward(d, x, positions, clean, clean, ())
    assert torch.equal(forward(d, x, positions, clean, empty, range(4)), base)
    assert torch.equal(clean_pass(d, x, positions).stream[-1], base)
    half = copy.deepcopy(d).half()
    args = half, x.half(), positions, clean
    assert torch.equal(forward(*args, empty, range(4)), forward(*args, clean, ()))


@pytest.mark.parametrize("heads", [None, [0, 3]])
def test_the_sweep_equals_the_plain_loop(case, heads):
    d, x, positions = case
    cuts = [([2, 3, 4], [6, 7]), ([6, 7], [T - 1]), ([T - 1], [T - 1]), ([1], [4, 9])]
    swept = sweep(d, clean_pass(d, x, positions), cuts, 5, 2, heads)
    plain = [curve(d, x, positions, *places, 5, 2, heads) for places in cuts]
    torch.testing.assert_close(torch.tensor(swept), torch.tensor(plain), rtol=1e-6, atol=0)
    assert torch.tensor(plain).std() > 0


@pytest.mark.parametrize("first", range(5))
def test_dropping_tokens_equals_the_mask_that_hides_them(case, first):
    d, x, positions = case
    image = [2, 3, 4, 5]
    h, _, left = prune.prefill(d, x, positions, image, first)
    hidden = to_mask(cut(causal(T), image, range(6, T)))
    whole = forward(d, x, positions, to_mask(causal(T)), hidden, range(first, 4))
    torch.testing.assert_close(unembed(d, h[0, -1]), unembed(d, whole[0, -1]), rtol=1e-10, atol=1e-10)
    assert left == ([] if first < 4 else image)


def test_decoding_with_a_cache_equals_a_full_pass(case):
    d, x, positions = case
    whole, caches = d(x, positions), [[] for _ in d.layers]
    parts = [d(x[:, a:b], positions[a:b], None, caches) for a, b in ((0, 6), (6, 7), (7, 8), (8, T))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
    assert all(k.shape == v.shape == (1, d.config.kv_heads, T, d.config.head_size) for k, v in caches)


@pytest.mark.parametrize("norm", ["raw", "final"])
def test_the_lens_at_the_last_layer_is_the_logits(case, norm):
    d, x, positions = case
    p = lens.lens(d, clean_pass(d, x, positions).stream, [3, T - 1], norm)
    torch.testing.assert_close(p[-1], unembed(d, d(x, positions))[0, [3, T - 1]].float().softmax(-1))


def test_without_a_module_equals_the_gate_that_closes_it(case):
    d, x, positions = case
    question, clean = [4, 5, 6], clean_pass(d, x, positions)
    base, = lens.word_sets(d, clean.stream[-1][:, question])
    swept = lens.module_curves(d, clean, question, 2)
    for module in lens.MODULES:
        plain = [lens.without(d, x, positions, question, module, lens.onward(l, 2, 4))[:, question] for l in range(4)]
        assert swept[module] == [lens.jaccard(base, lens.word_sets(d, h)[0]) for h in plain]


# ---------------------------------------------------------------------------------------------------- vision towers

@pytest.mark.parametrize("file", TOWERS.values(), ids=TOWERS)
def test_a_tower_hands_out_one_feature_per_patch_row_by_row(file):
    """Changing the pixels of one patch changes its own feature, in the first layer's input, and no other."""
    c = file.Config(width=32, layers=3, heads=4, hidden=64, image=56, patch=14)
    tower = filled(file.Tower(c)).float()
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    assert tower.features(pixels, -2).shape == (2, 16, 32)
    other = pixels.clone()
    other[0, :, 14:28, 42:56] += 1                                  # row 1, column 3: patch 7
    moved = (tower.features(pixels, 0) - tower.features(other, 0)).abs().amax(-1) > 0
    assert moved.nonzero().tolist() == [[0, 7]]
    assert len(file.MEAN) == len(file.STD) == 3


# ---------------------------------------------------------------------------------------------------- whole models

@pytest.mark.parametrize("kind", MODELS)
def test_a_model_makes_prompts_embeddings_and_answers(model, kind):
    m = model(kind)
    image = world.picture(90, 60) if m.config.vision else None
    p = m.prompt("Is the cup red or blue?", image)
    n = len(p)
    assert len(p.tokens) == len(p.spans) == n and p.positions.tolist() == list(range(n))
    assert len(p.image) == (len(p.slots) if image else 0)
    assert all(p.tokens[i] == "" and p.spans[i] is None for i in p.image)
    assert all(0 <= a <= b <= len(p.text) for a, b in filter(None, p.spans))
    a, b = p.parts["question"]
    assert p.text[a:b] == p.question
    x = m.embed(p)
    assert x.shape == (1, n, m.decoder.config.width) and m.stop and m.tokenizer
    logits, caches = m.prefill(x, p.positions)
    torch.testing.assert_close(logits[0], m(p)[0, -1], rtol=1e-5, atol=1e-5)
    before = [k.shape[2] for k, _ in caches]
    ids, = m.decode(logits, caches, n, 4)
    assert [k.shape[2] for k, _ in caches] == before                # the caller's caches are left alone
    full = []
    for _ in range(4):                                              # once more, without a cache
        y = torch.cat((x, m.decoder.embed_tokens(torch.tensor([full], dtype=torch.long))), 1)
        best = unembed(m.decoder, m.decoder(y, torch.arange(y.shape[1])))[0, -1].argmax().item()
        if best in m.stop:
            break
        full.append(best)
    assert ids == full and m.words(ids) == m.generate(p, 4)


# ---------------------------------------------------------------------------------------------------- from outside

INSTRUMENTS = ["fork.py", "knockout.py", "lens.py", "prune.py", "eval_gqa.py", "check.py", "harness/experiment.py"]
PUBLIC = {"embed_tokens", "rope", "layers", "norm", "lm_head", "config",                # of a decoder
          "qkv", "weights", "each_head", "output", "attend", "mlp"}                     # of a block


@pytest.mark.parametrize("file", INSTRUMENTS)
def test_no_instrument_knows_a_decoders_insides(file):
    """Attributes that some decoder or block defines, and that are not in the contract, occur in no instrument."""
    inside = set()
    for d in map(small, DECODERS.values()):
        for module in (d, d.layers[0]):
            inside |= {name.partition(".")[0] for name, _ in module.named_parameters()} | set(vars(type(module)))
    inside = {name for name in inside if not name.startswith("_")} - PUBLIC - {"forward"}
    assert {"q_proj", "down_proj", "input_layernorm", "kernel"} <= inside
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not used & inside
