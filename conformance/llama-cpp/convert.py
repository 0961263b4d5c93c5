#!/usr/bin/env python3
"""A DeepSeek folder as a BF16 GGUF file, written by llama.cpp's own `gguf` package in the layout of its
conversion/deepseek.py (which itself needs torch): the second opinion on what `oxseek quantize` writes.

usage: convert.py FOLDER OUT.gguf      needs numpy and gguf (PyPI)
"""
import glob
import json
import sys

import gguf
import numpy as np

folder, out = sys.argv[1:]
config = json.load(open(f"{folder}/config.json", encoding="utf-8"))


def read(path):
    raw = np.memmap(path, mode="r", dtype=np.uint8)
    length = int(raw[:8].view("<u8")[0])
    header = json.loads(bytes(raw[8:8 + length]))
    header.pop("__metadata__", None)
    return {n: (t, raw[8 + length + t["data_offsets"][0]:8 + length + t["data_offsets"][1]])
            for n, t in header.items()}


stored = {}
for shard in sorted(glob.glob(f"{folder}/*.safetensors")):
    stored.update(read(shard))

codes = np.arange(256)
exponent, mantissa = (codes >> 3) & 15, codes & 7
E4M3 = np.where(exponent == 0, mantissa / 512.0, (1 + mantissa / 8.0) * 2.0 ** (exponent - 7.0))
E4M3 = np.where(codes & 128, -E4M3, E4M3).astype(np.float32)


def tensor(name):
    """As F32."""
    t, raw = stored[name]
    shape = t["shape"]
    if t["dtype"] == "F32":
        return raw.view("<f4").reshape(shape)
    if t["dtype"] == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    assert t["dtype"] == "F8_E4M3", t["dtype"]
    scale = tensor(name + "_scale_inv").repeat(128, 0).repeat(128, 1)
    return E4M3[raw].reshape(shape) * scale[:shape[0], :shape[1]]


def bf16(x):
    u = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


c, w = config, gguf.GGUFWriter(out, "deepseek2")
w.add_name("converted")
yarn = c["rope_scaling"]
latent, rope = c["kv_lora_rank"], c["qk_rope_head_dim"]
heads, key, value = c["num_attention_heads"], c["qk_nope_head_dim"], c["v_head_dim"]
whole = {
    "block_count": c["num_hidden_layers"], "context_length": c["max_position_embeddings"],
    "embedding_length": c["hidden_size"], "feed_forward_length": c["intermediate_size"],
    "attention.head_count": heads, "attention.head_count_kv": 1,
    "rope.scaling.original_context_length": yarn["original_max_position_embeddings"],
    "expert_count": c["n_routed_experts"], "expert_used_count": c["num_experts_per_tok"],
    "expert_group_count": c["n_group"], "expert_group_used_count": c["topk_group"], "expert_gating_func": 2,
    "leading_dense_block_count": c["first_k_dense_replace"], "vocab_size": c["vocab_size"],
    "attention.q_lora_rank": c["q_lora_rank"], "attention.kv_lora_rank": latent,
    "attention.key_length": latent + rope, "attention.value_length": latent,
    "attention.key_length_mla": key + rope, "attention.value_length_mla": value,
    "expert_feed_forward_length": c["moe_intermediate_size"], "expert_shared_count": c["n_shared_experts"],
    "rope.dimension_count": rope,
}
real = {
    "rope.scaling.factor": yarn["factor"], "rope.scaling.yarn_beta_fast": yarn["beta_fast"],
    "rope.scaling.yarn_beta_slow": yarn["beta_slow"],
    "rope.scaling.yarn_log_multiplier": 0.1 * yarn["mscale_all_dim"], "rope.freq_base": c["rope_theta"],
    "attention.layer_norm_rms_epsilon": c["rms_norm_eps"], "expert_weights_scale": c["routed_scaling_factor"],
}
for k, v in whole.items():
    w.add_uint32("deepseek2." + k, v)
for k, v in real.items():
    w.add_float32("deepseek2." + k, float(v))
w.add_string("deepseek2.rope.scaling.type", "yarn")
w.add_bool("deepseek2.expert_weights_norm", c["norm_topk_prob"])
w.add_file_type(32)
w.add_quantization_version(2)

tokenizer = json.load(open(f"{folder}/tokenizer.json", encoding="utf-8"))
tokens = [f"[PAD{i}]" for i in range(c["vocab_size"])]
types = [gguf.TokenType.UNUSED] * c["vocab_size"]
for text, i in tokenizer["model"]["vocab"].items():
    tokens[i], types[i] = text, gguf.TokenType.NORMAL
for added in tokenizer["added_tokens"]:
    text, i = added["content"], added["id"]
    control = added["special"] or text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>"))
    tokens[i], types[i] = text, gguf.TokenType.CONTROL if control else gguf.TokenType.USER_DEFINED
w.add_tokenizer_model("gpt2")
w.add_tokenizer_pre("deepseek-v3")
w.add_token_list(tokens)
w.add_token_types(types)
w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
w.add_bos_token_id(c["bos_token_id"])
w.add_eos_token_id(c["eos_token_id"])
w.add_add_bos_token(True)
w.add_chat_template(json.load(open(f"{folder}/tokenizer_config.json", encoding="utf-8"))["chat_template"])


def exact(name, source):
    w.add_tensor(name, np.ascontiguousarray(tensor(source), dtype=np.float32))


def matrix(name, x):
    w.add_tensor(name, bf16(x), raw_shape=x.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)


matrix("token_embd.weight", tensor("model.embed_tokens.weight"))
exact("output_norm.weight", "model.norm.weight")
matrix("output.weight", tensor("lm_head.weight"))
for layer in range(c["num_hidden_layers"]):
    p, b = f"model.layers.{layer}.", f"blk.{layer}."
    exact(b + "attn_norm.weight", p + "input_layernorm.weight")
    exact(b + "ffn_norm.weight", p + "post_attention_layernorm.weight")
    exact(b + "attn_q_a_norm.weight", p + "self_attn.q_a_layernorm.weight")
    exact(b + "attn_kv_a_norm.weight", p + "self_attn.kv_a_layernorm.weight")
    for name, source in [("attn_q_a", "q_a_proj"), ("attn_q_b", "q_b_proj"), ("attn_kv_a_mqa", "kv_a_proj_with_mqa"),
                         ("attn_output", "o_proj")]:
        matrix(f"{b}{name}.weight", tensor(f"{p}self_attn.{source}.weight"))
    kv = tensor(p + "self_attn.kv_b_proj.weight").reshape(heads, key + value, latent)
    matrix(b + "attn_k_b.weight", kv[:, :key].transpose(0, 2, 1))
    matrix(b + "attn_v_b.weight", kv[:, key:])
    kinds = ("gate", "up", "down")
    if layer < c["first_k_dense_replace"]:
        for kind in kinds:
            matrix(f"{b}ffn_{kind}.weight", tensor(f"{p}mlp.{kind}_proj.weight"))
        continue
    exact(b + "ffn_gate_inp.weight", p + "mlp.gate.weight")
    exact(b + "exp_probs_b.bias", p + "mlp.gate.e_score_correction_bias")
    for kind in kinds:
        experts = [tensor(f"{p}mlp.experts.{e}.{kind}_proj.weight") for e in range(c["n_routed_experts"])]
        matrix(f"{b}ffn_{kind}_exps.weight", np.stack(experts))
        matrix(f"{b}ffn_{kind}_shexp.weight", tensor(f"{p}mlp.shared_experts.{kind}_proj.weight"))
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_tensors_to_file()
w.close()
