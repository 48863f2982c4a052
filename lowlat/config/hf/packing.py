"""The `quantization_config` of checkpoints whose projections are packed: int8 or int4 tiles.

    {"quant_method": "lowlat", "bits": 4, "group_size": 32, "tile_rows": 16}

bits: 8 or 4; which projections are stored how follows from it (`model.quant`). group_size: columns
that share a scale; tile_rows: rows of a tile (`ops.quantized`). Files hold the bytes that the
kernels read; another byte order would have other values here. Tensors have the names and shapes of
lowlat's parameters, also in exactly converted models, whose latent is not padded.
"""

from typing import Any

from lowlat.config.model import Packing
from lowlat.utils.json_fields import JsonFields

METHOD = "lowlat"
"""Value of quant_method."""
BITS: dict[Packing, int] = {"int8": 8, "int4": 4}
GROUP_SIZE = 32
TILE_ROWS = 16


def packing_from_hf(table: JsonFields) -> Packing:
    """The packing of the object `table`. Raises UserError naming a wrong or unknown field."""
    table.choice("quant_method", (METHOD,))
    bits = table.integer("bits")
    if bits not in BITS.values():
        raise table.unsupported("bits", "supported: 8, 4")
    for name, supported in (("group_size", GROUP_SIZE), ("tile_rows", TILE_ROWS)):
        if table.integer(name) != supported:
            raise table.unsupported(name, f"supported: {supported}")
    table.reject_unread("is unknown; was it written by a newer lowlat?", allow_empty=False)
    return next(name for name, own in BITS.items() if own == bits)


def packing_to_hf(packing: Packing) -> dict[str, Any]:
    """The reverse of the above."""
    return {
        "quant_method": METHOD,
        "bits": BITS[packing],
        "group_size": GROUP_SIZE,
        "tile_rows": TILE_ROWS,
    }
