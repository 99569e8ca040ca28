"""What an online run is refused for, as the user meets it: each message names the key or the row and what to write."""

import json
from pathlib import Path

import pytest

import tokenward
from tests.pipeline.tools import PROMPTS, REINFORCE, guided, guided_recipe, plugin, refused, write_examples
from tests.tiny import save_tiny, tiny_llama, tiny_t5
from tokenward.stages.tasks import _with_room, encoded_examples


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = guided_recipe(tmp_path / "work", tiny_folder)
    monkeypatch.chdir(made.parent)
    return made


@pytest.fixture
def prompts(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = guided_recipe(tmp_path / "work", tiny_folder, PROMPTS)
    monkeypatch.chdir(made.parent)
    return made


TASK = "prompt_task={train: train.tsv, development: dev.tsv, test: test.tsv, verbalizers: [' a', ' the']}"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["examples=null"], ["online needs one of the tables examples", "and prompt_task", "got neither"]),
        ([TASK], ["online needs one of the tables", "got both"]),
        (["examples=null", TASK], ["online.objective cannot be weighted_likelihood", "{name: reinforce, entropy"]),
        (["examples.references=null"], ["learns from references, and examples.references names no column",
                                        "objective: {name: reinforce}"]),
        (["online.source=null"], ["online.source is missing", "{name: rouge}"]),
        (["online.source={name: rogue}"], ["no preference source 'rogue'", "Did you mean 'rouge'?", "module:Name"]),
        (["online.source={name: length, word: 3}"], ["no setting 'word'", "Did you mean 'words'?"]),
        (["online.source={name: length}"], ["words"]),
        (["online.source={name: 'nolab:score'}"], ["module 'nolab' cannot be imported", "current folder"]),
        (["online.objective={name: reinforced}"], ["no objective 'reinforced'", "Did you mean 'reinforce'?"]),
        (["online.objective={name: reinforce, entropi: 1}"], ["Did you mean 'entropy'?"]),
        (["online.objective={name: sepo}"], ["online.objective", "sepo", "weighted_likelihood", "reinforce"]),
        (["online.objective={name: plackett_luce}"], ["online.objective", "reinforce"]),
        (["online.objective={name: dpo}"], ["online.objective", "dpo"]),
        (["online.selection={name: sfot}"], ["no selector 'sfot'", "Did you mean 'soft'?"]),
        (["online.sampler={name: vllm}"], ["no sampler 'vllm'", "transformers"]),
        (["reward.head.hiden=3"], ["no setting 'hiden'", "Did you mean 'hidden'?"]),
        (["reward.head.hidden=text"], ["hidden is 'text'"]),
        (["reward.head.unit=syllable"], ["unit is 'syllable'"]),
        (["reward.head.unit=spans"], ["unit", "spans", "samples"]),
        (["reward.objective={name: plackett_luce, aggregate: mean}"], ["no aggregate 'mean'", "average"]),
        (["model.head_mlp={hiden: 3}"], ["Did you mean 'hidden'?"]),
        (["model.head_mlp={}", "model.adapter={r: 2}"], ["head_mlp and model.adapter", "Leave one out"]),
        (["online.evry=3"], ["unknown key 'evry' in online", "Did you mean 'every'?"]),
        (["online.sampling.top_q=1"], ["unknown key 'top_q' in online.sampling", "Did you mean 'top_p' or 'top_k'?"]),
        (["examples.promt=x"], ["unknown key 'promt' in examples", "Did you mean 'prompt'?"]),
        (["online.samples=1"], ["online.samples: got 1", ">= 2"]),
        (["online.until=1.5"], ["online.until: got 1.5", "<= 1"]),
        (["online.restart=cold"], ["online.restart: got 'cold'", "warm or fresh"]),
        (["online.training.learning_rat=1"], ["unknown key 'learning_rat'", "Did you mean 'learning_rate'?"]),
        (["examples.prompt='Say {question'"], ["examples.prompt is 'Say {question'", "braces do not match", "{article}"]),
        (["examples.prompt='Say {}'"], ["examples.prompt is 'Say {}'", "holds no plain name"]),
        (["examples.prompt='Say {question:d}'"], ["holds no plain name"]),
        (["examples.prompt='Say something.'"], ["--set examples.prompt: examples.prompt is 'Say something.'",
                                                "names no column", 'prompt: "Summarize: {article}"']),
        (["online=null"], ["examples is read by an online run alone"]),
        (["data.source=builtin"], ["data belongs to a run on comparisons"]),
        (["evaluation.metrics=[rouge11]"], ["rouge11", "Did you mean"]),
        (["reward.objective={name: weighted_likelihood}"], ["reward.objective is weighted_likelihood", "ranked lists",
                                                            "{name: plackett_luce}", "module:Name"]),
        (["reward.objective={name: sft}"], ["reward.objective is sft", "{name: plackett_luce}"]),
        (["reward.objective={name: dpo}"], ["reward.objective is dpo", "{name: plackett_luce}"]),
        (["reward.objective={name: reinforce}"], ["reward.objective is reinforce", "{name: plackett_luce}"]),
        (["reward.head={hidden: 4, low: -1.0}"], ["online.selection", "transform: identity", "from -1",
                                                  "transform: exp", "low: 1.0e-8"]),
        (["reward.head={hidden: 4, bound: none}"], ["transform: identity", "from -inf", "transform: exp"]),
        (["reward.head={hidden: 4, bound: none}", "online.selection={name: soft, transform: power, power: 2.0}"],
         ["transform: power", "from -inf"]),
        (["online.selection={name: top_fraction, scope: dataset}"], ["online.selection has scope: dataset", "scope: batch"]),
        (["online.selection={name: transform, steps: [segment_pool]}"], ["online.selection pools over sentence",
                                                                          "reward.head.unit"]),
        (["online.training.max_steps=0"], ["online.training: max_steps is 0", "Write 1 or more"]),
        (["online.training={num_train_epochs: 0}"], ["online.training: num_train_epochs is 0", "greater than 0"]),
        (["online.training={num_train_epochs: -1.5}"], ["num_train_epochs is -1.5"]),
        (["online.training.max_steps=-3"], ["online.training: max_steps is -3"]),
        (["online.source={name: 'os:path'}"], ["preference source 'os:path' is a module, which cannot be called",
                                                 "function or a class"]),
        (["online.sampler={name: 'os:sep'}"], ["sampler 'os:sep' is a str, which cannot be called"]),
        (["online.patience=2"], ["online.patience is 2", "online.evaluate_every"]),
        (["online.reward_patience=2", "online.reward_evals=0"], ["online.reward_patience is 2",
                                                                     "online.reward_evals"]),
        (["reward.training.max_steps=5"], ["reward.training.max_steps", "online.reward_steps"]),
        (["reward.training.num_train_epochs=2"], ["reward.training.num_train_epochs", "online.reward_steps"]),
        (["reward.training.seed=5"], ["reward.training.seed", "seed of the recipe"]),
        (["reward.training.eval_strategy=epoch"], ["reward.training.eval_strategy", "online.reward_evals"]),
        (["reward.training.eval_steps=5"], ["reward.training.eval_steps", "online.reward_evals"]),
        (["online.sampling.stop=['']"], ["online.sampling.stop", "empty text", "stop: []"]),
        (["online.sampling.temperature=1e-45"], ["online.sampling.temperature is 1e-45", "float32", "top_k: 1"]),
        (["evaluation.temperature=1e-40"], ["evaluation.temperature is 1e-40", "float32", "top_k: 1"]),
    ],
    ids=lambda value: value[0][:48] if isinstance(value, list) and "=" in value[0] else "",
)  # fmt: skip
def test_a_recipe_that_cannot_work_is_refused_before_anything_is_done(recipe, changes, parts):
    message = refused(recipe, changes)
    for part in parts:
        assert part in message, message
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
    ("changes", "parts"),
    [
        (["reward.objective={name: weighted_likelihood}"], ["reward.objective is weighted_likelihood"]),
        (["reward.head={bound: none}"], ["policy.selection", "transform: identity", "from -inf"]),
        (["reward.head={low: -0.5}"], ["policy.selection", "from -0.5"]),
        (["reward.training.max_steps=0"], ["reward.training: max_steps is 0"]),
    ],
)
def test_a_reward_of_a_run_on_comparisons_is_looked_at_too(tiny_workplace, changes, parts):
    soft = ["scores.scorer={name: reward}", "policy.selection={name: soft}"]
    message = refused(tiny_workplace, [*soft, *changes], last="data")
    for part in parts:
        assert part in message, message
    assert not Path("runs").exists()


def test_several_processes_are_refused_as_such(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(recipe)
    assert "a run works in one process, and this is one of 2" in message
    assert "without torchrun" in message
    assert not Path("runs").exists()


def test_a_mistake_in_the_file_is_named_with_its_line(recipe):
    text = recipe.read_text().replace("name: length, words: 3", "name: lenght, words: 3")
    recipe.write_text(text)
    line = next(n for n, row in enumerate(text.splitlines(), start=1) if "lenght" in row)
    message = refused(recipe)
    assert message.startswith(
        f"{recipe}:{line}: there is no preference source 'lenght'. Did you mean 'length'?"
    )


@pytest.mark.parametrize(
    ("written", "wrong"),
    [('prompt: "{question}"', 'prompt: "{question"'), ("words: 3}", "words: 3}\n  objective: {name: sepo}")],
)
def test_a_wrong_value_of_a_table_is_named_with_its_own_line(recipe, written, wrong):
    text = recipe.read_text().replace(", prompt:", ",\n  prompt:").replace(written, wrong)
    recipe.write_text(text)
    line = next(n for n, row in enumerate(text.splitlines(), start=1) if wrong.splitlines()[-1] in row)
    assert refused(recipe).startswith(f"{recipe}:{line}: ")


def test_a_device_that_is_not_there_is_refused(recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = refused(recipe, ["model.device=cuda:0"])
    assert message.startswith("--set model.device: model.device is cuda:0, and torch sees no CUDA device")


def test_a_wrong_template_is_named_with_its_line(prompts):
    text = prompts.read_text() + "# the end\n"
    text = text.replace("  candidates: 4", "  template: '{sentence}'\n  candidates: 4")
    prompts.write_text(text)
    line = next(n for n, row in enumerate(text.splitlines(), start=1) if "template" in row)
    assert refused(prompts).startswith(f"{prompts}:{line}: ")


def test_a_run_on_comparisons_has_no_network_before_the_head(tiny_workplace):
    message = refused(tiny_workplace, ["model.head_mlp={hidden: 4}"], last="data")
    assert "model.head_mlp" in message
    assert "online" in message


@pytest.mark.parametrize("last", ["scores", "oracle"])
def test_a_guided_run_has_its_own_stages(recipe, last):
    message = refused(recipe, last=last)
    assert f"has no stage {last}. It has examples, " in message
    assert "online, evaluation" in message


def test_a_run_on_comparisons_has_no_online_stage(tiny_workplace):
    message = refused(tiny_workplace, last="online")
    assert "on comparisons and has no stage online" in message
    assert "The table online makes a run an online one" in message


def rows(*records: dict) -> None:
    Path("examples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ({"question": "Say."}, ["examples.jsonl:31: examples.references names the column 'answers'",
                                "this row has question", "Name one of them"]),
        ({"answers": "a"}, ["examples.jsonl:31: examples.prompt names the column 'question'"]),
        ({"question": None, "answers": "a"}, ["examples.jsonl:31: question is"]),
        ({"question": "Say.", "answers": []}, ["examples.jsonl:31: answers is", "none of them empty"]),
        ({"question": "Say.", "answers": ["a", " "]}, ["none of them empty"]),
        ({"question": "Say.", "answers": 3}, ["examples.jsonl:31: answers is"]),
        ({"question": "a \ud800", "answers": "a"}, ["examples.jsonl:31: question: holds half of a surrogate pair at "
                                                    "character 2", "Mend or delete this row"]),
        ({"question": "Say.", "answers": ["a", "b\udfff"]}, ["examples.jsonl:31: answers[1]: holds half of a surrogate"]),
        ({"question": "Say.", "answers": "a", "more": {"x": ["\ud800"]}}, ["examples.jsonl:31: more.x[0]: holds half"]),
        ({"question": "Say.", "answers": "a", "\ud800": 1}, ["examples.jsonl:31: a column's name: holds half"]),
        ({"question": "  ", "answers": "a"}, ["examples.jsonl:31: the prompt is empty", "Mend or delete this row"]),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_an_example_is_named(recipe, record, parts):
    with Path("examples.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    change = ["examples.prompt='{question}'"]
    message = refused(recipe, change)
    for part in parts:
        assert part in message, message


def test_a_list_of_texts_is_joined_and_numbers_are_text(recipe):
    rows(*[{"question": ["Say", str(n)], "level": n, "answers": "a"} for n in range(30)])
    run = guided(recipe, "examples.prompt='{question} at {level}'", last="examples")
    line = json.loads((run.path("examples") / "train.jsonl").read_text().splitlines()[0])
    number = line["columns"]["level"]
    assert line["prompt"] == [{"role": "user", "content": f"Say {number} at {number}"}]
    assert line["references"] == ["a"]


def test_line_marks_of_unicode_in_a_text_end_no_row(recipe):
    text = "one\u2028two\u2029three\x85four"
    rows(*[{"question": f"{n} {text}", "answers": text} for n in range(30)])
    assert guided(recipe, last="online").done("online").facts["steps"] == 6


def test_braces_and_columns_of_any_name_stand_in_a_prompt(recipe):
    rows(*[{"my question.1": f"Say {n}", "answers": "a"} for n in range(60)])
    run = guided(recipe, "examples.prompt='{{x}} {my question.1} {{'", last="examples")
    line = json.loads((run.path("examples") / "train.jsonl").read_text().splitlines()[0])
    assert line["prompt"][0]["content"] == f"{{x}} {line['columns']['my question.1']} {{"


def test_parts_of_the_source_are_apart_and_stay_the_same(recipe):
    write_examples(Path("examples.jsonl"), 200)
    run = guided(recipe, last="examples")
    parts = {
        part: [
            json.loads(line)["source"]
            for line in (run.path("examples") / f"{part}.jsonl").read_text().splitlines()
        ]
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


def test_too_few_examples_leave_a_part_empty(recipe):
    write_examples(Path("examples.jsonl"), 2)
    message = refused(recipe)
    assert "no example is left for" in message
    assert "more rows to examples.source" in message


def test_an_empty_training_file_is_told_of_the_key_that_there_is(recipe):
    Path("none.jsonl").write_text("")
    message = refused(recipe, ["examples.source=none.jsonl"])
    assert "no example is left for train. Give more rows to examples.source." in message


def test_a_missing_file_is_named(recipe):
    message = refused(recipe, ["examples.development=nowhere.jsonl"])
    assert "nowhere.jsonl" in message
    assert "no such file" in message


def source(text: str) -> str:
    return f"online.source={{name: '{plugin(text)}:score'}}"


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("return [0.0] * len(completions)", ["the reward cannot be learned: all 12 groups of 3 samples are tied",
                                             "raise online.samples"]),
        ("return [float('nan')] * len(completions)", ["examples.jsonl:", ":score returned nan"]),
        ("return [0.0]", ["1 scores for", "one finite number per completion"]),
        ("return None", ["which is no list"]),
        ("return ['0.5'] * len(completions)", ["which is no number"]),
    ],
)  # fmt: skip
def test_a_source_that_cannot_rank_says_why(recipe, body, parts):
    message = refused(recipe, [source(f"def score(prompts, completions):\n    {body}\n")])
    for part in parts:
        assert part in message, message


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
    ("body", "parts"),
    [
        ("return []", ["returned 0 groups of replies for 12 prompts"]),
        ("return None", ["returned None", "list of lists of Reply"]),
        ("return [[Reply([5], 'a', False)] * (count - 1) for p in prompts]", ["2 replies to prompt 0", "asked for 3"]),
        ("return [[('a', 'b')] * count for p in prompts]", ["reply 0 to prompt 0 is a tuple", "Reply(ids, text, ended)"]),
        ("return [[Reply([5, 266], 'a', False)] * count for p in prompts]", ["holds the id 266", "0 to 265"]),
        ("return [[Reply([-1], 'a', False)] * count for p in prompts]", ["holds the id -1"]),
        ("return [[Reply([5.0], 'a', False)] * count for p in prompts]", ["holds the id 5.0"]),
        ("return [[Reply([], '', False)] * count for p in prompts]", ["all 3 replies to prompt 0 are empty"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("changes", [[], [REINFORCE]], ids=["likelihood", "reinforce"])
def test_a_sampler_of_ones_own_that_returns_something_else_says_so(recipe, body, parts, changes):
    message = refused(recipe, [sampler(body), *changes])
    assert "online.sampler" in message
    for part in parts:
        assert part in message, message


def test_what_an_update_by_reinforce_samples_is_looked_at_too(recipe):
    body = "return [[Reply([5] * (i + 1 if len(prompts) > 2 else 0), 'a ' * i, False) for i in range(count)] for p in prompts]"
    message = refused(recipe, [sampler(body), REINFORCE, "online.reward_evals=0"])
    assert "online.sampler" in message
    assert "all 3 replies to prompt 0 are empty" in message


@pytest.mark.parametrize("changes", [[], [REINFORCE]], ids=["likelihood", "reinforce"])
def test_empty_replies_are_dropped_and_counted(recipe, changes):
    body = "return [[Reply([5] * i, 'a ' * i, False) for i in range(count)] for p in prompts]"
    run = guided(recipe, sampler(body), *changes, "online.training.max_steps=1", "online.every=null")
    (event,) = [json.loads(line) for line in (run.path("online") / "events.jsonl").read_text().splitlines()]
    assert event["dropped"] == {"dropped: empty replies": 12}
    assert event["groups"] == 12


def test_an_object_that_cannot_be_called_is_no_sampler(recipe):
    text = "class Mine:\n    def __init__(self, model, template, settings, precision):\n        pass\n"
    message = refused(recipe, [f"online.sampler={{name: '{plugin(text)}:Mine'}}"])
    assert "online.sampler" in message
    assert "a Mine, which cannot be called" in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["examples.references=answers"], ["the metric rouge1", "rouge1 needs 1 words of a-z", "chrf"]),
        (
            ["examples.references=null", REINFORCE],
            ["rouge measures against reference texts", "examples: {references"],
        ),
    ],
    ids=["other alphabet", "none"],
)
def test_a_metric_that_could_not_be_measured_ends_the_run_before_it_trains(recipe, changes, parts):
    rows(*[{"question": f"Say {n}.", "answers": ["\u732b"]} for n in range(30)])
    message = refused(recipe, changes, last="evaluation")
    for part in parts:
        assert part in message, message
    assert "source:" not in message
    assert not Path("runs/guided/online/model").exists()
    assert not list(Path("runs").glob("*/online/manifest.json"))


def test_a_source_is_given_the_columns_that_it_names(recipe):
    text = (
        "def score(prompts, completions, completion_ids, level, references):\n"
        "    assert all(prompt == f'Say {number}.' for prompt, number in zip(prompts, level))\n"
        "    assert all(refs == ['the good tea on the table', 'a good cup'] for refs in references)\n"
        "    return [float(sum(ids)) for ids in completion_ids]\n"
    )
    guided(recipe, source(text), "online.training.max_steps=1", "online.every=null")
    message = refused(recipe, [source("def score(completions, lvel):\n    return [0.0]\n"), "run=runs/b"])
    assert "takes 'lvel', which is no column of the examples" in message
    assert "level" in message


def test_development_groups_that_are_all_tied_leave_the_last_reward(recipe):
    """There is nothing to choose by, and that is no reason to stop."""
    text = (
        "calls = []\n"
        "def score(prompts, completions, completion_ids):\n"
        "    calls.append(len(completions))\n"
        "    if len(completions) <= 6:\n"
        "        return [0.0] * len(completions)\n"
        "    return [float(sum(ids)) for ids in completion_ids]\n"
    )
    run = guided(recipe, source(text), "online.training.max_steps=1", "online.every=null")
    (event,) = [json.loads(line) for line in (run.path("online") / "events.jsonl").read_text().splitlines()]
    assert event["development_groups"] == 0
    assert event["steps"] == 3
    assert "development_loss" not in event


def test_examples_that_are_too_long_are_dropped_or_named(recipe):
    message = refused(recipe, ["tokens.max_prompt_tokens=5"])
    assert "no comparison is left after encoding" in message
    assert "prompt too long" in message
    message = refused(recipe, ["tokens.max_response_tokens=3", "tokens.too_long=error"])
    assert "examples.jsonl:" in message
    assert "tokens.max_response_tokens" in message


def test_a_prompt_that_leaves_no_room_for_a_reply_is_dropped(recipe, tmp_path):
    """Of a context of 64; the prompts have 29 tokens, but two have 39, of which one is for the test."""
    short = f"model.name={save_tiny(tmp_path / 'short', tiny_llama(max_position_embeddings=64))}"
    prompts = [f"{number:10}" for number in range(12)]
    prompts[1] = prompts[10] = "0123456789" * 2
    parts = ["examples.source=train.jsonl", "examples.development=dev.jsonl", "examples.test=test.jsonl"]
    for part, chosen in (("train", prompts[:6]), ("dev", prompts[6:8]), ("test", prompts[8:])):
        lines = [json.dumps({"question": text, "answers": "a"}) + "\n" for text in chosen]
        Path(f"{part}.jsonl").write_text("".join(lines))
    changes = [short, *parts, "online.sampling.max_new_tokens=30", "evaluation.max_new_tokens=30"]
    for objective in ([], [REINFORCE]):
        run = guided(recipe, *changes, *objective, "evaluation.prompts=9", last="evaluation")
        assert run.done("online").facts["rows"] == 5
        assert len((run.path("evaluation") / "samples.jsonl").read_text().splitlines()) == 3
    message = refused(recipe, [*changes, "online.sampling.max_new_tokens=60"])
    assert "no example of train is left" in message
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


def test_the_rewards_context_counts_too(recipe, tmp_path):
    short = save_tiny(tmp_path / "short", tiny_llama(max_position_embeddings=32))
    assert "longer than the model's context" in refused(recipe, [f"reward.model={short}"])


def test_a_t5_without_a_chat_template_is_told_to_write_plain(recipe, tmp_path):
    folder = save_tiny(tmp_path / "t5", tiny_t5())
    (folder / "chat_template.jinja").unlink()
    message = refused(recipe, [f"model.name={folder}"])
    assert "no chat template" in message
    assert "tokens.template: plain" in message
    message = refused(
        recipe,
        [f"model.name={folder}", "tokens.template=plain", "model.packing=shared_prompts", "run=runs/b"],
    )
    assert "has an encoder" in message


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (["prompt_task.verbalizers=[' a', 'tea']"], ["verbalizers: 'tea'", "tokens", "must be one"]),
        (["prompt_task.verbalizers=[' a']"], ["2 or more classes"]),
        (["prompt_task.verbalizers=[' a', ' a']"], ["are the same token"]),
        (["prompt_task.train=nowhere.tsv"], ["nowhere.tsv"]),
        (["prompt_task.text=sentence"], ["train.tsv:", "has no column sentence", "It has: text, label"]),
        (["prompt_task.label=lable"], ["has no column lable", "Did you mean label?"]),
        (["prompt_task.template='{sentence} {mask} {prompt}'"], ["has a {mask}, but", "causal language model"]),
        (["prompt_task.template='{sentence}'"], ["prompt"]),
        (["prompt_task.start=''"], ["prompt_task.start '' is no token"]),
        (["prompt_task.candidate=3"], ["unknown key 'candidate' in prompt_task", "Did you mean 'candidates'?"]),
        (["online.objective={name: weighted_likelihood}"], ["no written prompts"]),
        (["online.source={name: length, words: 3}"], ["online.source cannot act in a prompt_task"]),
        (["evaluation.metrics=[vader]"], ["evaluation.metrics cannot act in a prompt_task"]),
        (["prompt_task.verbalizers=[' a', ' the', ' in']"], ["3 words", "no text has the label 2", "train.tsv"]),
    ],
    ids=lambda value: value[0][:40] if isinstance(value, list) and "=" in value[0] else "",
)  # fmt: skip
def test_a_prompt_task_that_cannot_work_is_refused(prompts, changes, parts):
    message = refused(prompts, changes)
    for part in parts:
        assert part in message, message


def test_a_label_without_a_word_is_named(prompts):
    with Path("dev.tsv").open("a") as file:
        file.write("more tea\t2\n")
    message = refused(prompts)
    assert "dev.tsv:10: label is 2. Labels must be 0 to 1, one for each verbalizer" in message


def test_all_tied_prompts_are_named(prompts):
    message = refused(prompts, ["online.sampling.top_k=1"])
    assert "all 12 groups of 4 samples are tied" in message
    assert "higher temperature" in message


def test_the_tests_texts_are_not_looked_at_by_the_loop(prompts):
    """A broken test file does not stop the training, whose stage does not depend on it either."""
    run = guided(prompts)
    before = (run.path("online") / "manifest.json").read_text()
    Path("test.tsv").write_text("text\tlabel\nother tea\t1\n")
    guided(prompts)
    assert (run.path("online") / "manifest.json").read_text() == before


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The same model, in whose vocabulary two tokens have changed places."""
    folder = save_tiny(tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["z"] = vocabulary["z"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_reward_to_which_the_ids_are_other_tokens_is_refused(recipe, other):
    message = refused(recipe, [f"reward.model={other}"])
    assert f"the reward.model {other} has another vocabulary" in message


def test_a_task_model_to_which_the_ids_are_other_tokens_is_refused(prompts, other):
    message = refused(prompts, [f"prompt_task.model={other}"])
    assert f"the task model {other} has another vocabulary" in message


def test_what_only_the_evaluation_reads_leaves_the_loop_as_it_is(prompts):
    one = "online.training.max_steps=1"
    before = (guided(prompts, one).path("online") / "manifest.json").read_text()
    changes = ["test=dev.tsv", "test_limit=3", "candidates=2", "best=1", "manual=[]", "random=2"]
    after = guided(prompts, one, *(f"prompt_task.{change}" for change in changes))
    assert (after.path("online") / "manifest.json").read_text() == before
    assert (
        guided(prompts, one, "prompt_task.share=0.5").path("online") / "manifest.json"
    ).read_text() != before


def test_other_weights_under_the_name_of_reward_model_are_another_run(recipe, tmp_path):
    changes = [f"reward.model={save_tiny(tmp_path / 'start')}", "online.training.max_steps=1"]
    before = guided(recipe, *changes).done("online").fingerprint
    save_tiny(tmp_path / "start", tiny_llama(seed=1))
    assert guided(recipe, *changes).done("online").fingerprint != before


def test_an_unknown_name_in_open_run_is_refused_as_in_run(recipe):
    with pytest.raises(tokenward.UserError, match="Did you mean 'rouge'"):
        tokenward.open_run(recipe, ["online.source={name: rogue}"], quiet=True)


def test_reinforce_needs_no_references(recipe):
    rows(*[{"question": f"Say {n}."} for n in range(30)])
    changes = ["examples.references=null", "online.training.max_steps=1", "evaluation.metrics=[]"]
    run = guided(recipe, REINFORCE, *changes, last="evaluation")
    figures = tokenward.read_figures(run)
    assert "length/change" in figures
    assert "references/logp_per_token/change" not in figures
