"""A real llama.cpp server with a model of the tests: its replies are those of transformers."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import tokenward
from tests.sampling.llamacpp import llamacpp, write_gguf
from tests.tiny import make_workplace, save_tiny
from tokenward.artifacts import read_jsonl, read_manifest
from tokenward.errors import UserError
from tokenward.models.loading import load_model
from tokenward.sampling import SamplingSettings, sample_replies
from tokenward.sampling.engines import EngineSampler
from tokenward.sampling.server import ServerSampler

GREEDY = SamplingSettings(max_new_tokens=16, temperature=0.0)
TEXTS = ["hello", "the good moon and the sun", "a", "who are you and what is it"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(save_tiny(tmp_path_factory.mktemp("llamacpp") / "tiny")))


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return write_gguf(model.model, model.tokenizer, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def address(file):
    with llamacpp(file) as found:
        yield found


@pytest.fixture(scope="module")
def template(model):
    return model.template("chat")


@pytest.fixture(scope="module")
def prompts(template):
    return [template.prompt_ids([{"role": "user", "content": text}]) for text in TEXTS]


def sampler(address, model, template, settings):
    engine = ServerSampler(address=address, parallel=4).open()
    return EngineSampler(engine=engine, model=model, template=template, settings=settings)


def test_greedy_replies_are_those_of_transformers(address, model, template, prompts):
    asked = sampler(address, model, template, GREEDY)
    expected = sample_replies(model, template, prompts, GREEDY, seed=0)
    assert asked(prompts, count=2, seed=0) == [[reply, reply] for reply in expected]
    (check,) = asked.checks
    assert check.largest < 1e-5  # the server was started with keys and values in float32
    # A text at which the server stops, which may begin and end inside of tokens.
    stop = expected[1].text[2:4]
    settings = replace(GREEDY, stop=(stop,))
    found = sampler(address, model, template, settings)(prompts, count=1, seed=0)
    wanted = sample_replies(model, template, prompts, settings, seed=0)
    assert [reply for (reply,) in found] == wanted
    assert wanted[1].ended
    assert stop not in wanted[1].text


def test_samples_repeat_and_have_the_distribution_of_transformers(address, model, template, prompts):
    """First tokens at a temperature, top_k and top_p whose order matters: n = 400, chi-square."""
    settings = SamplingSettings(max_new_tokens=1, temperature=0.5, top_k=12, top_p=0.9)
    with torch.inference_mode():
        ids = torch.tensor([prompts[1]])
        raw = scores = model.model(ids).logits[:, -1].float()
    for warper in (TemperatureLogitsWarper(0.5), TopKLogitsWarper(12), TopPLogitsWarper(0.9)):
        scores = warper(ids, scores)
    exact = scores.softmax(-1)[0]
    possible = exact.nonzero().flatten().tolist()
    assert 4 <= len(possible) < 12  # both limits cut something off
    asked = sampler(address, model, template, settings)
    (found,) = asked(prompts[1:2], count=400, seed=0)
    counts = Counter(reply.ids[0] for reply in found)
    assert set(counts) <= set(possible)
    expected = (exact[possible] / exact[possible].sum() * 400).double()
    observed = [counts[token] for token in possible]
    assert stats.chisquare(observed, expected.tolist(), sum_check=False).pvalue > 0.01
    # In llama.cpp's own order, top_p before the temperature, other tokens would have come among 400.
    other = TopPLogitsWarper(0.9)(ids, TopKLogitsWarper(12)(ids, raw))
    wrong = TemperatureLogitsWarper(0.5)(ids, other).softmax(-1)[0]
    assert float(wrong[possible].sum()) ** 400 < 1e-4
    longer = sampler(address, model, template, replace(settings, max_new_tokens=16))
    assert longer(prompts, count=3, seed=5) == longer(prompts, count=3, seed=5)
    assert longer(prompts, count=3, seed=5) != longer(prompts, count=3, seed=6)


def test_a_context_that_is_too_short_is_refused(file, model, template, prompts):
    with llamacpp(file, context=256, parallel=1) as small:
        asked = sampler(small, model, template, replace(GREEDY, max_new_tokens=250))
        with pytest.raises(UserError, match=r"exceed its context") as error:
            asked([*prompts, [*prompts[1], *([7] * 100)]], count=1, seed=0)
        assert error.value.code == "wrong-replies"
        with pytest.raises(UserError, match=r"status 400: .*exceeds the available context size") as error:
            sampler(small, model, template, GREEDY)([*prompts, prompts[1] * 20], count=1, seed=0)
        assert error.value.code == "server-refuses"


def test_an_evaluation_samples_before_and_after_training_from_two_servers(tmp_path, monkeypatch):
    """And refuses the server of the model before training in place of the policy's."""
    monkeypatch.chdir(tmp_path)
    start = save_tiny(tmp_path / "tiny")
    recipe = make_workplace(tmp_path, start)
    greedy = ["evaluation.top_k=1"]
    run = tokenward.run(recipe, greedy, quiet=True)
    expected = read_jsonl(run.path("evaluation") / "samples.jsonl")
    figures = tokenward.read_figures(run)
    files = [
        write_gguf(found.model, found.tokenizer, tmp_path / f"{name}.gguf")
        for name, found in (
            ("before", load_model(str(start))),
            ("after", load_model(str(run.path("policy") / "model"))),
        )
    ]
    with llamacpp(files[0]) as before, llamacpp(files[1]) as after:
        wrong = f"evaluation.sampler={{name: server, address: {before}}}"
        with pytest.raises(UserError, match=r"closer to .*, the model before training") as error:
            tokenward.run(recipe, [*greedy, wrong], quiet=True)
        assert error.value.code == "other-weights"
        right = f"evaluation.sampler={{name: server, address: {after}, start_address: {before}}}"
        again = tokenward.run(recipe, [*greedy, right], quiet=True)
        assert read_jsonl(again.path("evaluation") / "samples.jsonl") == expected
        assert tokenward.read_figures(again) == figures
        facts = read_manifest(again.path("evaluation")).facts["sampler"]
    assert [facts[side]["address"] for side in ("before", "after")] == [before, after]
    assert facts["after"]["software"] == "llamacpp"
    assert facts["after"]["weights"]["mean"] < 1e-5
    assert facts["after"]["weights"]["tokens"] > 0
