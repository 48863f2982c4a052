"""Numbers as text in tables and messages: counted nouns, sizes in GB."""


def counted(number: int, noun: str) -> str:
    """'1 layout', '1,200 layouts'."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def gigabytes(size: int | float) -> str:
    """`size` bytes in GB (10^9 bytes) without the unit: '1,234.5', '0.012'."""
    return f"{size / 1e9:,.1f}" if size >= 1e8 or not size else f"{size / 1e9:.3f}"
