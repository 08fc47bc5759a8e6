"""One self-contained HTML page: a strip of all weights, and a row for each with its share and its spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0072b2", "#d55e00", "#00875f", "#7b61e0", "#b8860b", "#c04fd0", "#1a9bb5", "#8d6e63")
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5d9de; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --paper: #16191d; --line: #3a4048; } }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.4rem; margin: .2rem 0; overflow-wrap: anywhere; }
.strip { display: flex; height: 3rem; border-radius: 4px; overflow: hidden; margin: 1rem 0 .5rem; }
.strip span { min-width: 0; box-shadow: inset -1px 0 var(--paper); }
.kinds span { display: inline-block; margin-right: 1rem; }
.kinds i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
.rows { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.name { overflow-wrap: anywhere; min-width: 9rem; }
td { white-space: nowrap; }
td.name { white-space: normal; }
td.share { min-width: 6rem; width: 30%; }
td.share b { display: block; height: .8rem; border-radius: 2px; margin-top: .3rem; min-width: 1px; }
svg { display: block; width: 6rem; height: 1.6rem; }
"""


@dataclass(frozen=True)
class Row:
    """One weight.

    Args:
        name: its name.
        kind: of its layer; each kind has a colour.
        cells: the texts under the headings.
        share: of the whole, from 0 to 1.
        curve: numbers to draw, the first the largest.
    """

    name: str
    kind: str
    cells: tuple[str, ...]
    share: float
    curve: tuple[float, ...] = ()


def page(title: str, summary: str, head: Sequence[str], share: str, rows: Sequence[Row]) -> str:
    """The page's text. ``head``: a heading for each cell; ``share``: what the bars show."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    colours = {kind: COLOURS[n % len(COLOURS)] for n, kind in enumerate(kinds)}
    most = max((row.share for row in rows), default=0) or 1
    curves = any(row.curve for row in rows)
    strip = "".join(_segment(row, colours[row.kind]) for row in rows)
    legend = "".join(f'<span><i style="background:{colours[kind]}"></i>{escape(kind)}</span>' for kind in kinds)
    heads = "".join(f"<th>{escape(text)}</th>" for text in ("weight", share, *(["spectrum"] if curves else []), *head))
    body = "\n".join(_row(row, colours[row.kind], most, curves) for row in rows)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n<p>{escape(summary)}</p>\n"
        f'<div class="strip">{strip}</div>\n<p class="kinds">{legend}</p>\n<div class="rows"><table>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n</html>\n"
    )


def _segment(row: Row, colour: str) -> str:
    title = escape(f"{row.name}: {row.share:.2%}")
    return f'<span style="flex:{row.share:.6f};background:{colour}" title="{title}"></span>'


def _row(row: Row, colour: str, most: float, curves: bool) -> str:
    cells = "".join(f"<td>{escape(text)}</td>" for text in row.cells)
    curve = f"<td>{_curve(row.curve, colour)}</td>" if curves else ""
    bar = f'{row.share:.2%}<b style="width:{100 * row.share / most:.2f}%;background:{colour}"></b>'
    return f'<tr><td class="name">{escape(row.name)}</td><td class="share">{bar}</td>{curve}{cells}</tr>'


def _curve(values: Sequence[float], colour: str) -> str:
    """The values over their number, as bars."""
    if not values or not values[0] > 0:
        return ""
    width = 96 / max(len(values), 8)
    bars = "".join(
        f'<rect x="{n * width:.2f}" y="{24 - 24 * value / values[0]:.2f}" width="{0.8 * width:.2f}" '
        f'height="{24 * value / values[0]:.2f}"/>'
        for n, value in enumerate(values)
    )
    return f'<svg viewBox="0 0 96 24" preserveAspectRatio="none" fill="{colour}" role="img">{bars}</svg>'
