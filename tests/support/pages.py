"""Reads a report page as a test does: tags, text, one section, and whether it is safe to open."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from pipeline.stats.intervals import Estimate

HOSTILE = "<script>alert(1)</script>\"'><img src=https://evil.example/x onerror=alert(1)>"
HOSTILE += "\u202egnp.exe\x00\ud800{{7*7}}"

NAN = float("nan")

UNKNOWN = Estimate(NAN, NAN, NAN)


class Page(HTMLParser):
    """Collects tags and text, and checks that tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br", "wbr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def check_safe(html: str) -> Page:
    """Nothing is fetched, nothing runs, every link stays on the page, rows are as wide as their head."""
    found = Page(html)
    names = {t for t, _ in found.tags}
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base", "image", "use"} & names
    for _, attrs in found.tags:
        assert not [a for a in attrs if a.startswith("on") or a in ("src", "srcset", "action", "xlink:href")]
        assert (attrs.get("href") or "#").startswith("#")
    assert not re.search(r"@import|url\(", html)
    assert "default-src 'none'" in html
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for t, a in found.tags if t == "a"} <= {f"#{i}" for i in ids}
    for table in re.findall(r"<table.*?</table>", html, re.DOTALL):
        assert len({_width(row) for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)}) == 1
    return found


def section(html: str, name: str) -> str:
    """The text of one section."""
    found = re.search(rf'<section id="{name}">.*?</section>', html, re.DOTALL)
    assert found
    return " ".join(re.sub(r"<[^>]*>", " ", found[0].replace("<wbr>", "")).split())


def head(html: str) -> str:
    found = re.search(r"<h1>(.*?)</h1>", html)
    assert found
    return re.sub(r"<.*?>", "", found[1]).strip()


def _width(row: str) -> int:
    """Columns of a table's row."""
    spans = re.findall(r'<t[hd]\b[^>]*colspan="(\d+)"', row)
    return len(re.findall(r"<t[hd]\b", row)) + sum(int(n) - 1 for n in spans)
