"""The parts of a page that needs nothing beside itself: sections of figures, notes and tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure

from diffmoe_dist.report_page import figures

CSS = """
:root{--ink:#1c1f24;--soft:#5b616b;--line:#e3e6ea;--accent:#2a5d9f}
*{box-sizing:border-box}
body{margin:0;background:#f6f7f9;color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 18px 60px}
h1{font-size:1.75rem;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:44px 0 6px}
p{margin:0 0 12px;max-width:84ch}
.soft,figcaption{color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:10px;margin:22px 0 8px}
.card,figure,details{background:#fff;border:1px solid var(--line);border-radius:10px}
.card{padding:10px 14px}
.card b{display:block;font-size:1.3rem;font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.card span{color:var(--soft);font-size:.86rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,350px),1fr));gap:16px;margin:14px 0;
align-items:start}
.figures.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr))}
figure{margin:0;padding:14px}
figure.wide{grid-column:1/-1}
figure h3{font-size:1rem;margin:0 0 8px}
figure img{display:block;width:100%;height:auto}
figure.wide .scroll{overflow-x:auto}
figure.wide img{min-width:560px;max-width:920px;margin:0 auto}
@media(min-width:860px){figure.grid{grid-column:span 2}}
figure.grid img{width:auto;max-width:100%;margin:0 auto;image-rendering:pixelated;border-radius:4px}
figcaption{font-size:.9rem;margin-top:10px}
details{padding:10px 14px;margin-top:14px}
summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font-size:.82rem;line-height:1.45;margin:10px 0 2px}
table{border-collapse:collapse;font-size:.92rem}
td{padding:3px 18px 3px 0;vertical-align:top;overflow-wrap:anywhere}
td:first-child{color:var(--soft);white-space:nowrap}
@media(max-width:560px){main{padding:18px 12px 40px}figure{padding:10px}h1{font-size:1.45rem}}
@media print{body{background:#fff}figure{break-inside:avoid}}
"""


def document(name: str, body: str, css: str = "") -> str:
    """The whole page; `body` is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(name)}</title><style>{CSS}{css}</style></head><body><main>'
        f"<h1>{escape(name)}</h1>{body}</main></body></html>\n"
    )


def section(title: str, text: str, parts: Sequence[str], kind: str = "figures") -> str:
    paragraph = f"<p>{escape(text)}</p>" if text else ""
    return f'<section><h2>{escape(title)}</h2>{paragraph}<div class="{kind}">{"".join(parts)}</div></section>'


def figure(title: str, content: Figure | str, caption: str, kind: str = "") -> str:
    """`content`: a figure, or the data URI of an image."""
    data_uri = content if isinstance(content, str) else figures.embedded(content)
    image = f'<div class="scroll"><img src="{data_uri}" alt="{escape(title)}"></div>'
    return f'<figure class="{kind}"><h3>{escape(title)}</h3>{image}<figcaption>{escape(caption)}</figcaption></figure>'


def note(title: str, text: str) -> str:
    return f"<figure><h3>{escape(title)}</h3><figcaption>{escape(text)}</figcaption></figure>"


def table(title: str, rows: dict[str, Any]) -> str:
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<figure><h3>{escape(title)}</h3><table>{cells}</table></figure>"


def short(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
