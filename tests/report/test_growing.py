"""The page of a run that goes on: what it shows, that it changes nothing in the run, and how it is served."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import tokenward
from tests.report.test_report import data_of
from tests.stages.runs import press_when
from tokenward import cli
from tokenward.display import Moment
from tokenward.errors import UserError
from tokenward.report import growing, watch
from tokenward.report.growing import GrowingPage
from tokenward.report.page import Reports, make_report
from tokenward.report.progress import FILE, Progress
from tokenward.scoring.store import TokenStore
from tokenward.stages import preview
from tokenward.stages.preview import Preview, due_after
from tokenward.training import callbacks
from tokenward.training.fit import Interrupted

RUN = Path("runs/quickstart")
PAGE = RUN / "report" / "index.html"
CONSTANT = ["oracle.training.lr_scheduler_type=constant", "oracle.training.warmup_steps=0"]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Every page that the run writes, which is one at each step, by what its first lines say runs now."""
    for module, name, value in (
        (growing, "BETWEEN", 0.0), (growing, "AFTER", 0.0), (growing, "SHARE", 1e9), (growing, "MOST", 1e9),
        (callbacks, "LOG_SECONDS", 0.0), (callbacks, "LOG_SHARE", 1e9),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    found: dict[str, str] = {}
    plain = GrowingPage.write

    def write(self, **settings) -> None:
        plain(self, **settings)
        assert not self._failed
        html = PAGE.read_text()
        found[html.partition("Now: ")[2].partition(".")[0]] = html

    monkeypatch.setattr(GrowingPage, "write", write)
    return found


def test_the_page_shows_what_there_is_so_far(tiny_workplace: Path, pages: dict[str, str]) -> None:
    often = [f"{stage}.training.logging_steps=1" for stage in ("oracle", "policy")]
    tokenward.run(tiny_workplace, often, quiet=True)
    assert "Done" not in pages["data"]
    assert "Nothing on it is final" in pages["data"]
    early, drawn = pages["oracle, step 1 of 6"], pages["oracle, step 5 of 6"]
    assert "Done: data, reference. " in early
    assert "To come: scores, policy, evaluation." in early
    assert "Data: 17 training rows, 7 eval rows" in early
    assert 'id="comparisons"' not in early
    assert "oracle: loss" not in early
    assert "6 of the run's 24 pairs, shaded by the oracle after 2 of 6 updates; the final scores" in drawn
    first, final = (
        {pair["key"]: pair for pair in data_of(html)["comparisons"]} for html in (drawn, PAGE.read_text())
    )
    assert {pair["part"] for pair in first.values()} == {"eval"}
    assert {key: pair["number"] for key, pair in first.items()} == {
        key: final[key]["number"] for key in first
    }
    assert "<|im_end|>" in data_of(drawn)["names"].values()
    assert "</b>: trained on" not in drawn
    assert 'id="scores"' not in drawn, "six pairs make no distribution"
    assert "oracle: loss" in drawn
    later = pages["policy, step 3 of 4"]
    assert "policy: loss" in later
    assert 'id="preview"' not in later
    assert data_of(later)["total"] == len(data_of(later)["comparisons"]) == 24
    assert all('id="figures"' not in page and 'id="reward"' not in page for page in pages.values())
    assert 'id="growing"' not in PAGE.read_text()
    assert PAGE.read_text() == make_report(RUN).html


@pytest.mark.parametrize(
    "changes", [[], ["oracle.adapter={r: 4, lora_dropout: 0.3}"]], ids=["whole", "adapter"]
)
def test_the_first_picture_changes_nothing_and_shows_the_oracle_of_its_step(
    tiny_workplace: Path, pages: dict[str, str], monkeypatch: pytest.MonkeyPatch, changes: list[str]
) -> None:
    changes = [*changes, *CONSTANT, "oracle.training.disable_dropout=false"]

    def weights(name: str, *more: str, last: str = "oracle") -> dict[str, torch.Tensor]:
        tokenward.run(tiny_workplace, [*changes, f"run=runs/{name}", *more], last=last, quiet=True)
        (file,) = Path("runs", name, "oracle", "model").glob("*.safetensors")
        return load_file(file)

    with_pages = weights("quickstart")
    assert any(name.startswith("oracle, step") for name in pages)
    monkeypatch.setattr(growing, "BETWEEN", 1e9)
    weights("short", "oracle.training.max_steps=2", last="scores")
    monkeypatch.setattr(preview, "due_after", lambda step, total: False)
    without = weights("plain")
    assert not Path("runs/plain/oracle/preview.json").exists()
    assert with_pages.keys() == without.keys()
    assert all(torch.equal(with_pages[name], without[name]) for name in without)
    shown, final = Preview.read(RUN / "oracle" / "preview.json"), TokenStore(Path("runs/short/scores"))
    assert (shown.updates, shown.total, len(shown.records)) == (2, 6, 2 * 6)
    for key, record in shown.records.items():
        assert record[:4] == final[key][:4]
        for name in ("oracle_logp", "reference_logp"):
            assert record.value(name) == pytest.approx(final[key].value(name), abs=1e-4)
        assert record.value("oracle_logp") != pytest.approx(record.value("reference_logp"), abs=1e-4)


def test_the_picture_is_drawn_early_and_again_up_to_half_of_the_training() -> None:
    def drawn(total: int) -> list[int]:
        return [step for step in range(1, total + 1) if due_after(step, total)]

    assert [drawn(total) for total in (1, 2, 6, 18, 35)] == [[], [1], [2], [6], [10]]
    assert drawn(500) == [10, 20, 40, 80, 160]


def test_a_run_that_was_stopped_says_where_and_goes_on_with_its_picture(
    tiny_workplace: Path, pages: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        press_when(patch, lambda state: state.global_step == 3)
        with pytest.raises(Interrupted):
            tokenward.run(tiny_workplace, quiet=True)
    html = PAGE.read_text()
    assert "<b>This run has stopped</b> at oracle, step 4 of 6" in html
    assert "Now:" not in html
    assert "after 2 of 6 updates" in html
    pages.clear()
    tokenward.run(tiny_workplace, quiet=True)
    assert "after 2 of 6 updates" in pages["oracle, step 5 of 6"]
    assert not (RUN / FILE).exists()


def test_results_that_the_run_will_replace_are_not_shown(copied_run: Path, pages: dict[str, str]) -> None:
    tokenward.run(copied_run, ["oracle.training.max_steps=3"], quiet=True)
    html = pages["oracle, step 2 of 3"]
    assert "after 1 of 3 updates" in html
    assert all(part not in html for part in ('id="reward"', 'id="figures"', 'id="replies"', "policy: loss"))
    assert 'id="figures"' in PAGE.read_text()


def test_the_pages_take_a_small_share_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = [0.0], []

    def make(self, served: str = "") -> SimpleNamespace:
        now[0] += 0.25
        written.append(now[0])
        return SimpleNamespace(save=lambda: None)

    monkeypatch.setattr(growing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Reports, "make", make)
    page = GrowingPage(tmp_path, ["oracle", "scores"], print)
    for step in range(1000):
        now[0] += 1.0
        page(Moment("oracle", "oracle", step, 1000))
    assert 10 < len(written) == page.pages
    assert page.seconds <= growing.SHARE * now[0] + 0.25
    assert written[0] == pytest.approx(growing.BETWEEN + 0.25)
    now[0] += growing.AFTER
    page(Moment("oracle", ended=True))
    assert len(written) == page.pages == round(page.seconds / 0.25)
    page(Moment("scores", ended=True))
    assert len(written) == page.pages, "the final report follows"
    assert json.loads((tmp_path / FILE).read_text())["moment"][0] == "oracle"


def test_a_page_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "run").write_text("a file where the folder should be")
    page = GrowingPage(tmp_path / "run", ["oracle"], said.append)
    page.write()
    page.write()
    (line,) = said
    assert "the report cannot be written while the run goes on" in line


# ---- the server


@contextmanager
def served(folder: Path) -> Iterator[Callable[..., str]]:
    """Asks a server of a run's report."""
    with watch.report_server(watch.WatchedReport(Reports(folder)), 0) as server:
        Thread(target=server.serve_forever, args=(0.01,)).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"

        def ask(path: str = "/", **headers: str) -> str:
            with urlopen(Request(address + path, headers=headers)) as answer:
                return answer.read().decode()

        ask.address = address  # type: ignore[attr-defined]
        try:
            yield ask
        finally:
            server.shutdown()


def test_only_the_page_is_served_and_it_follows_the_files(finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with served(folder) as ask:
        assert "Nothing to show yet: there is no folder" in ask()
        first = json.loads(ask("/news"))
        assert f'data-version="{first["version"]}"' in ask()
        shutil.copytree(finished_run / RUN, folder)
        place = Progress(stages=["data", "oracle"], moment=Moment("oracle", "oracle", 2, 6))
        place.write(folder)
        news = json.loads(ask("/news"))
        assert news == {"version": news["version"], "now": "Done: data. Now: oracle, step 2 of 6."}
        assert f'data-version="{news["version"]}"' in ask()
        Progress(stages=["data", "oracle"], moment=Moment("oracle", "oracle", 3, 6)).write(folder)
        assert json.loads(ask("/news"))["version"] == news["version"] != first["version"]
        (folder / FILE).unlink()
        assert json.loads(ask("/news"))["version"] != news["version"]
        assert "connect-src 'self'" in ask()
        assert "connect-src" not in make_report(folder).html
        for path, headers in (("/report/index.html", {}), ("/report/", {}), ("/", {"Host": "other.example"})):
            with pytest.raises(HTTPError, match="404"):
                ask(path, **headers)


def test_the_command_serves_until_ctrl_c_and_refuses_a_port_in_use(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(server) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.ThreadingHTTPServer, "serve_forever", press)
    with watch.report_server(watch.WatchedReport(Reports(finished_run / RUN)), 0) as server:
        port = str(server.server_address[1])
        with pytest.raises(UserError, match=f"port {port} is in use. .*--port 8000") as error:
            CliRunner().invoke(
                cli.app,
                ["report", str(finished_run / RUN), "--watch", "--port", port],
                catch_exceptions=False,
            )
        assert error.value.code == "port-in-use"
    monkeypatch.chdir(finished_run)
    result = CliRunner().invoke(cli.app, ["report", str(RUN), "--watch", "--port", port])
    assert result.exit_code == 0
    assert result.output.split("\n") == [
        f"http://127.0.0.1:{port} shows {RUN}; Ctrl-C ends it", "", f"{RUN} is no longer shown", "",
    ]  # fmt: skip
    with pytest.raises(UserError) as error:
        CliRunner().invoke(cli.app, ["report", str(RUN), "--port", port], catch_exceptions=False)
    assert error.value.code == "unused-key"


def test_a_served_page_loads_itself_again_and_keeps_the_address(browser, copied_run: Path) -> None:
    with served(RUN) as ask:
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        # The page asks when the test says so, at the time that the test says.
        page.add_init_script(
            "window.at = 0; performance.now = () => window.at;"
            "const later = setTimeout; window.setTimeout = (act, wait) => wait === 2000 ? 0 : later(act, wait);"
        )
        page.goto(f"{ask.address}/#unit=word&q=good")
        version = page.evaluate("document.documentElement.dataset.version")
        Progress(stages=["policy"], moment=Moment("policy", "policy", 2, 4)).write(RUN)
        page.evaluate("at = 1000")
        page.evaluate("askForNews()")
        assert page.evaluate("document.documentElement.dataset.version") == version, "the page is new"
        page.evaluate("at = 11000")
        page.keyboard.press("j")
        page.evaluate("askForNews()")
        assert page.evaluate("document.documentElement.dataset.version") == version, "the page is used"
        page.evaluate("at = 16000")
        page.evaluate("void askForNews()")
        page.locator("#growing").wait_for()
        assert "Now: policy, step 2 of 4" in page.locator("#now").inner_text()
        assert page.evaluate("document.documentElement.dataset.version") != version
        assert (page.input_value("#unit"), page.input_value("#q")) == ("word", "good")
        page.close()
    assert not problems
