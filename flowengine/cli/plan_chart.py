"""A chart of a simulation as SVG text: one band per link, as dark as it is full."""

from __future__ import annotations

from html import escape

from flowengine.plan.explain import utc
from flowengine.plan.simulate import Result

__all__ = ["draw"]

ROW = 22
LABEL = 210
WIDTH = 720
TOP = 46
MOST_LINKS = 40
CELLS = 240


def draw(result: Result, title: str) -> str:
    """The chart: the busiest links from top to bottom, time from left to right."""
    busiest = sorted(range(len(result.links)), key=lambda i: (-result.links[i].mean_utilisation, i))[
        :MOST_LINKS
    ]
    height = TOP + ROW * len(busiest) + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABEL + WIDTH + 90}" height="{height}" '
        'font-family="sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="10" y="22" font-size="15" fill="#111111">{escape(title)}</text>',
    ]
    for row, link in enumerate(busiest):
        y = TOP + row * ROW
        outcome = result.links[link]
        lines.append(f'<text x="10" y="{y + 15}" fill="#111111">{escape(outcome.name[:32])}</text>')
        lines.append(f'<rect x="{LABEL}" y="{y}" width="{WIDTH}" height="{ROW - 4}" fill="#eef2f6"/>')
        lines += [
            f'<rect x="{LABEL + x:.1f}" y="{y}" width="{w:.1f}" height="{ROW - 4}" fill="#0b5cad" '
            f'fill-opacity="{use:.2f}"/>'
            for x, w, use in _cells(result, link)
            if use > 0.004
        ]
        share = f"{outcome.mean_utilisation:.0%}"
        lines.append(f'<text x="{LABEL + WIDTH + 10}" y="{y + 15}" fill="#111111">{share} mean</text>')
    y = TOP + ROW * len(busiest) + 16
    middle = (result.start_s + result.end_s) / 2
    for x, anchor, at_s in (
        (LABEL, "start", result.start_s),
        (LABEL + WIDTH / 2, "middle", middle),
        (LABEL + WIDTH, "end", result.end_s),
    ):
        lines.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="#444444">{utc(at_s)}</text>')
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def _cells(result: Result, link: int) -> list[tuple[float, float, float]]:
    """Mean utilisation in CELLS equal stretches of time: offset, width, share."""
    length = (result.end_s - result.start_s) / CELLS
    sums = [0.0] * CELLS
    ends = [at for at, _ in result.series[1:]] + [result.end_s]
    for (at, use), end in zip(result.series, ends, strict=True):
        first = int((at - result.start_s) / length)
        last = min(int((end - result.start_s) / length), CELLS - 1)
        for cell in range(first, last + 1):
            low = max(at, result.start_s + cell * length)
            high = min(end, result.start_s + (cell + 1) * length)
            sums[cell] += use[link] * max(high - low, 0.0)
    width = WIDTH / CELLS
    return [(cell * width, width + 0.3, min(total / length, 1.0)) for cell, total in enumerate(sums)]
