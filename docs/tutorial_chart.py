"""The tutorial's chart: curves of a loss, epoch by epoch, as SVG that needs nothing else."""

from __future__ import annotations

import math
from html import escape

#: In pixels: the picture, and what is left of, above, right of and below the curves. Names stand to the right of them.
WIDTH, HEIGHT = 640, 380
LEFT, TOP, RIGHT, BOTTOM = 64, 76, 110, 52
LINE = 16
TICKS = [digit * 10.0**power for power in range(-6, 4) for digit in (1, 2, 5)]
STYLE = """
.paper { fill: #ffffff; } .ink { fill: #1d2330; } .soft { fill: #5b6472; } .grid { stroke: #dfe3e8; }
.curve { fill: none; stroke: currentColor; stroke-width: 2.5; stroke-linejoin: round; } .name { fill: currentColor; }
.first { color: #0b5fff; } .second { color: #c2410c; } .third { color: #0f766e; }
.curve.second { stroke-dasharray: 9 4; } .curve.third { stroke-dasharray: 2 4; }
@media (prefers-color-scheme: dark) {
  .paper { fill: #14171d; } .ink { fill: #e8ebf0; } .soft { fill: #a4adba; } .grid { stroke: #2b313b; }
  .first { color: #5b93ff; } .second { color: #fb923c; } .third { color: #2dd4bf; }
}
"""


def label(kind: str, x: float, y: float, text: object, more: str = "") -> str:
    """A line of text."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" {more}>{escape(str(text))}</text>'


def chart(title: str, curves: dict[str, list[float]]) -> str:
    """Up to three curves of equally many epochs, on a logarithmic scale."""
    epochs = len(next(iter(curves.values())))
    values = [value for curve in curves.values() for value in curve]
    low = max(tick for tick in TICKS if tick <= min(values))
    high = min(tick for tick in TICKS if tick >= max(values))

    def x(epoch: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (epoch - 1) / (epochs - 1)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * math.log(high / value) / math.log(high / low)

    parts = [
        label("ink", 20, 32, title, 'font-size="18" font-weight="600"'),
        label("soft", 20, 53, "Lower is better. The scale is logarithmic."),
        label("soft", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "epoch", 'text-anchor="middle"'),
    ]
    parts += [label("soft", x(n), HEIGHT - BOTTOM + 20, n, 'text-anchor="middle"') for n in range(1, epochs + 1)]
    for tick in TICKS:
        if low <= tick <= high:
            parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
            parts.append(label("soft", LEFT - 8, y(tick) + 4, f"{tick:g}", 'text-anchor="end"'))
    free = math.inf  # the names stand at the ends, and one line apart at least, from below
    series = zip(("first", "second", "third"), curves.items(), strict=False)
    for place, (name, curve) in sorted(series, key=lambda entry: entry[1][1][-1]):
        points = " ".join(f"{x(epoch):.1f},{y(value):.1f}" for epoch, value in enumerate(curve, 1))
        parts.append(f'<polyline class="curve {place}" points="{points}"/>')
        free = min(y(curve[-1]), free - LINE)
        parts.append(label(f"name {place}", WIDTH - RIGHT + 10, free + 4, f"{name} {curve[-1]:.3f}"))
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    font = 'font-family="system-ui, \'Segoe UI\', Helvetica, Arial, sans-serif" font-size="13"'
    said = "; ".join(f"{name} from {curve[0]:.3f} to {curve[-1]:.3f}" for name, curve in curves.items())
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title text" {font}>
<title id="title">{escape(title)}</title>
<desc id="text">{escape(said)}</desc>
<style>{STYLE}</style>
<rect class="paper" width="100%" height="100%"/>
{chr(10).join(parts)}
</svg>
"""
