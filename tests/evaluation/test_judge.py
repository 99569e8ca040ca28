"""A judge behind a local server with faults."""

import json
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from tokenward.config.judge import PROMPT, JudgeTable, load_judge
from tokenward.errors import UserError
from tokenward.evaluation.answers import FAILED_IN_A_ROW, AnswerCache, ask_all, request_key
from tokenward.evaluation.endpoint import Endpoint, retry_after
from tokenward.evaluation.judge import Pair, first_place, judge_pairs, request, verdict
from tokenward.types import Message

PATH = "/v1/chat/completions"
KEY = "sk-very-secret"


def completion(text, *, usage=(10, 2), **choice):
    body = {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **choice}]
    }
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return body


def asked(question: Request):
    """The two replies in the order of a request."""
    content = json.loads(question.data)["messages"][-1]["content"]
    return tuple(content.split(f"<{name}>\n")[1].split(f"\n</{name}>")[0] for name in ("reply_a", "reply_b"))


def answering(by):
    """A handler that answers with ``by(reply_a, reply_b)``."""

    def handler(question: Request) -> Response:
        return Response(json.dumps(completion(by(*asked(question)))), content_type="application/json")

    return handler


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


def sending(judge, waits, environment=None):
    """An endpoint that notes its waits and does not wait."""
    return Endpoint(judge, environment or {}, pause=waits.append)


def test_both_orders_agree_on_the_longer_reply(httpserver, judge, cache):
    httpserver.expect_request(PATH, method="POST").respond_with_handler(answering(longer))
    found = judge_pairs(judge, [pair("a", "aaa"), pair("aaaa", "a"), pair("ab", "ba")], cache)
    assert [item.preferred for item in found.judgments] == [1.0, 0.0, 0.5]
    assert [item.verdicts for item in found.judgments] == [("B", "A"), ("A", "B"), ("C", "C")]
    assert found.counts["asked"] == 6
    assert len(httpserver.log) == 6


def test_a_judge_that_likes_a_place_gives_ties(httpserver, judge, cache):
    httpserver.expect_request(PATH).respond_with_handler(answering(lambda a, b: "Clearly. [[A]]"))
    found = judge_pairs(judge, [pair("a", "b"), pair("c", "dddd")], cache)
    assert [item.preferred for item in found.judgments] == [0.5, 0.5]
    assert first_place(found.judgments) == [1.0, 1.0]


def test_a_tie_in_one_order_is_half_a_win(httpserver, judge, cache):
    httpserver.expect_request(PATH).respond_with_handler(
        answering(lambda a, b: "[[B]]" if b == "after" else "[[C]]")
    )
    found = judge_pairs(judge, [pair("before", "after")], cache)
    assert found.judgments[0].preferred == 0.75
    assert first_place(found.judgments) == [0.25]


def test_equal_replies_tie_and_cost_no_request(httpserver, judge, cache):
    found = judge_pairs(judge, [pair("same", "same")], cache)
    assert found.judgments == [(0.5, ("same", "same"))]
    assert not httpserver.log
    assert first_place(found.judgments) == []


def test_429_waits_as_long_as_the_server_asks(httpserver, judge, cache):
    httpserver.expect_ordered_request(PATH).respond_with_data("slow down", 429, {"Retry-After": "7"})
    httpserver.expect_ordered_request(PATH).respond_with_json(completion("[[A]]"))
    waits = []
    answers, counts = ask_all(judge, [messages()], cache, endpoint=sending(judge, waits))
    assert answers[0].text == "[[A]]"
    assert waits == [7.0]
    assert (counts.retries, counts.failed) == (1, 0)


def test_retry_after_as_a_date_and_as_nonsense():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert 60 < retry_after(soon) <= 90
    assert retry_after("Mon, 01 Jan 2001 00:00:00 GMT") == 0.0
    assert retry_after("-3") == 0.0
    assert [retry_after(value) for value in (None, "soon", "inf", "nan")] == [None] * 4


def test_500_twice_then_fine(httpserver, judge, cache):
    for _ in range(2):
        httpserver.expect_ordered_request(PATH).respond_with_data("oh", 500)
    httpserver.expect_ordered_request(PATH).respond_with_json(completion("[[B]]"))
    waits = []
    answers, counts = ask_all(judge, [messages()], cache, endpoint=sending(judge, waits))
    assert answers[0].text == "[[B]]"
    assert counts.retries == 2
    # One second, then two, each cut by up to a half.
    assert 0.5 <= waits[0] <= 1.0 <= waits[1] <= 2.0


@pytest.mark.parametrize(
    "body", ["{", "[]", '{"choices": []}', '{"error": "x"}', '{"choices": [{"message": null}]}']
)
def test_a_body_that_is_no_completion_is_asked_again(httpserver, judge, cache, body):
    httpserver.expect_ordered_request(PATH).respond_with_data(body)
    httpserver.expect_ordered_request(PATH).respond_with_json(completion("[[C]]"))
    answers, counts = ask_all(judge, [messages()], cache, endpoint=sending(judge, []))
    assert (answers[0].text, counts.retries) == ("[[C]]", 1)


def test_a_time_out_is_asked_again(httpserver, judge, cache):
    release = threading.Event()

    def slow(question: Request) -> Response:
        release.wait(10)
        return Response(json.dumps(completion("[[C]]")))

    httpserver.expect_ordered_request(PATH).respond_with_handler(slow)
    httpserver.expect_ordered_request(PATH).respond_with_json(completion("[[A]]"))
    quick = judge.model_copy(update={"timeout": 0.2})
    waits = []

    def pause(seconds):
        waits.append(seconds)
        release.set()

    try:
        answers, _ = ask_all(quick, [messages()], cache, endpoint=Endpoint(quick, {}, pause=pause))
    finally:
        release.set()
    assert answers[0].text == "[[A]]"
    assert len(waits) == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (completion(""), "empty"),
        (completion(None), "empty"),
        (completion("I would say A."), "unparsable"),
        (completion("", finish_reason="content_filter"), "refused"),
        (completion(None) | {"choices": [{"message": {"content": None, "refusal": "I cannot."}}]}, "refused"),
    ],
)
def test_an_answer_without_a_verdict_is_counted_and_its_pair_left_out(httpserver, judge, cache, body, reason):
    httpserver.expect_ordered_request(PATH).respond_with_json(completion("[[A]]"))
    httpserver.expect_ordered_request(PATH).respond_with_json(body)
    found = judge_pairs(judge, [pair("a", "b")], cache)
    assert found.judgments == [(None, ("A", reason))]
    assert found.counts[f"verdicts_{reason}"] == 1
    assert first_place(found.judgments) == []


def test_the_last_mark_counts(cache):
    from tokenward.evaluation.answers import Answer

    assert verdict(Answer("[[A]] at first, yet [[B]]", False, 1, 1)) == "B"
    assert verdict(None) == "failed"


def test_a_second_run_asks_nothing(httpserver, judge, tmp_path):
    httpserver.expect_request(PATH).respond_with_handler(answering(longer))
    pairs = [pair("a", "aaa"), pair("aaaa", "a")]
    priced = judge.model_copy(update={"price_in": 3.0, "price_out": 15.0})
    found = []
    for _ in range(2):
        cache = AnswerCache(tmp_path / "again.sqlite")
        found.append(judge_pairs(priced, pairs, cache))
        cache.close()
    assert len(httpserver.log) == 4
    assert found[0].judgments == found[1].judgments
    assert (found[0].counts["cached"], found[1].counts["cached"]) == (0, 4)
    # 4 x (10 x 3 + 2 x 15) / 1e6, all of it paid in the first run.
    assert found[0].counts["cost"] == found[0].counts["cost_now"] == pytest.approx(240e-6)
    assert (found[1].counts["cost"], found[1].counts["cost_now"]) == (pytest.approx(240e-6), 0.0)
    assert (found[1].counts["prompt_tokens"], found[1].counts["answer_tokens"]) == (40, 8)


def test_what_was_answered_before_a_stop_is_kept(httpserver, judge, tmp_path):
    count = iter(range(100))

    def handler(question: Request) -> Response:
        if next(count) < 3:
            return answering(longer)(question)
        return Response("no such model", 404)

    httpserver.expect_request(PATH).respond_with_handler(handler)
    pairs = [pair("a", "aaa", text=str(number)) for number in range(4)]
    cache = AnswerCache(tmp_path / "stopped.sqlite")
    with pytest.raises(UserError, match="status 404"):
        judge_pairs(judge, pairs, cache)
    cache.close()
    httpserver.clear()
    httpserver.expect_request(PATH).respond_with_handler(answering(longer))
    cache = AnswerCache(tmp_path / "stopped.sqlite")
    assert judge_pairs(judge, pairs, cache).counts["cached"] == 3
    assert len(httpserver.log) == 5
    cache.close()


def test_an_answer_that_comes_while_another_request_stops_the_run_is_kept(judge, cache):
    class Stopping(Endpoint):
        def send(self, messages):
            if messages[0]["content"] == "wrong":
                raise UserError("refused")
            assert self._stopping.wait(10)
            return completion("[[A]]")

    two = judge.model_copy(update={"parallel": 2})
    with pytest.raises(UserError, match="refused"):
        ask_all(two, [messages("paid"), messages("wrong")], cache, endpoint=Stopping(two, {}))
    assert cache.get(request_key(two, messages("paid"))).text == "[[A]]"


def test_the_key_of_an_answer_is_all_that_it_depends_on(judge):
    def key(update, text="hi"):
        return request_key(judge.model_copy(update=update), messages(text))

    assert len(key({})) == 64
    different = [{"model": "n"}, {"url": "http://other/v1"}, {"request": {"temperature": 1}}]
    assert len({key({}), key({}, "ho"), *map(key, different)}) == 5
    assert key({"parallel": 9, "price_in": 1.0, "key_variable": "K"}) == key({})


def test_a_failed_request_is_not_kept_and_asked_again_next_time(httpserver, judge, cache):
    httpserver.expect_request(PATH).respond_with_data("down", 503)
    answers, counts = ask_all(judge, [messages()], cache, endpoint=sending(judge, []))
    assert (answers, counts.failed, counts.retries) == ([None], 1, 2)
    httpserver.clear()
    httpserver.expect_request(PATH).respond_with_json(completion("[[A]]"))
    answers, _ = ask_all(judge, [messages()], cache)
    assert answers[0].text == "[[A]]"


def test_an_endpoint_that_is_down_is_given_up(httpserver, judge, cache):
    httpserver.expect_request(PATH).respond_with_data("down", 503)
    many = [messages(str(number)) for number in range(50)]
    with pytest.raises(UserError, match=r"5 requests in a row .* failed, 3 attempts .*503.*down"):
        ask_all(judge, many, cache, endpoint=sending(judge, []))
    # One thread may have begun the next before the fifth failure was seen.
    assert FAILED_IN_A_ROW * 3 <= len(httpserver.log) <= (FAILED_IN_A_ROW + 1) * 3


def test_a_pair_that_is_too_long_for_the_judge_fails_alone_and_at_once(httpserver, judge, cache):
    httpserver.expect_ordered_request(PATH).respond_with_data("too many tokens", 400)
    httpserver.expect_ordered_request(PATH).respond_with_json(completion("[[A]]"))
    answers, counts = ask_all(judge, [messages("long"), messages()], cache, endpoint=sending(judge, []))
    assert [answer and answer.text for answer in answers] == [None, "[[A]]"]
    assert (counts.failed, counts.retries) == (1, 0)


def test_no_server_at_all_is_a_failure_too(httpserver, judge, cache):
    gone = judge.model_copy(update={"url": "http://127.0.0.1:9/v1"})
    answers, counts = ask_all(gone, [messages()], cache, endpoint=sending(gone, []))
    assert (answers, counts.failed) == ([None], 1)


def test_the_key_is_sent_and_stands_nowhere_else(httpserver, judge, tmp_path):
    keyed = judge.model_copy(update={"key_variable": "MY_KEY"})
    headers = {"Authorization": f"Bearer {KEY}"}
    httpserver.expect_request(PATH, headers=headers).respond_with_json(completion("[[A]]"))
    cache = AnswerCache(tmp_path / "keyed.sqlite")
    answers, _ = ask_all(keyed, [messages()], cache, endpoint=sending(keyed, [], {"MY_KEY": KEY}))
    assert answers[0].text == "[[A]]"
    httpserver.clear()
    httpserver.expect_request(PATH).respond_with_data(f"bad key {KEY}", 401)
    with pytest.raises(UserError, match=r"status 401: bad key \*\*\*") as caught:
        ask_all(keyed, [messages("other")], cache, endpoint=sending(keyed, [], {"MY_KEY": KEY}))
    assert KEY not in str(caught.value)
    cache.close()
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.iterdir())
    with pytest.raises(UserError, match="MY_KEY, and no such environment variable"):
        Endpoint(keyed, {})


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
    assert len(answers) == 9
    assert most == 3


def test_usage_that_is_not_named_is_counted(httpserver, judge, cache):
    httpserver.expect_request(PATH).respond_with_json(completion("[[A]]", usage=None))
    _, counts = ask_all(judge, [messages()], cache)
    assert (counts.without_usage, counts.prompt_tokens) == (1, 0)


def test_the_request_has_what_the_file_says_and_replies_are_text(judge):
    own = judge.model_copy(update={"system": "", "prompt": "{prompt}|{reply_a}|{reply_b}"})
    found = request(own, messages("p"), "{reply_b}", "second")
    assert found == [{"role": "user", "content": "p|{reply_b}|second"}]
    turns = [Message(role="system", content="s"), Message(role="user", content="u")]
    assert request(own, turns, "a", "b")[0]["content"] == "system: s\n\nuser: u|a|b"
    assert request(judge, messages("p"), "a", "b")[0]["role"] == "system"


def test_a_file_that_is_no_cache_is_named(tmp_path):
    (tmp_path / "x.sqlite").write_text("this is a text, and long enough to be looked at as one" * 20)
    with pytest.raises(UserError, match=r"x\.sqlite is not a cache"):
        AnswerCache(tmp_path / "x.sqlite")


LEAST = "url: http://localhost:1/v1\nmodel: m\n"


def test_the_shortest_file(tmp_path):
    (tmp_path / "judge.yml").write_text(LEAST)
    found = load_judge(tmp_path / "judge.yml")
    assert (found.prompt, found.key_variable, found.request["temperature"]) == (PROMPT, None, 0)


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
def test_a_wrong_file_is_named(tmp_path, text, message):
    (tmp_path / "judge.yml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_judge(tmp_path / "judge.yml")
