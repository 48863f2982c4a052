"""A machine of known, high rates, run as a worker."""

from lowlat.bench.protocol import serve

RATES = {"bandwidth": 1e12, "gemm_fp32": 1e13, "gemm_bf16": 1e13, "gemm_int8": 1e13}

if __name__ == "__main__":
    serve({"load": lambda threads: {}, "measure": lambda: RATES})
