"""Examples, sources, samplers and models of online runs that cannot work, and limits that they must respect."""

import json
from pathlib import Path

import pytest

import tokenward
from tests.stages.runs import (
    REINFORCE,
    events,
    lines,
    plugin,
    refusal,
    run_online,
    write_examples,
    write_lines,
)
from tests.tiny import save_tiny, tiny_llama, tiny_t5
from tokenward.stages.online import OnlineStage
from tokenward.stages.tasks import _with_room, encoded_examples

ONCE = ("online.training.max_steps=1", "online.every=null")


PROMPT_TASKS = [
    ("prompt_task.verbalizers=[' a', 'tea']", "", "tea"),
    ("prompt_task.verbalizers=[' a', ' a']", "", "' a'"),
    ("prompt_task.train=nowhere.tsv", "", "nowhere.tsv"),
    ("prompt_task.text=sentence", "", "text, label"),
    ("prompt_task.label=lable", "", "label"),
    ("prompt_task.template='{sentence} {mask} {prompt}'", "", "causal language model"),
    ("prompt_task.start=''", "empty-text", "start"),
    ("prompt_task.verbalizers=[' a', ' the', ' in']", "class-without-rows", "label 2"),
    ("online.sampling.top_k=1", "all-tied", "all 12 groups of 4 samples"),
]
EXAMPLES = [
    ("examples.source=none.jsonl", "no-rows", "no example is left for train"),
    ("examples.development=nowhere.jsonl", "", "nowhere.jsonl"),
    ("tokens.max_prompt_tokens=5", "", "prompt"),
    ("tokens.max_response_tokens=3;tokens.too_long=error", "", "examples.jsonl:"),
    ("reward.model=SHORT", "", "context"),
]


AT = "online.sampler={name: server, address: 'http://127.0.0.1:9/v1'"
SAMPLERS = [
    (f"{AT}}};online.every=4", "weights-changed", "every need"),
    (f"{AT}}};online.every=null;online.evaluate_every=2", "weights-changed", "evaluate_every need"),
    (f"{AT}}};online.every=null;online.sampling.precision=bfloat16", "unused-key", "precision has no effect"),
    (f"{AT}, start_address: 'http://127.0.0.1:9/v1'}}", "unused-key", "start_address is for evaluation"),
    (f"{AT}, adress: x}}", "unknown-setting", "no setting 'adress'"),
    ("online.sampler={name: server, address: here}", "bad-url", "base address"),
    ("online.sampler={name: vllm}", "missing-package", "needs vllm, which is not installed"),
    ("evaluation.sampler={name: 'm:S'}", "unknown-name", "custom sampler works in online.sampler"),
    ("evaluation.sampler={name: vlm}", "unknown-name", "Did you mean 'vllm'"),
    ("evaluation.sampler={name: transformers, precision: bfloat16}", "unknown-setting", "beside sampler"),
]


def check_each(recipe: Path, cases: list[tuple[str, str, str]], *, last: str = "online") -> None:
    for changes, code, word in cases:
        error = refusal(recipe, changes.split(";"), last=last)
        assert code in ("", error.code), (changes, error.code)
        assert word in str(error), (changes, error)


def test_prompt_task_that_cannot_work_is_refused(prompts):
    check_each(prompts, PROMPT_TASKS)
    with Path("dev.tsv").open("a") as file:
        file.write("more tea\t2\n")
    assert "dev.tsv:10: label is 2" in str(refusal(prompts, last="online"))


def test_samplers_that_cannot_work_are_refused_before_anything_runs(recipe):
    check_each(recipe, SAMPLERS, last="evaluation")
    assert not Path("runs").exists() or not list(Path("runs").rglob("examples/manifest.json"))


def test_files_that_leave_nothing_are_named(recipe, tmp_path):
    Path("none.jsonl").write_text("")
    short = save_tiny(tmp_path / "short", tiny_llama(max_position_embeddings=32))
    check_each(recipe, [(changes.replace("SHORT", str(short)), *rest) for changes, *rest in EXAMPLES])
    write_examples(Path("examples.jsonl"), 2)
    assert refusal(recipe, last="examples").code == "no-rows"
    assert refusal(recipe, ["examples.source=nowhere.jsonl"], last="examples").key == "examples.source"


@pytest.mark.parametrize(
    ("record", "code", "word"),
    [
        ({"question": "Say."}, "missing-column", "'answers'"),
        ({"answers": "a"}, "missing-column", "'question'"),
        ({"question": None, "answers": "a"}, "bad-row", "question is"),
        ({"question": "Say.", "answers": []}, "bad-row", "answers is"),
        ({"question": "Say.", "answers": ["a", " "]}, "bad-row", "answers is"),
        ({"question": "Say.", "answers": 3}, "bad-row", "answers is"),
        ({"question": "a \ud800", "answers": "a"}, "bad-row", "question: "),
        ({"question": "Say.", "answers": ["a", "b\udfff"]}, "bad-row", "answers[1]: "),
        ({"question": "Say.", "answers": "a", "more": {"x": ["\ud800"]}}, "bad-row", "more.x[0]: "),
        ({"question": "Say.", "answers": "a", "\ud800": 1}, "bad-row", "a column's name: "),
        ({"question": "  ", "answers": "a"}, "bad-row", "the prompt is empty"),
    ],
)
def test_row_that_cannot_be_an_example_is_named(recipe, record, code, word):
    with Path("examples.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    error = refusal(recipe, ["examples.prompt='{question}'"], last="examples")
    assert error.code == code
    assert str(error).startswith("examples.jsonl:31: ")
    assert word in str(error)


def rows(*records: dict) -> None:
    write_lines("examples.jsonl", records)


def test_prompts_are_built_from_columns_of_any_name(recipe):
    """A list of texts is joined, a number is text, and line marks of Unicode end no row."""
    text = "one\u2028two\u2029three\x85four"
    rows(*[{"my question.1": ["Say", str(n), text], "level": n, "answers": text} for n in range(60)])
    run = run_online(recipe, "examples.prompt='{{x}} {my question.1} at {level} {{'", last="examples")
    found = lines(run.path("examples") / "train.jsonl")
    assert len(found) > 30
    for line in found:
        number = line["columns"]["level"]
        assert line["prompt"] == [{"role": "user", "content": f"{{x}} Say {number} {text} at {number} {{"}]
        assert line["references"] == [text]


def test_parts_of_the_source_are_disjoint(recipe):
    write_examples(Path("examples.jsonl"), 200)
    run = run_online(recipe, last="examples")
    parts = {
        part: [line["source"] for line in lines(run.path("examples") / f"{part}.jsonl")]
        for part in ("train", "development", "test")
    }
    assert sorted(name for part in parts.values() for name in part) == sorted(
        f"examples.jsonl:{n + 1}" for n in range(200)
    )
    assert 8 <= len(parts["development"]) <= 35
    assert 8 <= len(parts["test"]) <= 35
    limited = run_online(recipe, "examples.limit=5", "examples.test_limit=2", run="limited", last="examples")
    assert {k: limited.done("examples").facts[k] for k in parts} == {
        "train": 5, "development": len(parts["development"]), "test": 2,
    }  # fmt: skip


def source(text: str) -> str:
    return f"online.source={{name: '{plugin(text)}:score'}}"


@pytest.mark.parametrize(
    ("body", "code", "word"),
    [
        ("return [0.0] * len(completions)", "all-tied", "12 groups of 3"),
        ("return [float('nan')] * len(completions)", "", "nan"),
    ],
)
def test_source_that_cannot_rank_is_refused(recipe, body, code, word):
    error = refusal(recipe, [source(f"def score(prompts, completions):\n    {body}\n")], last="online")
    assert code in ("", error.code)
    assert word in str(error)


def sampler(body: str) -> str:
    text = (
        "from tokenward.sampling import Reply\n"
        "class Mine:\n"
        "    def __init__(self, model, template, settings, precision):\n"
        "        self.model = model\n"
        "    def __call__(self, prompts, *, count, seed, progress=None):\n"
        f"        {body}\n"
    )
    return f"online.sampler={{name: '{plugin(text)}:Mine'}}"


def test_replies_of_a_custom_sampler_are_checked(recipe):
    body = "return [[Reply([5, 266], 'a', False)] * count for p in prompts]"
    assert "266" in str(refusal(recipe, [sampler(body)], last="online"))
    # In a step of reinforce too.
    body = "return [[Reply([5] * (i + 1 if len(prompts) > 2 else 0), 'a ' * i, False) for i in range(count)] for p in prompts]"
    message = str(refusal(recipe, [sampler(body), REINFORCE, "online.reward_evals=0"], last="online"))
    assert "all 3 replies to prompt 0" in message
    idle = "class Mine:\n    def __init__(self, model, template, settings, precision):\n        pass\n"
    error = refusal(recipe, [f"online.sampler={{name: '{plugin(idle)}:Mine'}}"], last="online")
    assert (error.code, error.key) == ("not-callable", "online.sampler")


@pytest.mark.parametrize("changes", [[], [REINFORCE]], ids=["likelihood", "reinforce"])
def test_empty_replies_are_dropped_and_counted(recipe, changes):
    body = "return [[Reply([5] * i, 'a ' * i, False) for i in range(count)] for p in prompts]"
    (event,) = events(run_online(recipe, sampler(body), *changes, *ONCE))
    assert event["dropped"] == {"dropped: empty replies": 12}
    assert event["groups"] == 12


def test_metric_that_cannot_be_computed_is_refused_before_training(recipe):
    rows(*[{"question": f"Say {n}.", "answers": ["\u732b"]} for n in range(30)])
    cases = [
        ("examples.references=answers", "", "a-z"),
        (f"examples.references=null;{REINFORCE}", "", "reference"),
    ]
    check_each(recipe, cases, last="evaluation")
    assert not list(Path("runs").glob("*/online/manifest.json"))


def test_source_gets_the_columns_that_it_names(recipe):
    """Tied development groups leave nothing to evaluate on, which is not an error."""
    text = (
        "def score(prompts, completions, completion_ids, level, references):\n"
        "    assert all(prompt == f'Say {number}.' for prompt, number in zip(prompts, level))\n"
        "    assert all(refs == ['the good tea on the table', 'a good cup'] for refs in references)\n"
        "    return [float(sum(ids)) * (len(completions) > 6) for ids in completion_ids]\n"
    )
    (event,) = events(run_online(recipe, source(text), *ONCE))
    assert (event["development_groups"], event["steps"]) == (0, 3)
    assert "development_loss" not in event
    wrong = source("def score(completions, lvel):\n    return [0.0]\n")
    assert "lvel" in str(refusal(recipe, [wrong, "run=runs/b"], last="online"))


def test_prompt_without_room_for_a_reply_is_dropped(recipe, tmp_path, capsys):
    """Of a context of 64; the prompts have 29 tokens, but two have 39, one of them for the test. REINFORCE needs no references."""
    short = f"model.name={save_tiny(tmp_path / 'short', tiny_llama(max_position_embeddings=64))}"
    prompts = [f"{number:10}" for number in range(12)]
    prompts[1] = prompts[10] = "0123456789" * 2
    parts = ["examples.source=train.jsonl", "examples.development=dev.jsonl", "examples.test=test.jsonl"]
    for part, chosen in (("train", prompts[:6]), ("dev", prompts[6:8]), ("test", prompts[8:])):
        write_lines(f"{part}.jsonl", [{"question": text} for text in chosen])
    parts += [REINFORCE, "examples.references=null", "evaluation.metrics=[]"]
    changes = [short, *parts, "online.sampling.max_new_tokens=30", "evaluation.max_new_tokens=30"]
    run = run_online(recipe, *changes, *ONCE, "evaluation.prompts=9", last="evaluation")
    assert run.done("online").facts["rows"] == 5
    assert len(lines(run.path("evaluation") / "samples.jsonl")) == 3
    figures = tokenward.read_figures(run)
    assert "length/change" in figures
    assert "references/logp_per_token/change" not in figures
    error = refusal(recipe, [*changes, "online.sampling.max_new_tokens=60"], last="online")
    assert (error.code, error.key) == ("no-rows", "tokens.max_prompt_tokens")
    assert "60 tokens" in str(error)


def test_reply_may_use_the_last_position_of_the_context(recipe):
    run = run_online(recipe, last="examples")
    template = run.tokenizer_template(run.start_model)
    rows = list(encoded_examples(run, template, "train").rows)
    context, longest = run.limits.context, max(len(row.prompt) for row in rows)
    assert _with_room(run, rows, "train", context - longest) == rows
    left = [row for row in rows if len(row.prompt) < longest]
    assert 0 < len(left) < len(rows)
    assert _with_room(run, rows, "train", context - longest + 1) == left


def test_t5_without_a_chat_template_needs_the_plain_one(recipe, tmp_path):
    folder = save_tiny(tmp_path / "t5", tiny_t5())
    (folder / "chat_template.jinja").unlink()
    plain = f"model.name={folder};tokens.template=plain;model.packing=shared_prompts;run=runs/b"
    check_each(recipe, [(f"model.name={folder}", "", "plain"), (plain, "", "encoder")])


@pytest.mark.parametrize(("kind", "key"), [("recipe", "reward.model"), ("prompts", "prompt_task.model")])
def test_model_with_another_vocabulary_is_refused(request, tmp_path, kind, key):
    """The same model with two tokens of its vocabulary swapped."""
    folder = save_tiny(tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["z"] = vocabulary["z"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    error = refusal(request.getfixturevalue(kind), [f"{key}={folder}"], last="online")
    assert (error.code, error.key) == ("other-vocabulary", key)


def test_what_only_the_evaluation_reads_does_not_rerun_the_loop(prompts, tmp_path):
    def made_from(*changes: str) -> tuple:
        run = tokenward.open_run(prompts, list(changes), quiet=True)
        return dict(OnlineStage().settings(run)), dict(OnlineStage().inputs(run))

    before = made_from()
    Path("test.tsv").write_text("text\tlabel\nother tea\t1\n")
    changes = ["test=dev.tsv", "test_limit=3", "candidates=2", "best=1", "manual=[]", "random=2"]
    assert made_from(*(f"prompt_task.{change}" for change in changes)) == before
    assert made_from("prompt_task.share=0.5") != before
    start = [f"reward.model={save_tiny(tmp_path / 'start')}"]
    before = made_from(*start)
    save_tiny(tmp_path / "start", tiny_llama(seed=1))
    assert made_from(*start)[1] != before[1]
