"""A reader's first grep with a term of the field leads to the file that implements the idea."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TERMS = {
    # Engine
    "continuous batching": "lowlat/engine/scheduler.py",
    "batch invariance": "lowlat/engine/engine.py",
    "chunked prefill": "lowlat/engine/prefill_planner.py",
    "max_num_batched_tokens": "lowlat/engine/scheduler.py",
    "max_num_seqs": "lowlat/engine/scheduler.py",
    "preemption": "lowlat/engine/scheduler.py",
    "block allocator": "lowlat/engine/page_allocator.py",
    "free blocks": "lowlat/engine/page_allocator.py",
    "LRU eviction": "lowlat/engine/page_allocator.py",
    "num_blocks": "lowlat/engine/cache_size.py",
    "gpu_memory_utilization": "lowlat/engine/cache_size.py",
    "out of memory": "lowlat/engine/cache_size.py",
    "block table": "lowlat/attention/metadata.py",
    "slot_mapping": "lowlat/attention/metadata.py",
    "automatic prefix caching": "lowlat/engine/prefix.py",
    "prompt caching": "lowlat/engine/prefix.py",
    "kv_cache_dtype": "lowlat/utils/device.py",
    "KV cache quantization": "lowlat/attention/int8_entry.py",
    "max_model_len": "lowlat/generate/model.py",
    "stop token": "lowlat/engine/request.py",
    "parallel sampling": "lowlat/engine/params.py",
    "logits processor": "lowlat/engine/sampler.py",
    "speculative decoding": "lowlat/engine/speculative.py",
    "n-gram speculation": "lowlat/engine/prompt_lookup.py",
    "TTFT": "lowlat/engine/stats.py",
    "TPOT": "lowlat/engine/stats.py",
    "guided decoding": "lowlat/generate/grammar.py",
    # Server
    "backpressure": "lowlat/serve/async_engine.py",
    "rate limit": "lowlat/serve/config.py",
    "reasoning parser": "lowlat/serve/chat/output_parser.py",
    "guided_json": "lowlat/serve/protocol/structured_outputs.py",
    "server-sent events": "lowlat/serve/http/sse.py",
    "CORS": "lowlat/serve/http/security.py",
    "timing attack": "lowlat/serve/http/security.py",
    "function calling": "lowlat/serve/tool_parsers/base.py",
    "(CSP)": "lowlat/serve/http/pages.py",
    "Prometheus": "lowlat/serve/metrics.py",
    "graceful shutdown": "lowlat/serve/run.py",
    # Model, attention and operations
    "weight absorption": "lowlat/ops/mla.py",
    "weight tying": "lowlat/model/transformer.py",
    "attention mask": "lowlat/ops/attention.py",
    "online softmax": "lowlat/ops/attention.py",
    "varlen": "lowlat/attention/metadata.py",
    "NTK-by-parts": "lowlat/ops/rope.py",
    "group-limited top-k": "lowlat/ops/routing.py",
    "node-limited": "lowlat/ops/routing.py",
    "chunked cross entropy": "lowlat/ops/cross_entropy.py",
    "log-sum-exp": "lowlat/ops/cross_entropy.py",
    "dropless": "lowlat/ops/grouped.py",
    "act_quant": "lowlat/ops/fp8_training.py",
    "block-wise": "lowlat/ops/fp8.py",
    "per-token": "lowlat/ops/fp8_training.py",
    "per-channel": "lowlat/ops/quantized.py",
    "group size": "lowlat/ops/quantized.py",
    "zero point": "lowlat/ops/quantized.py",
    # Kernels
    "matmul": "csrc/kernels/gemm.h",
    "GEMV": "csrc/kernels/gemv.h",
    "grouped GEMM": "csrc/kernels/grouped_gemm.h",
    "asymmetric": "csrc/kernels/quantize.h",
    "paged attention": "csrc/kernels/paged_attention.h",
    "split-KV": "csrc/workspace.h",
    "cu_seqlens": "csrc/training.h",
    "thread pool": "csrc/thread_pool.h",
    # Training
    "aux loss": "lowlat/train/step/balance.py",
    "auxiliary-loss-free": "lowlat/train/step/balance.py",
    "MTP loss": "lowlat/train/step/loss.py",
    "gradient accumulation": "lowlat/train/step/passes.py",
    "gradient clipping": "lowlat/train/step/optim.py",
    "learning rate schedule": "lowlat/train/recipe/schedule.py",
    "fp32 master weights": "lowlat/train/step/optim.py",
    "autocast": "lowlat/train/run/build.py",
    "gradient checkpointing": "lowlat/train/layers/fused.py",
    "HSDP": "lowlat/train/parallel/fsdp.py",
    "world size": "lowlat/train/parallel/mesh.py",
    "sequence parallel": "lowlat/train/parallel/tensor.py",
    "ring attention": "lowlat/train/parallel/context.py",
    "expert parallel": "lowlat/train/parallel/expert.py",
    "1F1B": "lowlat/train/pipeline/schedule.py",
    "async checkpoint": "lowlat/train/checkpoints/store.py",
    # Data and text
    "dataloader": "lowlat/data/packing.py",
    "document mask": "lowlat/data/batch.py",
    "SFT": "lowlat/data/chat.py",
    "fill-in-the-middle": "lowlat/data/fim.py",
    "deduplication": "lowlat/data/selection.py",
    "decontamination": "lowlat/data/overlap.py",
    "byte fallback": "lowlat/text/token_bytes.py",
    # Files and conversion
    "HF_TOKEN": "lowlat/checkpoint/fetch/hub.py",
    "HF_ENDPOINT": "lowlat/checkpoint/fetch/hub.py",
    "resume a download": "lowlat/checkpoint/fetch/resumable_download.py",
    "max_shard_size": "lowlat/checkpoint/shard_layout.py",
    "imatrix": "lowlat/ops/weighted_quantization.py",
    "sharded checkpoint": "lowlat/checkpoint/shard_layout.py",
    "key mapping": "lowlat/checkpoint/mapping.py",
    "calibration data": "lowlat/convert/compression/calibration.py",
    "truncated SVD": "lowlat/convert/compression/low_rank.py",
    "rank allocation": "lowlat/convert/compression/budget.py",
    "PCA": "lowlat/convert/compression/low_rank.py",
    "whitening": "lowlat/convert/compression/low_rank.py",
    "sparse upcycling": "lowlat/convert/parameters/upcycle.py",
    # Tools
    "tok/s": "lowlat/bench/measure.py",
    "layer by layer": "lowlat/compare/differences.py",
    "roofline": "lowlat/bench/roofline.py",
    "FLOPs per token": "lowlat/plan/flops.py",
    "pipeline bubble": "lowlat/plan/estimate.py",
    "perplexity": "lowlat/cli/eval.py",
}
"""A term, and the file that implements the idea."""


@pytest.mark.parametrize(("term", "file"), TERMS.items())
def test_the_file_names_the_term(term: str, file: str) -> None:
    """Also in upper or lower case, as `grep -i` finds it."""
    assert term.lower() in (ROOT / file).read_text(encoding="utf-8").lower(), (
        f"{file} no longer contains '{term}'; name it in a docstring or move the pair"
    )
