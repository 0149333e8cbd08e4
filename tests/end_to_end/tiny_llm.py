"""A real LLM server on the CPU: llama.cpp's, one thread, on a random-weight model written here (half a megabyte).

Run as a program: ``tiny_llm.py MODEL.gguf PORT``. It prints ``ready`` once it answers.
"""

from __future__ import annotations

import sys
import threading
from importlib import import_module
from typing import Any

WIDTH, LAYERS, HEADS, KV_HEADS, HIDDEN, CONTEXT = 64, 2, 4, 2, 192, 4096
SLOTS = 2


def write_model(path: str) -> None:
    """A llama of random weights with a byte-level vocabulary, so that any text can be read and written."""
    import numpy as np

    gguf: Any = import_module("gguf")
    random = np.random.default_rng(7)
    tokens = [
        b"<unk>",
        b"<s>",
        b"</s>",
        *(f"<0x{byte:02X}>".encode() for byte in range(256)),
        b"\xe2\x96\x81",
    ]
    kinds = [2, 3, 3, *([6] * 256), 1]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    def weights(name: str, *shape: int) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.05).astype(np.float32))

    weights("token_embd.weight", len(tokens), WIDTH)
    weights("output.weight", len(tokens), WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{at}{norm}.weight", np.ones(WIDTH, np.float32))
        weights(f"{at}attn_q.weight", WIDTH, WIDTH)
        weights(f"{at}attn_k.weight", WIDTH // 2, WIDTH)
        weights(f"{at}attn_v.weight", WIDTH // 2, WIDTH)
        weights(f"{at}attn_output.weight", WIDTH, WIDTH)
        weights(f"{at}ffn_gate.weight", HIDDEN, WIDTH)
        weights(f"{at}ffn_up.weight", HIDDEN, WIDTH)
        weights(f"{at}ffn_down.weight", WIDTH, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(path: str, port: int) -> None:
    xllamacpp: Any = import_module("xllamacpp")
    write_model(path)
    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.endpoint_metrics = True
    settings.port = port
    settings.n_parallel = SLOTS
    settings.n_ctx = SLOTS * 1024
    settings.cpuparams.n_threads = 1
    settings.warmup = False
    server = xllamacpp.Server(settings)
    sys.stdout.write(f"ready {server.listening_address}\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
