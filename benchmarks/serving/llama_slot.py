"""Save and restore llama.cpp's KV cache as its server does for slots; prefix_cache.py runs it.

    PYTHON llama_slot.py save|restore GGUF STATE THREADS < prompt.json

save prefills the prompt (token ids) and saves the sequence; restore loads it and decodes the last
token. Prints JSON: seconds to the first token, of saving, and bytes of the file.
"""

import ctypes
import json
import os
import sys
import time


def main() -> None:
    import llama_cpp as api  # pyright: ignore[reportMissingImports]

    mode, gguf, state, threads = sys.argv[1:]
    ids = json.load(sys.stdin)
    quiet = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(quiet, None)
    api.llama_backend_init()
    settings = api.llama_model_default_params()
    settings.n_gpu_layers = 0
    # llama.cpp aborts on the graph of deepseek2 if its AMX buffers hold quantized weights
    settings.use_extra_bufts = b"AMX_INT8 = 1" not in api.llama_print_system_info()
    model = api.llama_model_load_from_file(gguf.encode(), settings)
    options = api.llama_context_default_params()
    options.n_ctx = len(ids) + 64
    options.n_threads = options.n_threads_batch = int(threads)
    context = api.llama_init_from_model(model, options)
    size = api.llama_n_batch(context)
    tokens = (api.llama_token * len(ids))(*ids)

    def decode(part: list[int]) -> None:
        batch = (api.llama_token * len(part))(*part)
        if api.llama_decode(context, api.llama_batch_get_one(batch, len(part))):
            raise SystemExit("llama.cpp cannot decode")

    began = time.perf_counter()
    found: dict[str, float] = {}
    if mode == "save":
        for start in range(0, len(ids) - 1, size):
            decode(ids[start : min(start + size, len(ids) - 1)])
        decode(ids[-1:])
        found["first_token_seconds"] = time.perf_counter() - began
        # without the last token, which is decoded after restoring
        api.llama_memory_seq_rm(api.llama_get_memory(context), 0, len(ids) - 1, -1)
        began = time.perf_counter()
        path = state.encode()
        if not api.llama_state_seq_save_file(context, path, 0, tokens, len(ids) - 1):
            raise SystemExit("llama.cpp cannot save the sequence")
        found["save_seconds"] = time.perf_counter() - began
        found["bytes"] = os.path.getsize(state)
    else:
        restored = (api.llama_token * len(ids))()
        count = ctypes.c_size_t()
        if not api.llama_state_seq_load_file(
            context, state.encode(), 0, restored, len(ids), ctypes.byref(count)
        ):
            raise SystemExit("llama.cpp cannot restore the sequence")
        if list(restored[: count.value]) != ids[:-1]:
            raise SystemExit("llama.cpp restored another prompt")
        decode(ids[-1:])
        found["first_token_seconds"] = time.perf_counter() - began
    print(json.dumps(found))


if __name__ == "__main__":
    main()
