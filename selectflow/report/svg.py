"""Panels as inline SVG: colours come from the page's style, so that light and dark both work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from selectflow.report.align import Curve, Floats
from selectflow.report.panels import COLOURS, Histogram, Line, Panel
from selectflow.report.words import short

_WIDTH, _HEIGHT = 400, 260  # one unit is about one pixel, on a wide and on a narrow screen
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 28, 42


@dataclass(frozen=True)
class _Scale:
    """From data to the picture: x in [x0, x1], y in [y0, y1]."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y0) / (self.y1 - self.y0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def draw(panel: Panel | Histogram) -> str:
    """The svg element of a panel.

    A line has the classes "line" and "g<number of its colour>", and `data-label`; the svg element
    has `data-box`, the ends of its axes in data and in the picture, by which a script reads values
    off.
    """
    scale = _scale_of(panel)
    marks = [_bar(panel, line, scale) for line in panel.lines]
    if isinstance(panel, Panel):
        marks = [_band(line, scale) for line in panel.lines]
        marks += [_line(line, scale) for line in panel.lines]
        marks += [_level(y, name, scale) for y, name in panel.levels]
    box = [scale.x0, scale.x1, _LEFT, _WIDTH - _RIGHT, scale.y0, scale.y1]
    box += [_HEIGHT - _BOTTOM, _TOP]
    title = panel.title if isinstance(panel, Histogram) else panel.y_label
    return "".join(
        [
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" data-box="{_numbers(box)}" '
            f'aria-label="{escape(title)} over {escape(panel.x_label)}">',
            *_axes(panel, scale),
            *marks,
            "</svg>",
        ]
    )


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def _scale_of(panel: Panel | Histogram) -> _Scale:
    lows, highs = [], []
    for line in panel.lines:
        lows.append(float((line.curve.mean - line.curve.sd).min()))
        highs.append(float((line.curve.mean + line.curve.sd).max()))
    if isinstance(panel, Histogram):
        return _Scale(float(panel.edges[0]), float(panel.edges[-1]), 0.0, 1.08 * max(highs) or 1.0)
    levels = [y for y, _ in panel.levels]
    x0 = min(float(line.curve.x[0]) for line in panel.lines)
    x1 = max(float(line.curve.x[-1]) for line in panel.lines)
    low, high = min([*lows, *levels]), max([*highs, *levels])
    if panel.from_zero:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    bottom = low if panel.from_zero and low == 0 else low - margin
    return _Scale(min(x0, 0.0), x1 if x1 > min(x0, 0.0) else x1 + 1, bottom, high + margin)


def ticks(low: float, high: float, num: int = 7) -> list[float]:
    """Round values in [low, high], at most `num`: multiples of 1, 2 or 5 times a power of ten."""
    least = (high - low) / (num - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(step * i, 12) for i in range(first, last + 1)]


def _axes(panel: Panel | Histogram, scale: _Scale) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value in ticks(scale.y0, scale.y1):
        y = scale.y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(_text(_LEFT - 6, y + 4, short(value), "end"))
    for value in ticks(scale.x0, scale.x1):
        anchor = "end" if scale.x(value) > right - 12 else "middle"  # or it would be cut off
        x = min(scale.x(value) + 12, _WIDTH) if anchor == "end" else scale.x(value)
        parts.append(_text(x, bottom + 16, short(value), anchor))
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 7, panel.x_label, "middle", "name"))
    parts.append(_text(4, 14, panel.y_label, "start", "title"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(text)}</text>'


def _points(x: Floats | Sequence[float], y: Floats | Sequence[float], scale: _Scale) -> str:
    pairs = zip(x, y, strict=True)
    return " ".join(f"{scale.x(float(a)):.1f},{scale.y(float(b)):.1f}" for a, b in pairs)


def _band(line: Line, scale: _Scale) -> str:
    curve = line.curve
    if not curve.sd.any():
        return ""
    there = _points(curve.x, curve.mean + curve.sd, scale)
    back = _points(curve.x[::-1], (curve.mean - curve.sd)[::-1], scale)
    return f'<polygon class="band {_colour(line)}" points="{there} {back}"/>'


def _line(line: Line, scale: _Scale) -> str:
    points = _points(line.curve.x, line.curve.mean, scale)
    return _polyline(line, points)


def _polyline(line: Line, points: str) -> str:
    return (
        f'<polyline class="line {_colour(line)}" data-label="{escape(line.label)}" '
        f'points="{points}"{_dash(line)}/>'
    )


def _colour(line: Line) -> str:
    return f"g{line.place % len(COLOURS)}"


def _dash(line: Line) -> str:
    lengths = _numbers(2 * length for length in line.dash)
    return f' stroke-dasharray="{lengths}"' if lengths else ""


def _bar(panel: Panel | Histogram, line: Line, scale: _Scale) -> str:
    """The outline of a histogram."""
    if not isinstance(panel, Histogram):
        return ""
    share = line.curve.mean
    x = [float(edge) for edge in panel.edges for _ in (0, 1)]
    y = [0.0, *(float(value) for value in share for _ in (0, 1)), 0.0]
    return _polyline(line, _points(x, y, scale))


def _level(y: float, name: str, scale: _Scale) -> str:
    at, right = scale.y(y), _WIDTH - _RIGHT
    line = f'<path class="level" d="M{_LEFT} {at:.1f}H{right}"/>'
    return line + _text(right, at - 4, name, "end", "tick")


def swatch(place: int) -> str:
    """A short piece of the line of the group at a place, for a legend."""
    line = Line("", place, Curve(*[np.empty(0)] * 3))
    path = f'<polyline class="line {_colour(line)}" points="1,5 29,5"{_dash(line)}/>'
    return f'<svg class="swatch" viewBox="0 0 30 10" aria-hidden="true">{path}</svg>'
