"""Two models on the same prompts: replies, measures, exports, resume."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest_httpserver import HTTPServer
from transformers import LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner
from werkzeug import Response

from tests.evaluation.test_judge import answering, asked, longer
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer
from tokenward import cli
from tokenward.config import parse_recipe
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.evaluation.benchmarks import Question
from tokenward.evaluation.replies import find_reward_model, rewards
from tokenward.models.loading import load_model
from tokenward.sampling import Reply, SamplingSettings, sample_replies
from tokenward.scoring.texts import TokenScorer
from tokenward.tools import model_replies
from tokenward.tools.compare_models import ModelComparison, compare_models
from tokenward.tools.model_replies import model_folder, short_name
from tokenward.types import Example, Message

FEW = ("evaluation.max_new_tokens=5", "evaluation.batch=2", "evaluation.bootstrap=20")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two tiny models that reply differently."""
    root = tmp_path_factory.mktemp("models")
    return tuple(
        str(save_tiny(root / name, tiny_llama(seed=seed))) for name, seed in (("one", 0), ("two", 1))
    )


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Say {number}.", "wanted": number} for number in range(5)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def compared(folders, **changes):
    wanted = {"before": folders[0], "after": folders[1], "prompts": "prompts.jsonl", "overrides": FEW}
    return compare_models(**{**wanted, **changes}, quiet=True)


def records(folder="runs/one-vs-two"):
    return [json.loads(line) for line in (Path(folder) / "replies.jsonl").read_text().splitlines()]


def test_metrics_lengths_and_wins_are_those_of_the_replies(folders, place):
    Path("mine.py").write_text(
        "def wanted_less_length(prompts, completions, wanted):\n"
        "    assert prompts == [f'Say {w}.' for w in wanted]\n"
        "    return [w - len(c) for w, c in zip(wanted, completions)]\n"
    )
    name = "mine:wanted_less_length"
    figures = compared(folders, metrics=["distinct_2", name])
    found = records()
    assert len(found) == 5
    lengths = np.array([[len(row[side][0]["text"]) for row in found] for side in ("before", "after")])
    assert figures["characters/change"].value == pytest.approx((lengths[1] - lengths[0]).mean())
    # The shorter reply has the higher number, since both have the same wanted.
    wins = np.where(lengths[1] < lengths[0], 1.0, np.where(lengths[1] == lengths[0], 0.5, 0.0))
    assert [row["preferred"][name] for row in found] == wins.tolist()
    assert figures[f"{name}/win_rate"].value == pytest.approx(wins.mean())
    stored = json.loads(Path("runs/one-vs-two/figures.json").read_text())
    assert stored[f"{name}/win_rate"]["value"] == figures[f"{name}/win_rate"].value
    assert stored["length/before"]["n"] == 5
    assert {"distinct_2/change", f"{name}/win_rate_equal_length", "ended/after"} <= set(stored)


def test_the_same_seed_gives_the_same_replies_and_a_model_ties_with_itself(folders, place):
    first = compared(folders, after=folders[0], metrics=["vader"], output="a")
    assert first["vader/ties"].value == 1.0
    assert all(row["before"] == row["after"] for row in records("a"))
    compared(folders, output="b")
    assert [row["before"] for row in records("a")] == [row["before"] for row in records("b")]
    compared(folders, output="c", overrides=(*FEW, "seed=1"))
    assert [row["before"] for row in records("a")] != [row["before"] for row in records("c")]


def test_a_stopped_comparison_continues_at_its_batch(folders, place, monkeypatch):
    compared(folders, output="whole")
    real, calls = model_replies.sample_replies, []

    def stopping(*arguments, **settings):
        calls.append(len(arguments[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    monkeypatch.setattr(model_replies, "sample_replies", stopping)
    with pytest.raises(KeyboardInterrupt):
        compared(folders)
    compared(folders)
    # Batches of 2, 2 and 1: two were done, the third and those of the other model were not.
    assert calls == [2, 2, 1, 1, 2, 2, 1]
    assert records() == records("whole")
    compared(folders, metrics=["vader"])
    assert len(calls) == 7
    compared(folders, overrides=(*FEW, "evaluation.temperature=0.5"))
    assert len(calls) == 13


def test_prompts_come_from_preference_data_of_any_shape(folders, place):
    pair = {"chosen": "\n\nHuman: Hi\n\nAssistant: Good.", "rejected": "\n\nHuman: Hi\n\nAssistant: Bad."}
    Path("hh.jsonl").write_text(json.dumps(pair) + "\n")
    compared(folders, prompts="hh.jsonl")
    assert [row["prompt"] for row in records()] == [[{"role": "user", "content": "Hi"}]]
    Path("hh.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "Ho"}]}) + "\n" * 2)
    compared(folders, prompts="hh.jsonl")
    assert [row["prompt"][0]["content"] for row in records()] == ["Ho"]


def test_repeated_prompts_count_once_and_the_number_does_not_depend_on_the_order(folders, place):
    lines = Path("prompts.jsonl").read_text().splitlines()
    few = {"overrides": (*FEW, "evaluation.prompts=3"), "output": "x"}
    Path("prompts.jsonl").write_text("\n".join(lines + lines))
    compared(folders, **few)
    once = [row["prompt"] for row in records("x")]
    Path("prompts.jsonl").write_text("\n".join(lines[::-1]))
    compared(folders, **few)
    assert [row["prompt"] for row in records("x")] == once
    assert len(once) == 3


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"metrics": ["vader", "vader"], "rewards": ["x/vader"]}, "duplicate-name", "vader"),
        ({"export": "mtbench"}, "unknown-name", "mt_bench"),
        ({"prompts": "empty.jsonl"}, "no-rows", "empty.jsonl"),
        ({"prompts": "bad.jsonl"}, "bad-row", "bad.jsonl:1"),
        ({"overrides": ("evaluation.max_new_tokens=600",)}, "too-long", "5 prompts"),
        ({"overrides": ("oracle.fraction=0.5",)}, "unused-key", "oracle.fraction"),
        ({"overrides": ("evaluation.metrics=[vader]",)}, "unused-key", "--metric NAME"),
        # The rest is refused by what reads it.
        ({"metrics": ["vadr"]}, None, "vader"),
        ({"metrics": ["rougeL"]}, None, "references"),
        ({"export": "mt_bench"}, None, "prompts.jsonl:1: category"),
        ({"judge": "none.yml"}, None, "none.yml"),
        ({"prompts": "none.jsonl"}, None, "none.jsonl"),
        ({"after": "runs/none/here"}, None, "runs/none/here"),
    ],
)
def test_what_cannot_be_compared_is_refused(folders, place, changes, code, words):
    classifier(Path("x/vader"), 1)
    Path("empty.jsonl").write_text("")
    Path("bad.jsonl").write_text('{"prompt": " "}\n')
    with pytest.raises(UserError) as error:
        compared(folders, **changes)
    assert words in str(error.value)
    assert code is None or error.value.code == code
    assert changes.get("metrics") == ["rougeL"] or not Path("runs").exists()


def test_a_prompt_that_does_not_fit_is_left_out_but_not_a_question_of_a_benchmark(folders, place):
    long = {"prompt": "x" * 600, "uid": "long"}
    Path("prompts.jsonl").write_text(json.dumps(long) + '\n{"prompt": "Say.", "uid": "short"}\n')
    compared(folders)
    assert [row["prompt"][0]["content"] for row in records()] == ["Say."]
    with pytest.raises(UserError, match=r"1 prompts with 5 new tokens .* prompts.jsonl:1"):
        compared(folders, export="arena_hard")


def test_mt_bench_asks_the_second_turn_after_the_models_own_first_reply(folders, place):
    rows = [
        {"question_id": 1, "category": "math", "turns": ["What?", "Why?"]},
        {"question_id": 2, "category": "writing", "turns": ["Who?", "When?"]},
        {"question_id": 3, "category": "coding", "turns": ["Where?"]},
    ]
    Path("question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compared(folders, prompts="question.jsonl", export="mt_bench", output="mt")
    files = [Path("mt/mt_bench/model_answer") / f"{name}.jsonl" for name in ("one", "two")]
    answers = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert [[row["question_id"] for row in side] for side in answers] == [[1, 2, 3]] * 2
    assert [row["model_id"] for row in answers[1]] == ["two"] * 3
    assert [len(row["choices"][0]["turns"]) for row in answers[0]] == [2, 2, 1]
    # Mathematics is greedy: the very replies can be made by hand.
    model = load_model(folders[1], dtype="float32")
    template = model.template("chat")
    messages, turns = [], []
    for text in rows[0]["turns"]:
        messages.append(Message(role="user", content=text))
        greedy = SamplingSettings(max_new_tokens=5, temperature=0.0)
        (reply,) = sample_replies(model, template, [template.prompt_ids(messages)], greedy, seed=0)
        messages.append(Message(role="assistant", content=reply.text))
        turns.append(reply.text)
    assert answers[1][0]["choices"][0]["turns"] == turns
    # The figures are of the first turn, which both models were asked alike.
    assert records("mt")[0]["follow_ups"] == ["Why?"]
    assert len(records("mt")[0]["before"]) == 2


def test_alpaca_eval_through_the_command_line(folders, place):
    rows = [{"dataset": "d", "instruction": f"Do {n}.", "output": "o", "generator": "g"} for n in range(3)]
    Path("alpaca_eval.json").write_text(json.dumps(rows))
    settings = [part for value in FEW for part in ("--set", value)]
    command = ["compare-models", folders[0], folders[1], "--prompts", "alpaca_eval.json"]
    result = CliRunner().invoke(cli.app, [*command, "--export", "alpaca_eval", "--output", "ae", *settings])
    assert result.exit_code == 0, result.output
    for name in ("one", "two"):
        found = json.loads(Path(f"ae/alpaca_eval/{name}/model_outputs.json").read_text())
        assert [row["instruction"] for row in found] == [row["instruction"] for row in rows]
        assert {row["generator"] for row in found} == {name}
    assert "wins of two against one" in result.output


def test_a_judge_from_end_to_end(folders, place, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret-1")
    with HTTPServer() as server:
        server.expect_request(
            "/v1/chat/completions", headers={"Authorization": "Bearer sk-secret-1"}
        ).respond_with_handler(answering(longer))
        Path("judge.yml").write_text(
            f"url: {server.url_for('/v1')}\nmodel: m\nkey_variable: MY_KEY\nprice_in: 1.0\nprice_out: 2.0\n"
        )
        settings = [part for value in FEW for part in ("--set", value)]
        command = ["compare-models", folders[0], folders[1], "--prompts", "prompts.jsonl"]
        for _ in range(2):
            result = CliRunner().invoke(cli.app, [*command, "--judge", "judge.yml", *settings])
            assert result.exit_code == 0, result.output
        found = records()
        texts = [[row[side][0]["text"] for row in found] for side in ("before", "after")]
        differing = sum(a != b for a, b in zip(*texts, strict=True))
        assert len(server.log) == 2 * differing
        assert {asked(question) for question, _ in server.log} >= set(zip(*texts, strict=True))
    expected = [
        1.0 if len(b) > len(a) else 0.0 if len(b) < len(a) else 0.5 for a, b in zip(*texts, strict=True)
    ]
    assert [row["preferred"]["judge"] for row in found] == expected
    figures = json.loads(Path("runs/one-vs-two/figures.json").read_text())
    assert figures["judge/win_rate"]["value"] == pytest.approx(np.mean(expected))
    assert figures["judge/first_place"]["value"] == 0.5
    record = json.loads(Path("runs/one-vs-two/judge.json").read_text())
    assert record["counts"]["cached"] == record["counts"]["asked"] == 2 * differing
    assert record["counts"]["cost"] == pytest.approx(2 * differing * (10 * 1.0 + 2 * 2.0) / 1e6)
    assert not any(b"sk-secret-1" in file.read_bytes() for file in place.rglob("*") if file.is_file())


def test_a_pair_without_a_verdict_leaves_the_others(folders, place):
    def handler(question) -> Response:
        if "Say 3." in question.get_data(as_text=True):
            return Response(json.dumps({"choices": [{"message": {"content": "", "refusal": "No."}}]}))
        return answering(lambda a, b: "[[C]]")(question)

    with HTTPServer() as server:
        server.expect_request("/v1/chat/completions").respond_with_handler(handler)
        Path("judge.yml").write_text(f"url: {server.url_for('/v1')}\nmodel: m\n")
        figures = compared(folders, judge="judge.yml")
    assert figures["judge/win_rate"].n == 4
    assert json.loads(Path("runs/one-vs-two/judge.json").read_text())["counts"]["verdicts_refused"] == 2
    assert [row["preferred"]["judge"] for row in records()].count(None) == 1


def test_a_missing_key_is_named_before_anything_is_sampled(folders, place, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    monkeypatch.setattr(model_replies, "sample_replies", None)
    Path("judge.yml").write_text("url: http://localhost:1/v1\nmodel: m\nkey_variable: MY_KEY\n")
    with pytest.raises(UserError, match="MY_KEY") as refused:
        compared(folders, judge="judge.yml")
    assert (refused.value.code, refused.value.key) == ("missing-key", "key_variable")


def test_a_run_folder_stands_for_its_policy(finished_run, monkeypatch):
    monkeypatch.chdir(finished_run)
    assert model_folder("runs/quickstart") == "runs/quickstart/policy/model"
    assert model_folder("runs/quickstart/oracle") == "runs/quickstart/oracle/model"
    assert model_folder("default") == "default"
    assert short_name("runs/quickstart/policy/model") == "quickstart"
    assert short_name("owner/some-model") == "some-model"


EXAMPLES = [
    Example(key="k", prompt=(Message(role="user", content=f"Say {n}."),), source=f"p:{n}") for n in (1, 2, 3)
]


def test_the_reward_of_an_oracle_is_its_mean_log_ratio_and_an_empty_reply_loses(tiny_oracle):
    found = rewards(find_reward_model(str(tiny_oracle)), EXAMPLES, ["a good cup", " ", "the tea"])
    tokens = TokenScorer.load(tiny_oracle)("Say 1.", "a good cup").tokens
    assert found[0] == pytest.approx(np.mean([token.score for token in tokens]), abs=1e-5)
    assert found[1] == -np.inf < found[2]


def test_an_empty_reply_has_no_mean_but_loses(tiny_oracle):
    replies = [
        [[Reply([1], text, True)] for text in side]
        for side in (["", "", "the tea"], ["", "a cup", "the tea"])
    ]
    comparison = ModelComparison(
        recipe=parse_recipe("evaluation: {bootstrap: 20}", "here").recipe,
        display=Display(quiet=True),
        questions=[Question(example) for example in EXAMPLES],
        replies=(replies[0], replies[1]),
    )
    comparison.add_rewards([find_reward_model(str(tiny_oracle))])
    assert comparison.preferred["oracle"] == [0.5, 1.0, 0.5]
    assert comparison.figures["oracle/change"].n == 1
    assert comparison.figures["oracle/change"].value == 0.0


def classifier(folder: Path, labels: int) -> Path:
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_of_transformers_reads_the_conversation(tmp_path):
    folder = classifier(tmp_path / "rm", 1)
    found = rewards(find_reward_model(str(folder)), EXAMPLES, ["a good cup", "", "the tea"])
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    text = "<|im_start|>user\nSay 3.<|im_end|>\n<|im_start|>assistant\nthe tea<|im_end|>\n"
    ids = tiny_tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert found[2] == pytest.approx(model(input_ids=ids).logits[0, 0].item(), abs=1e-5)
    assert np.isfinite(found).all()


def test_other_folders_are_no_reward_models(tmp_path, finished_run):
    with pytest.raises(UserError, match="has 3 labels, and a reward model has one"):
        find_reward_model(str(classifier(tmp_path / "three", 3)))
    with pytest.raises(UserError, match="quickstart/oracle"):
        find_reward_model(str(finished_run / "runs" / "quickstart"))
