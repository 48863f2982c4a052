"""How PyTorch's threads wait for their next piece of work. Owns OMP_WAIT_POLICY."""

import os


def let_threads_sleep() -> None:
    """Before torch is imported: OpenMP's threads sleep between operators, unless the user chose.

    Training takes turns between PyTorch's operators and native ones, which have threads of their
    own; threads that spin until their next operator keep those from their processors.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
