"""What an online run is refused for, as the user meets it: each message names the key or the row and what to write."""

import json
from pathlib import Path

import pytest

import tokenward
from tests.stages.runs import (
    REINFORCE,
    events,
    guided,
    lines,
    plugin,
    refused,
    write_examples,
    write_lines,
)
from tests.tiny import save_tiny, tiny_llama, tiny_t5
from tokenward.stages.tasks import _with_room, encoded_examples

ONCE = ("online.training.max_steps=1", "online.every=null")
TASK = "prompt_task={train: train.tsv, development: dev.tsv, test: test.tsv, verbalizers: [' a', ' the']}"
REFUSED = [
    ("examples=null", "got neither"),
    (TASK, "got both"),
    (f"examples=null;{TASK}", "online.objective cannot be weighted_likelihood"),
    ("examples.references=null", "examples.references names no column"),
    ("online.source=null", "online.source is missing"),
    ("online.source={name: rogue}", "Did you mean 'rouge'"),
    ("online.source={name: length, word: 3}", "Did you mean 'words'"),
    ("online.source={name: length}", "words"),
    ("online.source={name: 'nolab:score'}", "module 'nolab' cannot be imported"),
    ("online.objective={name: reinforced}", "Did you mean 'reinforce'"),
    ("online.objective={name: reinforce, entropi: 1}", "Did you mean 'entropy'"),
    ("online.objective={name: sepo}", "weighted_likelihood"),
    ("online.objective={name: plackett_luce}", "reinforce"),
    ("online.selection={name: sfot}", "Did you mean 'soft'"),
    ("online.sampler={name: vllm}", "no sampler 'vllm'"),
    ("reward.head.hiden=3", "Did you mean 'hidden'"),
    ("reward.head.hidden=text", "hidden is 'text'"),
    ("reward.head.unit=syllable", "unit is 'syllable'"),
    ("reward.head.unit=spans", "samples"),
    ("reward.objective={name: plackett_luce, aggregate: mean}", "no aggregate 'mean'"),
    ("model.head_mlp={hiden: 3}", "Did you mean 'hidden'"),
    ("model.head_mlp={};model.adapter={r: 2}", "Leave one out"),
    ("online.evry=3", "Did you mean 'every'"),
    ("online.sampling.top_q=1", "Did you mean 'top_p' or 'top_k'"),
    ("examples.promt=x", "Did you mean 'prompt'"),
    ("online.samples=1", ">= 2"),
    ("online.until=1.5", "<= 1"),
    ("online.restart=cold", "warm or fresh"),
    ("online.training.learning_rat=1", "Did you mean 'learning_rate'"),
    ("examples.prompt='Say {question'", "braces do not match"),
    ("examples.prompt='Say {}'", "holds no plain name"),
    ("examples.prompt='Say {question:d}'", "holds no plain name"),
    ("examples.prompt='Say something.'", "names no column"),
    ("online=null", "examples is read by an online run alone"),
    ("data.source=builtin", "data belongs to a run on comparisons"),
    ("evaluation.metrics=[rouge11]", "Did you mean"),
    ("reward.objective={name: weighted_likelihood}", "{name: plackett_luce}"),
    ("reward.objective={name: dpo}", "{name: plackett_luce}"),
    ("reward.objective={name: reinforce}", "{name: plackett_luce}"),
    ("reward.head={hidden: 4, low: -1.0}", "from -1"),
    ("reward.head={hidden: 4, bound: none}", "from -inf"),
    ("reward.head={hidden: 4, bound: none};online.selection={name: soft, transform: power, power: 2.0}", "transform: power"),
    ("online.selection={name: top_fraction, scope: dataset}", "online.selection has scope: dataset"),
    ("online.selection={name: transform, steps: [segment_pool]}", "reward.head.unit"),
    ("online.training.max_steps=0", "max_steps is 0"),
    ("online.training={num_train_epochs: 0}", "num_train_epochs is 0"),
    ("online.training={num_train_epochs: -1.5}", "num_train_epochs is -1.5"),
    ("online.training.max_steps=-3", "max_steps is -3"),
    ("online.source={name: 'os:path'}", "is a module, which cannot be called"),
    ("online.sampler={name: 'os:sep'}", "is a str, which cannot be called"),
    ("online.patience=2", "online.evaluate_every"),
    ("online.reward_patience=2;online.reward_evals=0", "online.reward_evals"),
    ("reward.training.max_steps=5", "online.reward_steps"),
    ("reward.training.num_train_epochs=2", "online.reward_steps"),
    ("reward.training.seed=5", "seed of the recipe"),
    ("reward.training.eval_strategy=epoch", "online.reward_evals"),
    ("reward.training.eval_steps=5", "online.reward_evals"),
    ("online.sampling.stop=['']", "empty text"),
    ("online.sampling.temperature=1e-45", "float32"),
    ("evaluation.temperature=1e-40", "float32"),
    ("model.device=cuda:0", "no CUDA device"),
]  # fmt: skip
REFUSED_PROMPT_TASKS = [
    ("prompt_task.verbalizers=[' a', 'tea']", "must be one"),
    ("prompt_task.verbalizers=[' a']", "2 or more classes"),
    ("prompt_task.verbalizers=[' a', ' a']", "are the same token"),
    ("prompt_task.train=nowhere.tsv", "nowhere.tsv"),
    ("prompt_task.text=sentence", "It has: text, label"),
    ("prompt_task.label=lable", "Did you mean label?"),
    ("prompt_task.template='{sentence} {mask} {prompt}'", "causal language model"),
    ("prompt_task.template='{sentence}'", "prompt"),
    ("prompt_task.start=''", "is no token"),
    ("prompt_task.candidate=3", "Did you mean 'candidates'?"),
    ("online.objective={name: weighted_likelihood}", "no written prompts"),
    ("online.source={name: length, words: 3}", "online.source cannot act in a prompt_task"),
    ("evaluation.metrics=[vader]", "evaluation.metrics cannot act in a prompt_task"),
    ("prompt_task.verbalizers=[' a', ' the', ' in']", "no text has the label 2"),
    ("online.sampling.top_k=1", "all 12 groups of 4 samples are tied"),
]


def refused_each(recipe: Path, cases: list[tuple[str, str]], *base: str, last: str = "online") -> None:
    for changes, word in cases:
        message = refused(recipe, [*base, *changes.split(";")], last=last)
        assert word in message, (changes, message)


def test_a_recipe_that_cannot_work_is_refused_before_anything_is_done(recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused_each(recipe, REFUSED)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in refused(recipe)
    assert not Path("runs").exists()


def test_a_prompt_task_that_cannot_work_is_refused(prompts):
    refused_each(prompts, REFUSED_PROMPT_TASKS)
    with Path("dev.tsv").open("a") as file:
        file.write("more tea\t2\n")
    assert "dev.tsv:10: label is 2" in refused(prompts)


def test_a_run_on_comparisons_is_looked_at_too(tiny_workplace):
    cases = [
        ("reward.objective={name: weighted_likelihood}", "reward.objective is weighted_likelihood"),
        ("reward.head={bound: none}", "from -inf"),
        ("reward.head={low: -0.5}", "from -0.5"),
        ("reward.training.max_steps=0", "max_steps is 0"),
        ("model.head_mlp={hidden: 4}", "online"),
    ]
    soft = ["scores.scorer={name: reward}", "policy.selection={name: soft}"]
    refused_each(tiny_workplace, cases, *soft, last="data")
    assert "has no stage online" in refused(tiny_workplace)
    assert not Path("runs").exists()


def test_settings_that_look_alike_are_no_mistake(recipe):
    """A reward below 0 is as good as another to an exponential, to reinforce, and where none is learned."""
    low = "reward.head={hidden: 4, low: -1.0}"
    for changes in (
        [low, "online.selection={name: soft, transform: exp}"],
        [low, REINFORCE],
        [low, "online.selection={name: all}"],
        ["online.training.max_steps=-1", "online.training.num_train_epochs=0.5"],
        ["reward.objective={name: 'tokenward.objectives:PlackettLuce'}"],
        ["online.sampling.temperature=1e-6"],
    ):
        assert tokenward.open_run(recipe, changes, quiet=True)


@pytest.mark.parametrize(
    ("written", "wrong"),
    [
        ('prompt: "{question}"', 'prompt: "{question"'),
        ("words: 3}", "words: 3}\n  objective: {name: sepo}"),
        ("name: length", "name: lenght"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(recipe, written, wrong):
    text = recipe.read_text().replace(", prompt:", ",\n  prompt:").replace(written, wrong)
    recipe.write_text(text)
    line = next(n for n, row in enumerate(text.splitlines(), start=1) if wrong.splitlines()[-1] in row)
    assert refused(recipe).startswith(f"{recipe}:{line}: ")


def test_a_wrong_template_is_named_with_its_line(prompts):
    text = prompts.read_text().replace("  candidates: 4", "  template: '{sentence}'\n  candidates: 4")
    prompts.write_text(text)
    line = next(n for n, row in enumerate(text.splitlines(), start=1) if "template" in row)
    assert refused(prompts).startswith(f"{prompts}:{line}: ")


def test_an_online_run_has_its_own_stages(recipe):
    for last in ("scores", "oracle"):
        assert f"has no stage {last}. It has examples, " in refused(recipe, last=last)


def rows(*records: dict) -> None:
    write_lines("examples.jsonl", records)


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"question": "Say."}, "examples.references names the column 'answers'"),
        ({"answers": "a"}, "examples.prompt names the column 'question'"),
        ({"question": None, "answers": "a"}, "question is"),
        ({"question": "Say.", "answers": []}, "answers is"),
        ({"question": "Say.", "answers": ["a", " "]}, "answers is"),
        ({"question": "Say.", "answers": 3}, "answers is"),
        ({"question": "a \ud800", "answers": "a"}, "question: holds half of a surrogate pair at character 2"),
        ({"question": "Say.", "answers": ["a", "b\udfff"]}, "answers[1]: holds half of a surrogate"),
        ({"question": "Say.", "answers": "a", "more": {"x": ["\ud800"]}}, "more.x[0]: holds half"),
        ({"question": "Say.", "answers": "a", "\ud800": 1}, "a column's name: holds half"),
        ({"question": "  ", "answers": "a"}, "the prompt is empty"),
    ],
)
def test_a_row_that_cannot_be_an_example_is_named(recipe, record, word):
    with Path("examples.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    assert f"examples.jsonl:31: {word}" in refused(recipe, ["examples.prompt='{question}'"], last="examples")


def test_prompts_are_put_together_from_columns_of_any_name(recipe):
    """A list of texts is joined, a number is text, and line marks of Unicode end no row."""
    text = "one\u2028two\u2029three\x85four"
    rows(*[{"my question.1": ["Say", str(n), text], "level": n, "answers": text} for n in range(60)])
    run = guided(recipe, "examples.prompt='{{x}} {my question.1} at {level} {{'", last="examples")
    found = lines(run.path("examples") / "train.jsonl")
    assert len(found) > 30
    for line in found:
        number = line["columns"]["level"]
        assert line["prompt"] == [{"role": "user", "content": f"{{x}} Say {number} {text} at {number} {{"}]
        assert line["references"] == [text]


def test_parts_of_the_source_are_apart_and_stay_the_same(recipe):
    write_examples(Path("examples.jsonl"), 200)
    run = guided(recipe, last="examples")
    parts = {
        part: [line["source"] for line in lines(run.path("examples") / f"{part}.jsonl")]
        for part in ("train", "development", "test")
    }
    assert sorted(name for part in parts.values() for name in part) == sorted(
        f"examples.jsonl:{n + 1}" for n in range(200)
    )
    assert 8 <= len(parts["development"]) <= 35
    assert 8 <= len(parts["test"]) <= 35
    limited = guided(recipe, "examples.limit=5", "examples.test_limit=2", run="limited", last="examples")
    assert {k: limited.done("examples").facts[k] for k in parts} == {
        "train": 5, "development": len(parts["development"]), "test": 2,
    }  # fmt: skip


def test_files_that_leave_nothing_are_named(recipe, tmp_path):
    Path("none.jsonl").write_text("")
    short = save_tiny(tmp_path / "short", tiny_llama(max_position_embeddings=32))
    cases = [
        ("examples.source=none.jsonl", "no example is left for train. Give more rows to examples.source."),
        ("examples.development=nowhere.jsonl", "no such file"),
        ("tokens.max_prompt_tokens=5", "prompt too long"),
        ("tokens.max_response_tokens=3;tokens.too_long=error", "examples.jsonl:"),
        (f"reward.model={short}", "longer than the model's context"),
    ]
    refused_each(recipe, cases)
    write_examples(Path("examples.jsonl"), 2)
    assert "no example is left for" in refused(recipe)


def source(text: str) -> str:
    return f"online.source={{name: '{plugin(text)}:score'}}"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("return [0.0] * len(completions)", "all 12 groups of 3 samples are tied"),
        ("return [float('nan')] * len(completions)", ":score returned nan"),
        ("return [0.0]", "one finite number per completion"),
        ("return None", "which is not a list"),
        ("return ['0.5'] * len(completions)", "which is not a number"),
    ],
)
def test_a_source_that_cannot_rank_says_why(recipe, body, word):
    assert word in refused(recipe, [source(f"def score(prompts, completions):\n    {body}\n")])


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


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("return []", "returned 0 groups of replies for 12 prompts"),
        ("return None", "list of lists of Reply"),
        ("return [[Reply([5], 'a', False)] * (count - 1) for p in prompts]", "2 replies to prompt 0"),
        ("return [[('a', 'b')] * count for p in prompts]", "reply 0 to prompt 0 is a tuple"),
        ("return [[Reply([5, 266], 'a', False)] * count for p in prompts]", "holds the id 266"),
        ("return [[Reply([-1], 'a', False)] * count for p in prompts]", "holds the id -1"),
        ("return [[Reply([5.0], 'a', False)] * count for p in prompts]", "holds the id 5.0"),
        ("return [[Reply([], '', False)] * count for p in prompts]", "all 3 replies to prompt 0 are empty"),
    ],
)
def test_a_custom_sampler_that_returns_something_else_says_so(recipe, body, word):
    message = refused(recipe, [sampler(body)])
    assert "the sampler" in message
    assert word in message


def test_what_an_update_by_reinforce_samples_is_looked_at_too(recipe):
    body = "return [[Reply([5] * (i + 1 if len(prompts) > 2 else 0), 'a ' * i, False) for i in range(count)] for p in prompts]"
    message = refused(recipe, [sampler(body), REINFORCE, "online.reward_evals=0"])
    assert "all 3 replies to prompt 0 are empty" in message
    idle = "class Mine:\n    def __init__(self, model, template, settings, precision):\n        pass\n"
    message = refused(recipe, [f"online.sampler={{name: '{plugin(idle)}:Mine'}}"])
    assert "a Mine, which cannot be called" in message


@pytest.mark.parametrize("changes", [[], [REINFORCE]], ids=["likelihood", "reinforce"])
def test_empty_replies_are_dropped_and_counted(recipe, changes):
    body = "return [[Reply([5] * i, 'a ' * i, False) for i in range(count)] for p in prompts]"
    (event,) = events(guided(recipe, sampler(body), *changes, *ONCE))
    assert event["dropped"] == {"dropped: empty replies": 12}
    assert event["groups"] == 12


def test_a_metric_that_could_not_be_measured_ends_the_run_before_it_trains(recipe):
    rows(*[{"question": f"Say {n}.", "answers": ["\u732b"]} for n in range(30)])
    cases = [
        ("examples.references=answers", "rouge1 needs 1 words of a-z"),
        (f"examples.references=null;{REINFORCE}", "rouge compares with reference texts"),
    ]
    refused_each(recipe, cases, last="evaluation")
    assert not list(Path("runs").glob("*/online/manifest.json"))


def test_a_source_is_given_the_columns_that_it_names(recipe):
    """Development groups that are all tied leave nothing to choose by, which is no reason to stop."""
    text = (
        "def score(prompts, completions, completion_ids, level, references):\n"
        "    assert all(prompt == f'Say {number}.' for prompt, number in zip(prompts, level))\n"
        "    assert all(refs == ['the good tea on the table', 'a good cup'] for refs in references)\n"
        "    return [float(sum(ids)) * (len(completions) > 6) for ids in completion_ids]\n"
    )
    (event,) = events(guided(recipe, source(text), *ONCE))
    assert (event["development_groups"], event["steps"]) == (0, 3)
    assert "development_loss" not in event
    message = refused(recipe, [source("def score(completions, lvel):\n    return [0.0]\n"), "run=runs/b"])
    assert "takes 'lvel', but is passed only" in message


def test_a_prompt_that_leaves_no_room_for_a_reply_is_dropped(recipe, tmp_path):
    """Of a context of 64; the prompts have 29 tokens, but two have 39, of which one is for the test."""
    short = f"model.name={save_tiny(tmp_path / 'short', tiny_llama(max_position_embeddings=64))}"
    prompts = [f"{number:10}" for number in range(12)]
    prompts[1] = prompts[10] = "0123456789" * 2
    parts = ["examples.source=train.jsonl", "examples.development=dev.jsonl", "examples.test=test.jsonl"]
    for part, chosen in (("train", prompts[:6]), ("dev", prompts[6:8]), ("test", prompts[8:])):
        write_lines(f"{part}.jsonl", [{"question": text, "answers": "a"} for text in chosen])
    changes = [short, *parts, "online.sampling.max_new_tokens=30", "evaluation.max_new_tokens=30"]
    for objective in ([], [REINFORCE]):
        run = guided(recipe, *changes, *objective, *ONCE, "evaluation.prompts=9", last="evaluation")
        assert run.done("online").facts["rows"] == 5
        assert len(lines(run.path("evaluation") / "samples.jsonl")) == 3
    message = refused(recipe, [*changes, "online.sampling.max_new_tokens=60"])
    assert "a reply of 60 tokens are longer than the model's context of 64" in message


def test_a_reply_may_end_with_the_models_last_position(recipe):
    run = guided(recipe, last="examples")
    template = run.tokenizer_template(run.start_model)
    rows = list(encoded_examples(run, template, "train").rows)
    context, longest = run.limits.context, max(len(row.prompt) for row in rows)
    assert _with_room(run, rows, "train", context - longest) == rows
    left = [row for row in rows if len(row.prompt) < longest]
    assert 0 < len(left) < len(rows)
    assert _with_room(run, rows, "train", context - longest + 1) == left


def test_a_t5_without_a_chat_template_is_told_to_write_plain(recipe, tmp_path):
    folder = save_tiny(tmp_path / "t5", tiny_t5())
    (folder / "chat_template.jinja").unlink()
    plain = f"model.name={folder};tokens.template=plain;model.packing=shared_prompts;run=runs/b"
    refused_each(recipe, [(f"model.name={folder}", "template: plain"), (plain, "has an encoder")])


@pytest.mark.parametrize(("kind", "key"), [("recipe", "reward.model"), ("prompts", "prompt_task.model")])
def test_a_model_to_which_the_ids_are_other_tokens_is_refused(request, tmp_path, kind, key):
    """The same model, in whose vocabulary two tokens have changed places."""
    folder = save_tiny(tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["z"] = vocabulary["z"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused(request.getfixturevalue(kind), [f"{key}={folder}"])
    assert f"{folder} has another vocabulary" in message


def test_what_only_the_evaluation_reads_leaves_the_loop_as_it_is(prompts):
    """Nor do the texts of the test."""
    one = "online.training.max_steps=1"

    def done(*changes: str) -> str:
        return guided(prompts, one, *changes).done("online").fingerprint

    before = done()
    Path("test.tsv").write_text("text\tlabel\nother tea\t1\n")
    changes = ["test=dev.tsv", "test_limit=3", "candidates=2", "best=1", "manual=[]", "random=2"]
    assert done(*(f"prompt_task.{change}" for change in changes)) == before
    assert done("prompt_task.share=0.5") != before


def test_other_weights_under_the_name_of_reward_model_are_another_run(recipe, tmp_path):
    changes = [f"reward.model={save_tiny(tmp_path / 'start')}", *ONCE]
    before = guided(recipe, *changes).done("online").fingerprint
    save_tiny(tmp_path / "start", tiny_llama(seed=1))
    assert guided(recipe, *changes).done("online").fingerprint != before


def test_an_unknown_name_in_open_run_is_refused_as_in_run(recipe):
    with pytest.raises(tokenward.UserError, match="Did you mean 'rouge'"):
        tokenward.open_run(recipe, ["online.source={name: rogue}"], quiet=True)


def test_reinforce_needs_no_references(recipe):
    rows(*[{"question": f"Say {n}."} for n in range(30)])
    changes = ["examples.references=null", *ONCE, "evaluation.metrics=[]"]
    figures = tokenward.read_figures(guided(recipe, REINFORCE, *changes, last="evaluation"))
    assert "length/change" in figures
    assert "references/logp_per_token/change" not in figures
