"""Charts of cost against size, as plain SVG: panels in rows of three, both axes logarithmic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Series = dict[str, list[tuple[float, float]]]  # of each system: (size, cost)

COLORS = ("#888888", "#d95f02", "#1f6fb4", "#2a9d4a")
WIDTH, HEIGHT = 250, 190  # of a panel's plot area
LEFT, TOP, RIGHT, BOTTOM = 52, 22, 22, 48  # around it
HEAD = 40
ACROSS = 3
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def draw(title: str, panels: Sequence[tuple[str, str, Series]]) -> str:
    """``panels``: (what is measured, what the x axis counts, the series)."""
    width = ACROSS * (LEFT + WIDTH + RIGHT)
    height = HEAD + -(-len(panels) // ACROSS) * (TOP + HEIGHT + BOTTOM)
    names = list(dict.fromkeys(name for _, _, series in panels for name in series))
    colors = dict(zip(names, COLORS, strict=False))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        f' width="{width}" height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(LEFT, 18, title, size=14),
    ]
    x = LEFT
    for name, color in colors.items():
        out.append(f'<rect x="{x}" y="27" width="14" height="3" fill="{color}"/>')
        out.append(_text(x + 19, 32, name))
        x += 34 + 7 * len(name)
    for i, (what, counts, series) in enumerate(panels):
        row, column = divmod(i, ACROSS)
        left = column * (LEFT + WIDTH + RIGHT) + LEFT
        top = row * (TOP + HEIGHT + BOTTOM) + HEAD + TOP
        out += _panel(left, top, what, counts, series, colors)
    return "\n".join([*out, "</svg>\n"])


def _panel(
    left: int, top: int, what: str, counts: str, series: Series, colors: dict[str, str]
) -> list[str]:
    points = [point for line in series.values() for point in line]
    xs = _decades([x for x, _ in points])
    ys = _decades([y for _, y in points])

    def across(x: float) -> float:
        return left + WIDTH * (math.log10(x) - xs[0]) / (xs[-1] - xs[0])

    def up(y: float) -> float:
        return top + HEIGHT * (1 - (math.log10(y) - ys[0]) / (ys[-1] - ys[0]))

    out = [_text(left, top - 10, what, weight="bold")]
    for decade in ys:
        y = up(10**decade)
        out.append(_line(left, y, left + WIDTH, y))
        out.append(_text(left - 6, y + 4, _label(10**decade), anchor="end"))
    for decade in xs:
        x = across(10**decade)
        out.append(_line(x, top, x, top + HEIGHT))
        out.append(_text(x, top + HEIGHT + 15, _label(10**decade), anchor="middle"))
    out.append(_text(left + WIDTH / 2, top + HEIGHT + 33, counts, anchor="middle"))
    for name, line in series.items():
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line)
        color = colors[name]
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        out += [
            f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{color}"/>' for x, y in line
        ]
    return out


def _decades(values: list[float]) -> range:
    """The powers of ten around some positive values; 10 GiB may count as 10 GB."""
    low = math.floor(math.log10(min(values)) + 0.05)
    high = math.ceil(math.log10(max(values)) - 0.05)
    return range(low, max(high, low + 1) + 1)


def _label(value: float) -> str:
    for size, letter in UNITS:
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="#ddd"/>'


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 11, weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
        f' font-weight="{weight}">{escape(text)}</text>'
    )
