"""
harness/baseline.py - transformers on our weights: what bench.py compares with.

Needs   transformers, torch; vicuna.py for the names of its parameters
"""
import torch

import vicuna


def theirs_on_meta(c):
    """-> (transformers' LlamaForCausalLM of our Config, without memory, {our parameter's name: its name there})."""
    from transformers import LlamaForCausalLM
    with torch.device("meta"):
        theirs = LlamaForCausalLM._from_config(hf_config(c), attn_implementation="sdpa")
    return theirs, {vicuna.rename(name): name for name in theirs.state_dict()}


def theirs_of(ours):
    """transformers' LlamaForCausalLM with SDPA on the very memory of our decoder's weights."""
    theirs, names = theirs_on_meta(ours.config)
    theirs.load_state_dict({names[n]: p for n, p in ours.named_parameters()}, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config).to(ours.lm_head.weight.device)
    return theirs.eval().requires_grad_(False)


def hf_config(c):
    from transformers import LlamaConfig
    return LlamaConfig(vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers,
                       num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, rms_norm_eps=c.norm_eps,
                       max_position_embeddings=c.positions, rope_theta=c.rope_base)


def papers_forward(theirs, encode, x, clean, blocked, layers):
    """One point of a curve as the paper's code computes it: encode the photo, run the model with the blocked 4D mask in
    the window's layers -> logits (V,)."""
    def swap(module, args, kwargs):
        return args, kwargs | {"attention_mask": blocked}
    hooks = [theirs.model.layers[i].self_attn.register_forward_pre_hook(swap, with_kwargs=True) for i in layers]
    encode()
    logits = theirs(inputs_embeds=x, attention_mask=clean, use_cache=False, logits_to_keep=1).logits[0, 0]
    for hook in hooks:
        hook.remove()
    return logits
