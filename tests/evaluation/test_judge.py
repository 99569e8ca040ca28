"""A judge behind a local server with faults."""

import json
import sys
import threading

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from tokenward.config.judge import PROMPT, JudgeTable, load_judge
from tokenward.errors import UserError
from tokenward.evaluation.judge import (
    FAILED_IN_A_ROW,
    AnswerCache,
    Pair,
    ask_all,
    first_place,
    judge_pairs,
    request,
    request_key,
)
from tokenward.types import Message

PATH = "/v1/chat/completions"
KEY = "sk-very-secret"
NOW = {"Retry-After": "0.01"}


def completion(text, *, usage=(10, 2), **choice):
    message = {"role": "assistant", "content": text}
    body = {"choices": [{"message": message, "finish_reason": "stop", **choice}]}
    return body | ({"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}} if usage else {})


def content(question: Request):
    return json.loads(question.data)["messages"][-1]["content"]


def asked(question: Request):
    """The two replies in the order of a request."""
    text = content(question)
    return tuple(text.split(f"<{name}>\n")[1].split(f"\n</{name}>")[0] for name in ("reply_a", "reply_b"))


def answering(by):
    """A handler that answers with ``by(reply_a, reply_b)``."""
    return lambda question: Response(json.dumps(completion(by(*asked(question)))))


def longer(a, b):
    return "[[A]]" if len(a) > len(b) else "[[B]]" if len(b) > len(a) else "[[C]]"


@pytest.fixture
def cache(tmp_path):
    found = AnswerCache(tmp_path / "judge.sqlite")
    yield found
    found.close()


@pytest.fixture
def judge(httpserver):
    return JudgeTable(url=httpserver.url_for("/v1"), model="m", parallel=1, timeout=5.0, attempts=3)


def messages(text="hi"):
    return [Message(role="user", content=text)]


def pair(before, after, text="Say."):
    return Pair(messages(text), before, after)


@pytest.mark.parametrize(
    ("by", "preferred", "first"),
    [
        (longer, [1.0, 0.0, 0.5], [0.5, 0.5, 0.5]),
        (lambda a, b: "Clearly. [[A]]", [0.5, 0.5, 0.5], [1.0, 1.0, 1.0]),  # likes a place, not a reply
        (lambda a, b: "[[B]]" if len(b) > len(a) else "[[C]]", [0.75, 0.25, 0.5], [0.25, 0.25, 0.5]),
    ],
)
def test_both_orders_are_asked_and_averaged(httpserver, judge, cache, by, preferred, first):
    httpserver.expect_request(PATH, method="POST").respond_with_handler(answering(by))
    pairs = [pair("a", "aaa"), pair("aaaa", "a"), pair("same", "same"), pair("ab", "ba")]
    found = judge_pairs(judge, pairs, cache)
    equal = found.judgments.pop(2)
    assert equal == (0.5, ("same", "same"))  # costs no request
    assert [item.preferred for item in found.judgments] == preferred
    assert first_place([*found.judgments, equal]) == first
    assert found.counts["asked"] == len(httpserver.log) == 6


def test_what_may_pass_is_asked_again(judge, cache):
    """Each request meets its own fault first; a timeout is one of them."""
    release, seen = threading.Event(), set()
    faults = [(429, "slow down"), (500, "oh")]
    faults += [
        (200, body) for body in ("{", "[]", '{"choices": []}', '{"choices": [{"message": null}]}', "late")
    ]
    faults += [(204, "")]

    def handler(question: Request) -> Response:
        number = content(question)
        if number in seen:
            return Response(json.dumps(completion(f"[[A]] {number}")))
        seen.add(number)
        status, body = faults[int(number)]
        if body == "late":
            release.wait(10)
        return Response(body, status, NOW)

    with HTTPServer(threaded=True) as server:
        server.expect_request(PATH).respond_with_handler(handler)
        quick = {"url": server.url_for("/v1"), "timeout": 0.5, "parallel": len(faults)}
        requests = [messages(str(number)) for number in range(len(faults))]
        answers, counts = ask_all(judge.model_copy(update=quick), requests, cache)
        release.set()
    assert [answer.text for answer in answers] == [f"[[A]] {number}" for number in range(len(faults))]
    assert (counts.retries, counts.failed) == (len(faults), 0)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (completion(""), "empty"),
        (completion(None), "empty"),
        (completion("I would say A."), "unparsable"),
        (completion("[[B]] at first, yet [[A]]"), "A"),  # the last mark counts
        ({"error": "too long"}, "failed"),
        (completion("", finish_reason="content_filter"), "refused"),
        (completion(None, message={"content": None, "refusal": "I cannot."}), "refused"),
    ],
)
def test_an_answer_without_a_verdict_is_counted_and_its_pair_left_out(httpserver, judge, cache, body, reason):
    httpserver.expect_ordered_request(PATH).respond_with_json(completion("[[A]]"))
    httpserver.expect_ordered_request(PATH).respond_with_json(body, status=400 if "error" in body else 200)
    found = judge_pairs(judge, [pair("a", "b")], cache)
    (judgment,), usable = found.judgments, reason == "A"
    assert judgment == (0.5 if usable else None, ("A", reason))
    assert found.counts[f"verdicts_{reason}"] == 1 + usable
    assert first_place(found.judgments) == ([1.0] if usable else [])


def test_a_second_run_asks_nothing(httpserver, judge, cache):
    httpserver.expect_request(PATH).respond_with_handler(answering(longer))
    pairs = [pair("a", "aaa"), pair("aaaa", "a")]
    priced = judge.model_copy(update={"price_in": 3.0, "price_out": 15.0})
    first, second = (judge_pairs(priced, pairs, cache) for _ in range(2))
    assert len(httpserver.log) == 4
    assert first.judgments == second.judgments
    assert (first.counts["cached"], second.counts["cached"]) == (0, 4)
    # 4 x (10 x 3 + 2 x 15) / 1e6, all of it paid in the first run.
    assert [found.counts["cost"] for found in (first, second)] == pytest.approx([240e-6, 240e-6])
    assert [found.counts["cost_now"] for found in (first, second)] == pytest.approx([240e-6, 0.0])
    assert (second.counts["prompt_tokens"], second.counts["answer_tokens"]) == (40, 8)


def test_a_stopped_run_keeps_what_was_answered(judge, tmp_path):
    """Also the answer that comes after another request stopped the run."""
    refused = threading.Event()

    def handler(question: Request) -> Response:
        if content(question) == "wrong":
            refused.set()
            return Response("no such model", 404)
        assert refused.wait(10)
        return Response(json.dumps(completion("[[A]]")))

    file = tmp_path / "stopped.sqlite"
    with HTTPServer(threaded=True) as server:
        server.expect_request(PATH).respond_with_handler(handler)
        two = judge.model_copy(update={"url": server.url_for("/v1"), "parallel": 2})
        cache = AnswerCache(file)
        with pytest.raises(UserError, match="status 404: no such model"):
            ask_all(two, [messages("paid"), messages("wrong"), messages("next")], cache)
        cache.close()
    cache = AnswerCache(file)
    assert cache.get(request_key(two, messages("paid"))).text == "[[A]]"
    cache.close()


def test_the_key_of_an_answer_is_all_that_it_depends_on(judge):
    def key(update, text="hi"):
        return request_key(judge.model_copy(update=update), messages(text))

    assert len(key({})) == 64
    different = [{"model": "n"}, {"url": "http://other/v1"}, {"request": {"temperature": 1}}]
    assert len({key({}), key({}, "ho"), *map(key, different)}) == 5
    assert key({"parallel": 9, "price_in": 1.0, "key_variable": "K"}) == key({})


def test_a_failed_request_is_not_kept_and_asked_again_next_time(httpserver, judge, cache):
    httpserver.expect_request(PATH).respond_with_data("down", 503, NOW)
    answers, counts = ask_all(judge, [messages()], cache)
    assert (answers, counts.failed, counts.retries) == ([None], 1, 2)
    httpserver.clear()
    httpserver.expect_request(PATH).respond_with_json(completion("[[A]]", usage=None))
    answers, counts = ask_all(judge, [messages()], cache)
    assert answers[0].text == "[[A]]"
    assert (counts.without_usage, counts.prompt_tokens) == (1, 0)


def test_an_endpoint_that_is_down_is_given_up(httpserver, judge, cache):
    httpserver.expect_request(PATH).respond_with_data("down", 503, NOW)
    many = [messages(str(number)) for number in range(50)]
    with pytest.raises(UserError, match=r"503.*down") as error:
        ask_all(judge, many, cache)
    assert error.value.code == "judge-fails"
    # One thread may have begun the next before the fifth failure was seen.
    assert FAILED_IN_A_ROW * 3 <= len(httpserver.log) <= (FAILED_IN_A_ROW + 1) * 3


def test_a_request_that_is_too_long_and_a_missing_server_fail_alone_and_at_once(httpserver, judge, cache):
    httpserver.expect_ordered_request(PATH).respond_with_data("too many tokens", 400)
    httpserver.expect_ordered_request(PATH).respond_with_json(completion("[[A]]"))
    answers, counts = ask_all(judge, [messages("long"), messages()], cache)
    assert [answer and answer.text for answer in answers] == [None, "[[A]]"]
    assert (counts.failed, counts.retries) == (1, 0)
    gone = judge.model_copy(update={"url": "http://127.0.0.1:9/v1", "attempts": 1})
    answers, counts = ask_all(gone, [messages()], cache)
    assert (answers, counts.failed) == ([None], 1)


def test_the_key_is_sent_and_written_nowhere_else(httpserver, judge, tmp_path, monkeypatch):
    keyed = judge.model_copy(update={"key_variable": "MY_KEY"})
    cache = AnswerCache(tmp_path / "keyed.sqlite")
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(UserError, match="MY_KEY") as missing:
        ask_all(keyed, [messages()], cache)
    assert missing.value.code == "missing-key"
    for wrong in (f"{KEY}\nnext", f"{KEY} two", f"{KEY}\u2026"):
        monkeypatch.setenv("MY_KEY", wrong)
        with pytest.raises(UserError) as refused:
            ask_all(keyed, [messages()], cache)
        assert (refused.value.code, KEY in str(refused.value)) == ("invalid-key", False)
    monkeypatch.setenv("MY_KEY", KEY)
    headers = {"Authorization": f"Bearer {KEY}"}
    httpserver.expect_ordered_request(PATH, headers=headers).respond_with_json(completion("[[A]]"))
    httpserver.expect_ordered_request(PATH).respond_with_data(f"bad key {KEY}", 401)
    assert ask_all(keyed, [messages()], cache)[0][0].text == "[[A]]"
    with pytest.raises(UserError, match=r"status 401: bad key \(hidden\)"):
        ask_all(keyed, [messages("other")], cache)
    cache.close()
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_the_request_has_the_fields_of_the_file_and_no_key_of_another_endpoint(
    httpserver, judge, cache, monkeypatch
):
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", KEY)
    httpserver.expect_request(PATH).respond_with_json(completion("[[A]]"))
    fields = {"top_k": 3, "chat_template_kwargs": {"enable_thinking": False}, "temperature": None}
    ask_all(judge.model_copy(update={"request": fields}), [messages()], cache)
    sent = httpserver.log[0][0]
    assert "Authorization" not in sent.headers
    assert KEY not in str(sent.headers)
    assert sent.json == {"model": "m", "messages": messages(), **fields}


def test_requests_at_once_are_bounded(judge, cache):
    lock, now, most = threading.Lock(), 0, 0
    full = threading.Barrier(3)

    def handler(question: Request) -> Response:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        full.wait(10)  # three must be under way at once for any to be answered
        with lock:
            now -= 1
        return Response(json.dumps(completion("[[A]]")))

    with HTTPServer(threaded=True) as server:
        server.expect_request(PATH).respond_with_handler(handler)
        three = judge.model_copy(update={"url": server.url_for("/v1"), "parallel": 3})
        answers, _ = ask_all(three, [messages(str(number)) for number in range(9)], cache)
    assert (len(answers), most) == (9, 3)


def test_the_request_has_what_the_file_says_and_replies_are_text(judge):
    custom = judge.model_copy(update={"system": "", "prompt": "{prompt}|{reply_a}|{reply_b}"})
    found = request(custom, messages("p"), "{reply_b}", "second")
    assert found == [{"role": "user", "content": "p|{reply_b}|second"}]
    turns = [Message(role="system", content="s"), Message(role="user", content="u")]
    assert request(custom, turns, "a", "b")[0]["content"] == "system: s\n\nuser: u|a|b"
    assert request(judge, messages("p"), "a", "b")[0]["role"] == "system"


def test_what_is_not_installed_and_what_is_no_cache_are_named(judge, cache, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match="openai"):
        ask_all(judge, [messages()], cache)
    (tmp_path / "x.sqlite").write_text("this is a text, and long enough to be looked at as one" * 20)
    with pytest.raises(UserError) as error:
        AnswerCache(tmp_path / "x.sqlite")
    assert error.value.code == "unreadable-file"


LEAST = "url: http://localhost:1/v1\nmodel: m\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\n", "no url"),
        ("- a\n", "a judge is a table"),
        (LEAST + "pararel: 3\n", r"judge.yml:3: unknown key 'pararel'.*parallel"),
        (LEAST + "parallel: many\n", r"judge.yml:3: parallel: got 'many'"),
        (LEAST + "prompt: '{prompt} {reply_a}'\n", r"no \{reply_b\}"),
        (LEAST + "request: {model: x}\n", "request.model"),
        ("url: localhost\nmodel: m\n", "must begin with http"),
    ],
)
def test_a_wrong_file_is_named_and_the_shortest_is_enough(tmp_path, text, message):
    (tmp_path / "judge.yml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_judge(tmp_path / "judge.yml")
    (tmp_path / "judge.yml").write_text(LEAST)
    found = load_judge(tmp_path / "judge.yml")
    assert (found.prompt, found.key_variable, found.request["temperature"]) == (PROMPT, None, 0)
