"""Dtype and device names as users type them."""

import torch

from lowlat.utils.errors import UserError

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

CACHE_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8}


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name` (fp64, fp32, bf16, fp16). Raises UserError for any
    other name.
    """
    if name not in DTYPES:
        known = ", ".join(("auto", *DTYPES, "int8", "int4"))
        raise UserError(f"dtype '{name}' is unknown; choose one of {known}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of `dtype`, of weights or of a cache."""
    return next(name for name, own in (DTYPES | CACHE_DTYPES).items() if own == dtype)


def parse_cache(name: str) -> torch.dtype | None:
    """The torch dtype of a KV cache called `name` (kv_cache_dtype: bf16, int8); None for auto: that
    of activations. Raises UserError for any other name.
    """
    if name not in ("auto", *CACHE_DTYPES):
        raise UserError(f"cache '{name}' is unknown; choose auto, {' or '.join(CACHE_DTYPES)}")
    return CACHE_DTYPES.get(name)


def parse_device(name: str) -> torch.device:
    """The torch device called `name` (cpu, cuda, cuda:1, mps). Raises UserError where it is not
    available.
    """
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"device '{name}' is unknown; choose cpu, cuda or mps")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' is not available on this machine; use --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' is not available on this machine; use --device cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device '{name}' is not valid; write cpu, cuda, cuda:N or mps") from error
