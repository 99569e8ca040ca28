"""A server behind an address: a stand-in of vLLM's routes that samples with transformers, and its faults."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from tests.sampling.test_sampler import EOS, TEMPLATE, language_model
from tests.sampling.test_sampler import PROMPTS as ALL
from tests.tiny import move_trained, tiny_llama, tiny_t5
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel
from tokenward.sampling import SamplingSettings, sample_replies
from tokenward.sampling.dialects import Completions, LlamaCpp
from tokenward.sampling.engines import PROBE_TOKENS, EngineSampler, Order
from tokenward.sampling.server import ServerSampler
from tokenward.scoring.reads import token_values
from tokenward.tokens.rows import TokenRow
from tokenward.types import Comparison

PROMPTS = ALL[:4]
GREEDY = SamplingSettings(max_new_tokens=8, temperature=0.0)
HOT = SamplingSettings(max_new_tokens=8, temperature=0.7, top_p=0.9, top_k=40)
KEY = "sk-very-secret"
MODEL = language_model(tiny_llama())
QUICK = {"timeout": 5.0, "attempts": 2, "parallel": 4}
LOCK = threading.Lock()
BLANK = Comparison(key="k", prompt=(), responses=("",), ranks=(0,), source="s")
Change = Callable[[dict[str, Any], dict[str, Any]], Any]


def answer(model: LanguageModel, body: dict[str, Any]) -> dict[str, Any]:
    """What vLLM answers to a completion request, sampled with transformers."""
    settings = SamplingSettings(
        max_new_tokens=body["max_tokens"],
        temperature=body["temperature"],
        top_p=body["top_p"],
        top_k=max(body["top_k"], 0),
        stop=tuple(body["stop"] or ()),
    )
    with LOCK:  # the seed and the fast head belong to the whole process
        (reply,) = sample_replies(model, TEMPLATE, [body["prompt"]], settings, seed=body["seed"])
        row = TokenRow(BLANK, body["prompt"], [reply.ids], [0])
        ((values,),) = token_values(model, [row], precision="float32", tokens_per_batch=4096)
    choice: dict[str, Any] = {
        "text": reply.text,
        "token_ids": reply.ids,
        "prompt_token_ids": body["prompt"],
        "finish_reason": "stop" if reply.ended else "length",
    }
    if body["logprobs"]:
        choice["logprobs"] = {"token_logprobs": values.tolist()}
    return {"choices": [choice]}


class Stand:
    """The stand-in: serves a model, keeps what it was asked, and changes its answers."""

    def __init__(self, server: HTTPServer) -> None:
        self.server, self.model, self.asked = server, MODEL, []
        self.change: Change = lambda body, found: found
        self.models = [{"id": "tiny", "owned_by": "vllm"}]
        server.expect_request("/v1/models").respond_with_handler(
            lambda request: Response(json.dumps({"data": self.models}))
        )
        server.expect_request("/v1/completions").respond_with_handler(self._complete)

    def _complete(self, request: Request) -> Response:
        body = json.loads(request.data)
        self.asked.append(body)
        found = self.change(body, answer(self.model, body))
        return found if isinstance(found, Response) else Response(json.dumps(found))

    @property
    def address(self) -> str:
        return self.server.url_for("/v1")

    def sampler(self, settings: SamplingSettings = GREEDY, **more: Any) -> EngineSampler:
        engine = ServerSampler(address=self.address, **{**QUICK, **more}).open()
        return EngineSampler(engine=engine, model=MODEL, template=TEMPLATE, settings=settings)


@pytest.fixture
def stand():
    with HTTPServer(threaded=True) as server:
        yield Stand(server)


def ids(groups):
    return [[reply.ids for reply in group] for group in groups]


def test_greedy_replies_are_those_of_transformers_in_order(stand):
    seen: list[int] = []
    sampler = stand.sampler()
    found = sampler(PROMPTS, count=2, seed=0, progress=seen.append)
    expected = sample_replies(MODEL, TEMPLATE, PROMPTS, GREEDY, seed=0)
    assert found == [[reply, reply] for reply in expected]
    assert sum(seen) == 2 * len(PROMPTS)
    (check,) = sampler.checks
    assert check.tokens == sum(
        len(answer(MODEL, body)["choices"][0]["token_ids"]) for body in stand.asked[: len(PROMPTS)]
    )
    assert check.largest < 1e-5


def test_every_reply_has_its_seed_and_what_is_asked_is_complete(stand):
    sampler = stand.sampler(replace(HOT, stop=("zz",)))
    found = sampler(PROMPTS[:2], count=3, seed=7)
    assert found == sampler(PROMPTS[:2], count=3, seed=7)
    assert found != sampler(PROMPTS[:2], count=3, seed=8)
    asked = sorted((body for body in stand.asked[2:8]), key=lambda body: (len(body["prompt"]), body["seed"]))
    assert len({body["seed"] for body in asked}) == 6
    assert all(0 <= body["seed"] < 2**31 for body in asked)
    first = next(body for body in stand.asked[2:8] if body["prompt"] == PROMPTS[0])
    del first["seed"]
    assert first == {
        "model": "tiny",
        "prompt": PROMPTS[0],
        "max_tokens": 8,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "stop": ["zz"],
        "stop_token_ids": [EOS, MODEL.model.config.eos_token_id],
        "return_token_ids": True,
        "logprobs": None,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_p": 0.0,
        "n": 1,
    }
    # The weights are checked with the whole distribution, whatever the settings are.
    probe = stand.asked[0]
    assert (probe["temperature"], probe["top_p"], probe["top_k"], probe["logprobs"]) == (1.0, 1.0, -1, 1)
    assert probe["max_tokens"] == 8 < PROBE_TOKENS


def test_answers_keep_their_order_and_requests_at_once_are_bounded(stand):
    now, most, lock, full = 0, 0, threading.Lock(), threading.Barrier(4)

    def change(body, found):
        nonlocal now, most
        if body["logprobs"]:
            return found
        with lock:
            now += 1
            most = max(most, now)
        full.wait(10)  # four must be under way at once for any to be answered
        with lock:
            now -= 1
        return found

    stand.change = change
    found = stand.sampler()(PROMPTS[:4], count=2, seed=0)
    expected = sample_replies(MODEL, TEMPLATE, PROMPTS[:4], GREEDY, seed=0)
    assert found == [[reply, reply] for reply in expected]
    assert most == 4


def changed(**new):
    """A change of the choice that leaves the check of the weights alone."""
    return lambda body, found: found if body["logprobs"] else {"choices": [{**found["choices"][0], **new}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(token_ids=None), "text without token ids"),
        (lambda body, found: {"choices": []}, "does not return one choice"),
        (lambda body, found: {"choices": found["choices"] * 2}, "does not return one choice"),
        (lambda body, found: {"error": "no"}, "does not return one choice"),
        (changed(prompt_token_ids=[1]), "read 1 prompt tokens in place of the"),
        (changed(finish_reason="abort"), "finish_reason 'abort'"),
        (changed(token_ids=[5] * 9), "9 tokens where at most 8"),
        (changed(token_ids=[]), "a reply without tokens"),
        (changed(token_ids=[5, 266]), "token id 266, but ids of tiny are integers from 0 to 265"),
        (changed(token_ids=[-1]), "token id -1"),
        (changed(token_ids=["7"]), "token id '7'"),
        (changed(token_ids=[True]), "token id True"),
        (changed(token_ids=[5, 6], finish_reason="length"), "2 of 8 tokens without an end"),
        (changed(logprobs=7), r"unknown form \(AttributeError"),
        (changed(logprobs={"token_logprobs": "ab"}, token_ids=[5, EOS]), "the log-probability 'a'"),
        (
            changed(logprobs={"token_logprobs": [0.0, float("nan")]}, token_ids=[5, EOS]),
            "log-probability nan",
        ),
        (changed(token_ids=["x" * 10**6]), "token id 'xxx"),
        (lambda body, found: Response('{"choices": ' * 10**5), "did not answer in 2 attempts"),
        (changed(logprobs={"token_logprobs": [0.0]}, token_ids=[5, EOS]), "1 log-probabilities of 2 tokens"),
    ],
)
def test_a_wrong_answer_is_refused_with_what_was_wrong(stand, change, message):
    stand.change = change
    with pytest.raises(UserError, match=message) as error:
        stand.sampler()(PROMPTS[:2], count=1, seed=0)
    assert error.value.code == ("server-fails" if "attempts" in message else "wrong-replies")
    assert len(str(error.value)) < 1000


def test_a_server_without_log_probabilities_cannot_be_checked(stand):
    stand.change = lambda body, found: {"choices": [{**found["choices"][0], "logprobs": None}]}
    with pytest.raises(UserError, match="no log-probabilities, without which its weights cannot be checked"):
        stand.sampler()(PROMPTS[:2], count=1, seed=0)


def test_an_end_that_is_none_here_is_continued(stand):
    """A server may stop at a token of its own list. What follows is sampled after the tokens so far."""
    expected = sample_replies(MODEL, TEMPLATE, PROMPTS[:3], GREEDY, seed=0)

    def change(body, found):
        choice = found["choices"][0]
        if body["logprobs"] or len(choice["token_ids"]) < 5:
            return found
        return {"choices": [{**choice, "token_ids": choice["token_ids"][:4], "finish_reason": "stop"}]}

    stand.change = change
    assert [reply for (reply,) in stand.sampler()(PROMPTS[:3], count=1, seed=0)] == expected
    assert max(len(body["prompt"]) for body in stand.asked) >= max(map(len, PROMPTS[:3])) + 4


def test_a_stop_text_ends_a_reply_and_is_no_part_of_its_text(stand):
    (plain,) = sample_replies(MODEL, TEMPLATE, PROMPTS[:1], GREEDY, seed=0)
    stop = plain.text[3:5]
    settings = replace(GREEDY, stop=(stop,))
    (expected,) = sample_replies(MODEL, TEMPLATE, PROMPTS[:1], settings, seed=0)
    assert stand.sampler(settings)(PROMPTS[:1], count=1, seed=0) == [[expected]]
    assert expected.ended
    # A server that does not know stop texts gives more tokens, and the reply is the same.
    stand.change = lambda body, found: answer(MODEL, {**body, "stop": None})
    assert stand.sampler(settings)(PROMPTS[:1], count=1, seed=0) == [[expected]]


def other_model(by: float) -> LanguageModel:
    model = tiny_llama()
    move_trained(model, by=by)
    return language_model(model)


def test_other_weights_are_refused_with_the_figure(stand):
    stand.model = other_model(0.1)
    with pytest.raises(
        UserError, match=r"differ from the model's by \d\.\d+ nats per token .* the tolerance is 0.1"
    ) as error:
        stand.sampler()(PROMPTS, count=1, seed=0)
    assert error.value.code == "other-weights"
    assert all(body["logprobs"] for body in stand.asked)  # nothing was sampled


def test_a_small_difference_is_enough_to_tell_the_model_before_training(stand):
    """Both are within the tolerance. The nearer one is the one that the server holds."""
    before = replace(other_model(0.001), name="before")
    sampler = stand.sampler()
    sampler.before = before
    sampler(PROMPTS, count=1, seed=0)
    assert sampler.checks[0].mean < 1e-5
    stand.model = before
    sampler = stand.sampler()
    sampler.before = before
    with pytest.raises(UserError, match="closer to before, the model before training") as error:
        sampler(PROMPTS, count=1, seed=0)
    assert error.value.code == "other-weights"
    sampler.before = None
    sampler(PROMPTS, count=1, seed=0)
    assert 1e-5 < sampler.checks[0].mean < 0.05


def test_weights_that_change_are_refused_at_the_next_call(stand):
    mine = language_model(tiny_llama())
    sampler = stand.sampler()
    sampler.model = mine
    sampler(PROMPTS[:1], count=1, seed=0)
    sampler(PROMPTS[1:2], count=1, seed=0)
    assert len(sampler.checks) == 1
    with torch.no_grad():
        mine.model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-4
    with pytest.raises(UserError, match="keeps those that it was started with") as error:
        sampler(PROMPTS[:1], count=1, seed=0)
    assert error.value.code == "weights-changed"


def test_an_engine_that_answers_as_before_did_not_take_the_new_weights(stand, monkeypatch):
    mine = language_model(tiny_llama())
    sampler = stand.sampler()
    sampler.model = mine
    sampler(PROMPTS[:1], count=1, seed=0)
    monkeypatch.setattr(type(sampler.engine), "hold", lambda self, model, *, first: None)
    with torch.no_grad():
        mine.model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-4
    with pytest.raises(UserError, match="answers exactly as before the weights changed"):
        sampler(PROMPTS[:1], count=1, seed=0)


def test_what_may_pass_is_asked_again_and_what_does_not_is_given_up(stand):
    release, seen = threading.Event(), []

    def change(body, found):
        seen.append(body)
        fault = len(seen) - 1
        if fault == 0:
            return Response("slow down", 429, {"Retry-After": "0.01"})
        if fault == 1:
            return Response("{", 200)
        if fault == 2:
            release.wait(5)
        return found

    stand.change = change
    expected = sample_replies(MODEL, TEMPLATE, PROMPTS[:1], GREEDY, seed=0)
    sampler = stand.sampler(attempts=4, timeout=0.8, parallel=1)
    assert sampler(PROMPTS[:1], count=1, seed=0) == [expected]
    release.set()
    assert len(seen) >= 5
    stand.change = lambda body, found: Response(f"out of memory {KEY}", 503, {"Retry-After": "0.01"})
    with pytest.raises(
        UserError, match=r"did not answer in 2 attempts. The last: status 503: out of memory"
    ) as error:
        stand.sampler()(PROMPTS[:1], count=1, seed=0)
    assert error.value.code == "server-fails"


def test_the_servers_words_are_shown_without_the_key_and_bounded(stand, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    stand.change = lambda body, found: Response(f"prompt too long for {KEY} " + "x" * 1000, 400)
    with pytest.raises(
        UserError, match=r"refuses the request with status 400: prompt too long for \(hidden\)"
    ) as error:
        stand.sampler(key_variable="MY_KEY")(PROMPTS[:1], count=1, seed=0)
    assert error.value.code == "server-refuses"
    assert KEY not in str(error.value)
    assert len(str(error.value)) < 600
    assert {request.headers["Authorization"] for request, _ in stand.server.log} == {f"Bearer {KEY}"}
    assert not {KEY} & set(ServerSampler(address=stand.address, key_variable="MY_KEY").open().facts.values())


def test_after_an_error_waiting_requests_are_not_sent(stand):
    stand.change = lambda body, found: found if body["logprobs"] else Response("no", 400)
    with pytest.raises(UserError):
        stand.sampler(parallel=2)(PROMPTS[:1], count=20, seed=0)
    assert len(stand.asked) < 10


@pytest.mark.parametrize(
    ("models", "name", "message"),
    [
        ([], None, "serves no model"),
        ([{"id": "a"}, {"id": "b"}], None, "serves a, b, and served_model_name is not set"),
        ([{"id": "a"}], "b", "serves a, and served_model_name is 'b'"),
        ([{"id": str(n)} for n in range(7)], "b", "0, 1, 2, 3, 4 and 2 more"),
        ("none", None, "serves no model"),
    ],
)
def test_the_model_at_the_address_must_be_one(stand, models, name, message):
    stand.models = models
    with pytest.raises(UserError, match=message) as error:
        stand.sampler(served_model_name=name)
    assert error.value.code == "unknown-model"


def test_a_model_that_was_exchanged_since_the_server_was_opened_is_refused(stand):
    sampler = stand.sampler()
    stand.models = [{"id": "another", "owned_by": "vllm"}]
    with pytest.raises(UserError, match="serves another model than before") as error:
        sampler(PROMPTS[:1], count=1, seed=0)
    assert error.value.code == "other-weights"


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/v1 did not answer in 1 attempts") as error:
        ServerSampler(address="http://127.0.0.1:9/v1", attempts=1).open()
    assert error.value.code == "server-fails"


@pytest.mark.parametrize(
    "address", ["localhost:8000", "", "http://[::1/v1", "http://me:pw@host/v1", "http://host/v1?key=pw"]
)
def test_an_address_is_a_url_without_secrets(address):
    for name in ("address", "start_address"):
        with pytest.raises(UserError) as error:
            ServerSampler(**{"address": "http://host/v1", name: address})
        assert (error.value.code, error.value.key) == ("bad-url", name)
        assert "pw" not in str(error.value)


def test_settings_that_a_server_cannot_take_are_refused(stand):
    with pytest.raises(UserError, match=r"raises the temperature 0\.001 to 0\.01"):
        stand.sampler(replace(HOT, temperature=0.001))(PROMPTS[:1], count=1, seed=0)
    with pytest.raises(UserError, match="fixed length"):
        stand.sampler(replace(HOT, fixed_length=True))(PROMPTS[:1], count=1, seed=0)
    stand.models = [{"id": "tiny", "owned_by": "sglang"}]
    with pytest.raises(UserError, match="SGLang applies top_k and top_p to the same distribution"):
        stand.sampler(HOT)(PROMPTS[:1], count=1, seed=0)
    stand.sampler(replace(HOT, top_k=0))(PROMPTS[:1], count=1, seed=0)
    encoder = stand.sampler()
    encoder.model = language_model(tiny_t5())
    encoder.template = replace(TEMPLATE, encoder=True)
    with pytest.raises(UserError, match="has an encoder"):
        encoder(PROMPTS[:1], count=1, seed=0)


ORDER = Order([1, 2], HOT, [EOS], seed=9, logprobs=True)
LLAMA = {
    "tokens": [5, 6, 7, EOS],
    "tokens_evaluated": 2,
    "truncated": False,
    "stop_type": "eos",
    "completion_probabilities": [{"id": token, "logprob": -float(token)} for token in (5, 6, 7, EOS)],
    "generation_settings": {
        "temperature": 0.699999988079071,
        "top_p": 0.8999999761581421,
        "top_k": 40,
        "seed": 9,
        "samplers": ["temperature", "top_k", "top_p"],
    },
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "returns no tokens"),
        ({"tokens_evaluated": 3}, "read 3 prompt tokens in place of the 2"),
        ({"truncated": True}, "exceed its context"),
        ({"generation_settings": {"seed": 0}}, "sampled with seed 0 in place of 9"),
        ({"generation_settings": {"top_p": 0.95}}, "sampled with top_p 0.95 in place of 0.9"),
        ({"generation_settings": {"samplers": ["top_k"]}}, "sampled with samplers"),
    ],
)
def test_llamacpp_must_sample_as_it_was_asked(change, message):
    dialect = LlamaCpp("http://host/completion")
    assert dialect.read(ORDER, LLAMA) == ([5, 6, 7, EOS], True, [-5.0, -6.0, -7.0, -float(EOS)])
    with pytest.raises(Exception, match=message):
        dialect.read(ORDER, {**LLAMA, **change})


@pytest.mark.parametrize(
    ("tokens", "known", "values"),
    [
        ([5, 6, 7], [5, 6, 7], [-5, -6, -7]),
        ([5, 6, 7], [5, 7], [-5, None, None]),  # 6 is a part of a character
        ([5, 6, 6, 7], [5, 6, 7], [-5, None, None, None]),  # which 6 was left out is not known
        ([5, 5, 7, 8], [5, 7], [None, None, None, None]),
        ([5, 6, 7], [], [None, None, None]),
    ],
)
def test_log_probabilities_of_llamacpp_belong_to_their_tokens(tokens, known, values):
    found = [{"id": token, "logprob": -float(token)} for token in known]
    read = LlamaCpp("p").read(ORDER, {**LLAMA, "tokens": tokens, "completion_probabilities": found})
    assert list(read.logprobs or ()) == values


def test_top_k_off_is_what_each_server_calls_it():
    order = ORDER._replace(settings=replace(HOT, top_k=0))
    assert Completions().body(order, "m")["top_k"] == -1
    assert LlamaCpp("p").body(order, "m")["top_k"] == 0
