"""A tiny Llama as a GGUF file, with the tokenizer of tests/tiny.py inside."""

import json
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

from tests.tiny import tiny_tokenizer

CHANNELS, HIDDEN, HEADS, KV_HEADS, LAYERS = 32, 64, 4, 2, 2


def tiny_gguf(path: Path, *, seed: int = 0) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """Write `path`; returns the tensors that are in it."""
    tokenizer = tiny_tokenizer(path.parent / "tokenizer-of-gguf")
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    tokens[0] = "<|endoftext|>"  # transformers' reader would add it under an id of its own
    special = {tokens[0], *tokenizer.all_special_tokens}
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(CHANNELS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(CHANNELS // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if t in special else TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    rng = np.random.default_rng(seed)
    kv = CHANNELS // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(tokens), CHANNELS),
        "output_norm.weight": (CHANNELS,),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (CHANNELS,),
            f"blk.{layer}.ffn_norm.weight": (CHANNELS,),
            f"blk.{layer}.attn_q.weight": (CHANNELS, CHANNELS),
            f"blk.{layer}.attn_k.weight": (kv, CHANNELS),
            f"blk.{layer}.attn_v.weight": (kv, CHANNELS),
            f"blk.{layer}.attn_output.weight": (CHANNELS, CHANNELS),
            f"blk.{layer}.ffn_gate.weight": (HIDDEN, CHANNELS),
            f"blk.{layer}.ffn_up.weight": (HIDDEN, CHANNELS),
            f"blk.{layer}.ffn_down.weight": (CHANNELS, HIDDEN),
        }
    tensors = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
