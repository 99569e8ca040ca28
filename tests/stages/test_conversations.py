"""Whole runs on replies that call tools and that think: what is the template's, what is others', what is the assistant's."""

import json
import random
from pathlib import Path

import pytest
import trl

import tokenward
from tests.tiny import tiny_llama, tiny_tokenizer
from tokenward.artifacts import read_manifest
from tokenward.config import parse_recipe
from tokenward.evaluation import sampled as sampled_module
from tokenward.evaluation.replies import reply_rows
from tokenward.report.show import shown_pair
from tokenward.sampling import Reply
from tokenward.scoring.store import TokenStore
from tokenward.stages.evaluation import measures_of
from tokenward.stages.run import Run
from tokenward.tokens.rows import TokenRow
from tokenward.types import Comparison

CITIES = ["Oslo", "Lima", "Kyoto", "Cairo", "Quito", "Riga"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
RECIPE = """
model: {{name: {model}}}
data: {{source: rows.jsonl, eval: 0.3}}
tokens: {{max_prompt_tokens: 1500, max_response_tokens: 500}}
oracle: {{training: {{learning_rate: 1.0e-3, per_device_train_batch_size: 4, max_steps: 2}}}}
policy: {{training: {{learning_rate: 1.0e-3, per_device_train_batch_size: 4, max_steps: 2}}}}
evaluation: {{prompts: 2, max_new_tokens: 4, bootstrap: 20}}
fixed_prompts: 0
"""


def calls(count: int) -> list[dict]:
    """A call, its answer and a reply, against a refusal or a call for another city."""
    rng, rows = random.Random(0), []
    for number in range(count):
        city, other = rng.sample(CITIES, 2)
        degrees = rng.randint(-9, 33)

        def asked(place: str, said: str, warm: int = degrees) -> list[dict]:
            call = {
                "id": "c1",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": place}},
            }
            answer = {
                "role": "tool",
                "tool_call_id": "c1",
                "name": "weather",
                "content": json.dumps({"degrees": warm}),
            }
            return [
                {"role": "assistant", "content": None, "tool_calls": [call]},
                answer,
                {"role": "assistant", "content": said},
            ]

        refusal = [{"role": "assistant", "content": f"I cannot know about {city}."}]
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"Weather in {city} on day {number}?"}],
                "chosen": asked(city, f"{degrees} degrees in {city}."),
                "rejected": refusal if number % 2 else asked(other, f"Warm in {other}."),
                "tools": TOOLS,
            }
        )
    return rows


def thoughts(count: int) -> list[dict]:
    """A sum with its steps, against a guess."""
    rng, rows = random.Random(1), []
    for _ in range(count):
        one, two = rng.randint(2, 40), rng.randint(2, 40)
        right = {"reasoning_content": f"{one} and {two} make {one + two}.", "content": f"It is {one + two}."}
        wrong = {"reasoning_content": "It looks large.", "content": f"It is {one + two + rng.randint(1, 9)}."}
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"{one} + {two}?"}],
                "chosen": [{"role": "assistant", **right}],
                "rejected": [{"role": "assistant", **wrong}],
            }
        )
    return rows


@pytest.fixture(scope="module")
def thinking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with Qwen 3's chat template."""
    folder = tmp_path_factory.mktemp("thinking")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(MARKS)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_of(rows: list[dict], model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **more) -> Path:
    monkeypatch.chdir(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model))
    return (folder / tokenward.run("recipe.yaml", quiet=True, **more).folder).resolve()


def texts(run: Path) -> set[tuple[str, str]]:
    """Of every response what the assistant wrote, and what stands among it."""
    store, found = TokenStore(run / "scores"), set()
    for key in store:
        record = store[key]
        raw = (record.text or "").encode()
        own = b"".join(raw[start:end] for start, end in zip(record.start, record.end, strict=True))
        ends = [0, *record.end[:-1]]
        others = b"".join(raw[end:start] for end, start in zip(ends, record.start, strict=True))
        found.add((own.decode(), others.decode()))
    return found


def test_a_call_and_the_last_reply_have_scores_and_the_tools_answer_has_none(
    thinking_model, tmp_path, monkeypatch
):
    run = run_of(calls(20), thinking_model, tmp_path, monkeypatch)
    for own, others in texts(run):
        if own.startswith("I cannot"):
            assert others == "<think>\n\n</think>\n\n"
            continue
        assert own.startswith('<tool_call>\n{"name": "weather", "arguments": {"city": "')
        assert "</tool_call><|im_end|>" in own
        assert own.endswith(".")
        assert others.startswith('\n<|im_start|>user\n<tool_response>\n{"degrees": ')
        assert others.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    shown = shown_pair(run, 1)
    context = [token.text for side in shown.sides for token in side if token.context]
    assert any("tool_response" in text for text in context)
    page = (run / "report" / "index.html").read_text()
    assert '"starts"' in page


def test_a_thought_has_scores_and_the_mark_before_it_has_none(thinking_model, tmp_path, monkeypatch):
    changes = ["scores.scorer={name: surprisal}"]
    run = run_of(thoughts(20), thinking_model, tmp_path, monkeypatch, overrides=changes, last="scores")
    found = texts(run)
    assert len(found) >= 20
    for own, others in found:
        assert others == "<think>\n"
        assert own.split("\n</think>\n\n")[1].startswith("It is ")


def test_variables_and_the_date_are_the_runs_whenever_it_is_continued(thinking_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in thoughts(12)))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=thinking_model) + "run: dated\n")
    settings = ["tokens.chat_template_kwargs={enable_thinking: false}"]
    run = tokenward.run("recipe.yaml", settings, last="oracle", quiet=True)
    assert run.style.variables == {"enable_thinking": False}
    prompt = run.tokenizer_template(run.start_model).render([{"role": "user", "content": "1 + 1?"}])
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    facts = read_manifest(run.path("oracle")).facts
    scorer = tokenward.TokenScorer.load(run.path("oracle"))
    assert scorer.template.variables == {"enable_thinking": False}
    # The day is that of the data stage, so a run that goes on tomorrow writes the same text.
    manifest = read_manifest(run.path("data"))
    assert run.style.day == facts["template_day"] == manifest.created[:10]
    manifest.model_copy(update={"created": "2026-02-03T23:59:59+00:00"}).write(run.path("data"))
    assert run.style.day == "2026-02-03"


def test_a_model_is_asked_as_its_template_asks_and_not_as_a_row_begins(monkeypatch):
    known = Comparison(key="k", prompt=(), responses=("a",), ranks=(0,), source="s")
    row = TokenRow(known, [1, 2], [[3]], [1], (), [7, 8])
    asked: list[list[int]] = []

    def replies(model, template, prompts, settings, **more) -> list[Reply]:
        asked.extend(prompts)
        return [Reply([5], "x", True)]

    monkeypatch.setattr(sampled_module, "sample_replies", replies)
    recipe, _ = parse_recipe("seed: 0", "a test", [])
    found = measures_of(Run(recipe=recipe)).replies(None, None, [row], "replies")  # type: ignore[arg-type]
    assert asked == [[1, 2, 7, 8]]
    (sampled,) = reply_rows([row], found)
    assert sampled.prompt == [1, 2, 7, 8]
