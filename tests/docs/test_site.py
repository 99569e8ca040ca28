"""The documentation site builds without warnings, and all links inside it work."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("sphinx")
ROOT = Path(__file__).parent.parent.parent


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as in `make docs`."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    return subprocess.run([*command, source, target], capture_output=True, text=True, check=False)


class Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.add(value or "")
            elif name in ("href", "src") and value:
                self.links.append(value)


class Site(NamedTuple):
    """The built pages, by path."""

    folder: Path
    pages: dict[Path, Page]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site") / "docs"
    done = build(ROOT / "docs", folder)
    assert done.returncode == 0, done.stderr
    return Site(folder, {path: Page(path.read_text()) for path in sorted(folder.glob("*.html"))})


def broken(site: Site) -> Iterator[str]:
    """Links inside the site without a target, and external links that are not URLs."""
    for path, page in site.pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if not re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(/\S*)?", link):
                    yield f"{path.name}: {link}"
                continue
            target = path.parent / unquote(parts.path) if parts.path else path
            known = site.pages[target].ids if target in site.pages else set()
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in known):
                yield f"{path.name}: {link}"


def test_every_page_is_built(site: Site) -> None:
    written = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert written <= {path.stem for path in site.pages}


def test_links_and_anchors_inside_the_site_exist(site: Site) -> None:
    assert sum(len(page.links) for page in site.pages.values()) > 1000
    assert [*broken(site)] == []


def test_the_site_loads_nothing_from_other_servers(site: Site) -> None:
    for path, page in site.pages.items():
        assert not re.search(r'<(?:script|img|iframe)[^>]+src="https?:', path.read_text()), path.name
        assert not re.search(r'<link[^>]+rel="stylesheet"[^>]+href="https?:', path.read_text()), path.name
        assert page.ids


def test_a_mistake_stops_the_build(tmp_path: Path) -> None:
    mistakes = ("[there](nowhere.md)", "[there](index.md#no-such-heading)", "![it](pictures/none.svg)")
    source = tmp_path / "docs"
    source.mkdir()
    (source / "conf.py").write_text((ROOT / "docs" / "conf.py").read_text())
    (source / "index.md").write_text("# A page\n\n" + "\n\n".join(mistakes) + "\n")
    done = build(source, tmp_path / "out")
    assert done.returncode != 0
    for warning in ("nowhere.md", "no-such-heading", "none.svg"):
        assert warning in done.stderr
