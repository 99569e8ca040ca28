"""A judge whose server is a stranger's: whatever it sends ends in bounded time and memory, and is an answer that failed."""

import json
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from tests.evaluation.test_judge import KEY, PATH, completion, messages
from tokenward.config.judge import JudgeTable
from tokenward.errors import UserError
from tokenward.evaluation.judge import AnswerCache, AnswerCounts, ask_all, open_judge, send
from tokenward.sampling import endpoint
from tokenward.sampling.endpoint import Failed

GOOD = json.dumps(completion("[[A]]"))


def endless() -> Iterator[bytes]:
    while True:
        yield b" " * 4096


ODD: dict[str, Callable[[], Response]] = {
    "deep": lambda: Response("[" * 200_000),
    "deep tables": lambda: Response('{"choices":' * 200_000),
    "a list": lambda: Response(f"[{GOOD}]"),
    "text": lambda: Response('"choices"'),
    "choices of another type": lambda: Response('{"choices": "message"}'),
    "a choice of another type": lambda: Response('{"choices": [["message"]]}'),
    "html": lambda: Response("<html><body>Sign in</body></html>", content_type="text/html"),
    "bad gzip": lambda: Response(b"\x1f\x8bnothing", headers={"Content-Encoding": "gzip"}),
    "twice packed": lambda: Response(GOOD, headers={"Content-Encoding": "gzip, gzip"}),
    "a digit without end": lambda: Response(GOOD.replace("10", "9" * 5000)),
    "endless": lambda: Response(endless()),
    "elsewhere": lambda: Response("", 302, {"Location": "http://127.0.0.1:9/other"}),
    "nothing": lambda: Response(b""),
    "a pause of a year": lambda: Response("", 429, {"Retry-After": "31536000"}),
    "again and again": lambda: Response("no", 503, {"Retry-After": "0.01", "x-should-retry": "true"}),
}  # fmt: skip


@contextmanager
def serving(answer: Callable[[Request], Response]) -> Iterator[JudgeTable]:
    with HTTPServer(threaded=True) as server:
        server.expect_request(PATH).respond_with_handler(answer)
        yield JudgeTable(url=server.url_for("/v1"), model="m", parallel=1, timeout=20.0, attempts=1)


def asked(judge: JudgeTable, folder: Path, *questions: str) -> tuple[list[str | None], AnswerCounts]:
    cache = AnswerCache(folder / "judge.sqlite")
    try:
        answers, counts = ask_all(judge, [messages(text) for text in questions], cache)
        return [answer and answer.text for answer in answers], counts
    finally:
        cache.close()


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_answer_is_one_that_failed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "LARGEST", 2**20 if kind != "endless" else 2**16)
    with serving(lambda request: ODD[kind]() if b"odd" in request.data else Response(GOOD)) as judge:
        texts, counts = asked(judge, tmp_path, "odd", "other")
    assert texts == [None, "[[A]]"]
    assert counts.failed == 1


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (GOOD.replace("[[A]]", "\\ud800 [[A]]"), "? [[A]]"),
        (GOOD.encode().replace(b"[[A]]", b"\xff [[A]]"), "\ufffd [[A]]"),
        (json.dumps({**json.loads(GOOD), "usage": [1, 2]}), "[[A]]"),
        (
            json.dumps({**json.loads(GOOD), "usage": {"prompt_tokens": 10**400, "completion_tokens": -1}}),
            "[[A]]",
        ),
        (json.dumps(completion({"text": ["[[A]]"]})), ""),
    ],
)
def test_a_strange_answer_is_kept_as_text(body: str | bytes, text: str, tmp_path: Path) -> None:
    with serving(lambda request: Response(body)) as judge:
        texts, counts = asked(judge, tmp_path, "x")
    assert (texts, counts.failed, counts.cost) == ([text], 0, 0.0)


def failure(judge: JudgeTable) -> str:
    """Why a request failed."""
    with open_judge(judge, {}) as opened, pytest.raises(Failed) as caught:
        send(judge, opened, messages())
    return str(caught.value)


def test_a_large_answer_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "LARGEST", 2**16)
    with serving(lambda request: Response(endless())) as judge:
        assert "more than 65,536 bytes" in failure(judge)


def test_an_answer_must_end_in_time() -> None:
    """Also one that sends a little now and then, so that no read of it takes long."""
    over = threading.Event()

    def slowly() -> Iterator[bytes]:
        while not over.wait(0.05):
            yield b" "

    with serving(lambda request: Response(slowly())) as judge:
        said = failure(judge.model_copy(update={"timeout": 0.5}))
        over.set()
    assert "the answer had not ended after 0.5 seconds" in said


def test_headers_without_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "PAUSE", 0.0)
    over, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while not over.wait(0.05):
                connection.sendall(b"X-More: 1\r\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    said = failure(JudgeTable(url=url, model="m", timeout=0.5, attempts=1))
    over.set()
    thread.join()
    listener.close()
    assert said == "no answer had ended after 0.5 seconds"


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    with (
        HTTPServer(threaded=True) as other,
        serving(lambda request: Response("", 307, {"Location": other.url_for(PATH)})) as judge,
    ):
        asked(judge, tmp_path, "x")
        assert not other.log


def test_a_server_that_repeats_the_key_learns_nothing_for_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = f"{KEY}-{10**9}"
    monkeypatch.setenv("MY_KEY", key)

    def repeat(request: Request) -> Response:
        headers = request.headers["Authorization"]
        if b"good" in request.data:
            return Response(json.dumps(completion(f"{headers} [[A]]")))
        return Response(headers * 40, 503 if b"down" in request.data else 200)

    with serving(repeat) as judge:
        keyed = judge.model_copy(update={"key_variable": "MY_KEY"})
        texts, _ = asked(keyed, tmp_path, "good")
        assert texts == ["Bearer (hidden) [[A]]"]
        for kind in ("down", "odd"):
            with pytest.raises(UserError) as caught:
                asked(keyed, tmp_path, *(f"{kind} {number}" for number in range(5)))
            assert "(hidden)" in str(caught.value)
            assert KEY not in str(caught.value)
    with sqlite3.connect(tmp_path / "judge.sqlite") as base:
        assert KEY not in str(base.execute("SELECT * FROM answers").fetchall())
    base.close()
