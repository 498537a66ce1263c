"""Parse and format human-readable sizes."""

from __future__ import annotations

_SUFFIXES = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def parse_size(text: str) -> int:
    """``64M`` -> 67108864.  K, M, G and T count in 1024s.  Raises ValueError."""
    lowered = text.strip().lower().removesuffix("ib").removesuffix("b")
    digits = lowered.rstrip("kmgt")
    try:
        size = int(digits, 0) << _SUFFIXES[lowered[len(digits) :]]
    except KeyError:
        raise ValueError(f"not a size: {text!r}") from None
    if size < 0:
        raise ValueError(f"negative size: {text!r}")
    return size


def format_size(size: float) -> str:
    """67108864 -> ``64.0 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
