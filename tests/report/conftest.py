"""A browser for the tests of the page, and runs to show."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tiny import make_workplace, planted_rows

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

ODD = [
    "<script>alert(1)</script></script><img src=x onerror=alert(2)> good",
    "مرحبا \u202ebad\u202c שלום",
    "👩‍👩‍👧‍👦 good 🇸🇪 e\u0301 日本",
    "a\u200bb\u2028c\ttab\n\nline & <b>bold</b> bad",
]
"""Replies with markup, marks that change the direction of text, and split characters."""


@pytest.fixture(scope="session")
def odd_run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Folder of a finished run with the replies in ``ODD``."""
    import tokenward

    recipe = make_workplace(tmp_path_factory.mktemp("odd") / "work", tiny_folder)
    work = recipe.parent.parent
    rows = planted_rows(16, seed=1)
    for number, text in enumerate(ODD):
        rows[number]["responses"][0] = text
        rows[number]["prompt"] = f"<script>prompt({number})</script>"
        del rows[number]["spans"]
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.chdir(work):
        run = tokenward.run(
            recipe,
            ["data.eval=0.2", "evaluation.prompts=2", "tokens.max_response_tokens=128"],
            quiet=True,
        )
    return (work / run.folder).resolve()


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """Debian's chromium; without it the tests are skipped."""
    if not os.access(CHROMIUM, os.X_OK):
        pytest.skip("no chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def opened(browser) -> Iterator[Callable[..., object]]:
    """Opens a page. No page may log an error or request anything else."""
    problems: list[str] = []
    contexts = []

    def open_page(path: Path, address: str = "", *, folded: bool = False, **settings):
        context = browser.new_context(viewport={"width": 1300, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: note_request(request.url))
        page.goto(path.as_uri() + address)
        if not folded:
            page.evaluate(
                "() => { for (const part of document.querySelectorAll('details:not(#table)')) part.open = true; }"
            )
        return page

    def note_request(url: str) -> None:
        if not url.startswith("file:"):
            problems.append(f"requested {url}")

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture(scope="session")
def page_path(finished_run: Path) -> Path:
    """The report of the tiny quick start."""
    from tokenward.report.page import make_report

    return make_report(finished_run / "runs" / "quickstart").save().resolve()
