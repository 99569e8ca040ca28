import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward import config
from tokenward.config import (
    Named,
    Recipe,
    check_training,
    check_unused,
    load_recipe,
    parse_recipe,
    resolved,
)
from tokenward.config.base import Table
from tokenward.config.problems import unknown_keys
from tokenward.config.schema import ANY_NAME, EvalTable, named_table_of, schema_fields, table_of
from tokenward.config.source import read_source
from tokenward.config.training import ACTS, BESIDE, BY_OPTIMIZER, CANNOT_ACT, OURS
from tokenward.errors import UserError
from tokenward.training.arguments import TokenTrainingArguments

LAWFUL = settings(derandomize=True, deadline=None, max_examples=50)

FULL = """\
run: runs/full
seed: 3
fixed_prompts: 4
model:
  name: some/model
  dtype: bfloat16
  device: cpu
  attention: eager
  packing: none
  trust_remote_code: true
  adapter: {r: 8, target_modules: all-linear}
  head_mlp: {hidden: 64}
data:
  source: [a.jsonl, b.jsonl]
  format: trl
  columns: {chosen: better}
  split: train
  subset: main
  limit: 100
  eval:
    source: [my_test.jsonl]
    split: test
    subset: en
    limit: 50
    format: pairs
    columns: {prompt: question}
  pairs: adjacent
  min_gap: 0.5
tokens:
  template: plain
  chat_template_kwargs: {enable_thinking: false}
  max_prompt_tokens: 64
  max_response_tokens: 32
  too_long: truncate
  processes: 2
sft:
  training: {num_train_epochs: 1}
auxiliary_models:
  NAME:
    model: other/model
    prompt: "Answer badly: {prompt}"
    training: {num_train_epochs: 1}
    objective: {name: sft}
    swap_labels: true
    fraction: 0.5
    subset:
      scorer: {name: random}
      side: both
      pair_score: mean
      fraction: 0.2
      count: null
      alone: false
    adapter: {r: 4}
oracle:
  model: other/model
  fraction: 0.3
  objective: {name: dpo, beta: 0.1}
  adapter: null
  training: {learning_rate: 1e-5}
reward:
  model: fourth/model
  head: {hidden: 64, bound: sigmoid}
  objective: {name: plackett_luce, aggregate: softmin}
  fraction: 0.6
  training: {max_steps: 9}
scores:
  scorer: {name: log_ratio}
  precision: bfloat16
  tokens_per_batch: 512
  shard_rows: 16
policy:
  model: third/model
  selection: {name: top_fraction, fraction: 0.3}
  objective: {name: sepo, beta: 2}
  training: {eval_strategy: no}
eval_reward:
  fraction: 0.4
  objective: {name: dpo}
  training: {max_steps: 3}
examples:
  source: examples.jsonl
  development: [dev.jsonl]
  test: test.jsonl
  prompt: "Summarise: {article}"
  system: Be brief.
  references: highlights
  limit: 50
  development_limit: 5
  test_limit: 6
  split: train
  subset: main
prompt_task:
  train: train.tsv
  development: dev.tsv
  test: test.tsv
  text: sentence
  label: class
  template: "{sentence} {prompt} {mask}"
  verbalizers: [" terrible", " great"]
  model: task/model
  masked: true
  precision: bfloat16
  share: 0.7
  correct: 100
  wrong: 90
  start: Answer
  candidates: 8
  best: 2
  manual: ["It was"]
  random: 4
  test_limit: 7
  max_sentence_tokens: 64
online:
  source: {name: rouge, variant: rougeL}
  samples: 5
  reward_steps: 10
  reward_groups: 40
  development: 8
  reward_evals: 2
  reward_patience: 3
  every: 100
  until: 0.4
  restart: fresh
  evaluate_every: 50
  evaluation_samples: 2
  patience: 7
  rollouts: 16
  sampler: {name: transformers}
  sampling:
    max_new_tokens: 32
    temperature: 0.9
    top_p: 0.95
    top_k: 256
    stop: ["TL;DR"]
    batch: 16
    precision: bfloat16
  selection: {name: soft, transform: exp}
  objective: {name: reinforce, entropy: 0.1}
  training: {max_steps: 1000}
evaluation:
  precision: bfloat16
  prompts: 4
  max_new_tokens: 8
  temperature: 0.7
  top_p: 0.9
  top_k: 5
  metrics: [rouge]
  bootstrap: 10
  batch: 2
"""
KEYS = [key for key, _ in schema_fields()]
WHOLE = [key for key, field in schema_fields() if table_of(field) is None and "int" in str(field.annotation)]


def refused(text, *overrides, name="q.yaml"):
    with pytest.raises(UserError) as caught:
        parse_recipe(text, name, overrides)
    return str(caught.value)


def origins(loaded):
    return {key: (value, origin) for key, value, origin in resolved(loaded)}


def mutations(key):
    """The key with a letter left out, doubled, changed or swapped with the next one: at its start, middle and end."""
    for i in {0, len(key) // 2, len(key) - 1}:
        letter = key[i]
        yield key[:i] + key[i + 1 :]
        yield key[:i] + letter + key[i:]
        yield key[:i] + "x" + key[i + 1 :]
        yield key[:i] + key[i + 1 : i + 2] + letter + key[i + 2 :]


def nested(path, value):
    *outer, last = path
    tree = {last: value}
    for part in reversed(outer):
        tree = {part: tree}
    return tree


def renamed(tree, path, new):
    """The tree with the last key of the path replaced, at the same place."""
    first, rest = path[0], path[1:]
    return {
        (new if k == first and not rest else k): (renamed(v, rest, new) if k == first and rest else v)
        for k, v in tree.items()
    }


def test_a_full_recipe_is_read_as_it_is_written():
    recipe = parse_recipe(FULL, "full.yaml").recipe
    assert recipe.run == "runs/full"
    assert recipe.model.adapter == {"r": 8, "target_modules": "all-linear"}
    assert recipe.oracle.objective == Named(name="dpo", arguments={"beta": 0.1})
    assert recipe.oracle.adapter is None
    assert recipe.oracle.training == {"learning_rate": 1e-5}
    assert recipe.evaluation.metrics == ["rouge"]
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    written = yaml.safe_load(FULL)
    assert set(written_keys(written)) == set(KEYS)


def written_keys(values: dict, table: type[Table] = Recipe, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted keys of a recipe, without those inside named objects and other free tables."""
    for key, value in values.items():
        yield ".".join((*path, key))
        inner, named = table_of(table.model_fields[key]), named_table_of(table.model_fields[key])
        if inner is not None:
            yield from written_keys(value, inner, (*path, key))
        for auxiliary in value.values() if named is not None else ():
            yield from written_keys(auxiliary, named, (*path, key, ANY_NAME))


def test_defaults_of_a_guided_run_are_those_of_the_description():
    recipe = parse_recipe("online: {}\nexamples: {source: a.jsonl}\n", "q.yaml").recipe
    assert recipe.online.objective.name == "weighted_likelihood"
    assert recipe.online.selection.name == "soft"
    assert recipe.online.sampler.name == "transformers"
    assert (recipe.online.samples, recipe.online.every, recipe.online.until) == (3, None, 0.5)
    assert (recipe.online.rollouts, recipe.online.restart) == (64, "warm")
    assert (recipe.online.sampling.temperature, recipe.online.sampling.top_k) == (1.0, 50)
    assert recipe.reward.objective.name == "plackett_luce"
    assert (recipe.examples.prompt, recipe.examples.references) == ("{prompt}", None)
    plain = parse_recipe("seed: 0", "q.yaml").recipe
    assert (plain.online, plain.examples, plain.prompt_task, plain.model.head_mlp) == (None,) * 4


def test_defaults_are_those_of_the_description():
    recipe = parse_recipe("seed: 0", "recipes/quickstart.yaml").recipe
    assert recipe == Recipe(run="runs/quickstart")
    assert (recipe.sft, recipe.eval_reward) == (None, None)
    assert recipe.oracle.objective.name == "dpo"
    assert recipe.scores.scorer.name == "log_ratio"
    assert (recipe.policy.selection.name, recipe.policy.objective.name) == ("top_fraction", "sepo")
    assert (recipe.data.source, recipe.data.eval, recipe.oracle.adapter) == ("builtin", 0.1, "inherit")


def test_every_key_has_a_description():
    assert [key for key, text in config.descriptions().items() if not text.endswith(".")] == []


def test_a_recipe_is_frozen():
    recipe = parse_recipe(FULL, "q.yaml").recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_a_key_with_a_wrong_letter_is_refused_and_the_right_key_is_named():
    full, wrongly = read_source(FULL, "full.yaml").values, []
    elsewhere = {key.rpartition(".")[2] for key in KEYS}
    for key in KEYS:
        *tables, last = key.split(".")
        siblings = {k.rpartition(".")[2] for k in KEYS if k.rpartition(".")[0] == ".".join(tables)}
        # One letter may turn a key into its neighbour, as top_k into top_p, which is no mistake that can be seen, or
        # into a key of another table, which is then named.
        without_s = {name[:-1] for name in siblings - {last} if name.endswith("s")}  # then two are named
        for wrong in sorted(set(mutations(last)) - elsewhere - without_s - {""}):
            ((path, message),) = unknown_keys(renamed(full, (*tables, last), wrong))
            if path != ".".join((*tables, wrong)) or not message.endswith(f"Did you mean '{last}'?"):
                wrongly.append((key, wrong, message))
    assert not wrongly


def test_every_key_knows_its_line():
    rows, lines = FULL.splitlines(), parse_recipe(FULL, "full.yaml").lines
    assert [
        key for key in KEYS if f"{key.rpartition('.')[2]}:" not in rows[(lines.line_of(key) or 0) - 1]
    ] == []


def test_an_unknown_key_is_named_with_its_line_and_what_is_near():
    message = refused("seed: 1\noracle:\n  # how much\n  fractoin: 0.3\n", name="recipes/q.yaml")
    assert re.match("recipes/q.yaml:4: .*'fractoin' in oracle.*'fraction'", message)
    assert "Keys here: training." in refused("sft: {zzz: 1}")
    assert "'samples' or 'sampler'" in refused("online: {sample: 3}\n"), "the whole word first"


def test_a_key_of_another_table_is_sent_there():
    assert refused("oracle: {beta: 1}").endswith("in oracle. 'beta' belongs to oracle.objective.")
    assert refused("oracle: {learning_rate: 1}").endswith("'learning_rate' belongs to oracle.training.")
    assert refused("policy: {eval: 1}").endswith("'eval' belongs to data.")
    assert refused("data: {seed: 1}").endswith("'seed' belongs to the top level.")
    assert refused("beta: 1").endswith(
        "'beta' belongs to oracle.objective, auxiliary_models.NAME.objective, reward.objective, policy.objective, eval_reward.objective or "
        "online.objective."
    )


def test_every_mistake_is_reported_in_the_order_of_the_file():
    message = refused("oracle:\n  fractoin: 1\nseeds: 1\nmodel:\n  nam: x\n")
    assert [line.split(" ")[0] for line in message.splitlines()] == ["q.yaml:2:", "q.yaml:3:", "q.yaml:5:"]
    values = refused("oracle: 1\nmodel: 2\nseed: x\n")
    assert [line.split(" ")[0] for line in values.splitlines()] == ["q.yaml:1:", "q.yaml:2:", "q.yaml:3:"]


@pytest.mark.parametrize(
    ("text", "place", "allowed"),
    [
        (
            "oracle:\n  fraction: '0.1'",
            "2: oracle.fraction: got '0.1'",
            "> 0 and <= 1. Write it without quotes",
        ),
        ("oracle:\n  fraction: 0", "2: oracle.fraction: got 0", "a number > 0 and <= 1."),
        ("oracle: {fraction: true}", "1: oracle.fraction: got true", "a number"),
        ("data: {eval: 1}", "1: data.eval: got 1", ">= 0 and < 1"),
        ("data: {limit: 1e3}", "1: data.limit: got 1000.0", "a whole number >= 1 or null. Write 1000."),
        ("model:\n  packing: nnoe", "2: model.packing: got 'nnoe'", "'none'"),
        ("oracle:\n  objective: dpo", "2: oracle.objective: got 'dpo'", "Write {name: dpo}."),
        ("oracle: {objective: {name: 3}}", "1: oracle.objective: got {'name': 3}", "with a name"),
        ("data: {subset: no}", "1: data.subset: got false", "put quotes"),
        ("model: {name: 1.10}", "1: model.name: got 1.1", "quotes"),
        ("data: {columns: {a: 1}}", "1: data.columns: got {'a': 1}", "values are text"),
        ("data: {columns: 5}", "1: data.columns: got 5", "values are text"),
        ("data: {source: [1]}", "1: data.source: got [1]", "text or a list of text"),
        ("oracle: {adapter: 3}", "1: oracle.adapter: got 3", "inherit, a table or null"),
        ("scores: 3", "1: scores: got 3", "a table"),
        ("policy: {training: [a]}", "1: policy.training: got ['a']", "a table"),
        ("examples: {source: a, prompt: {opening}}", "1: examples.prompt: got", '"{opening}"'),
        ("seed: null", "1: seed: got null", "a whole number >= 0"),
    ],
)
def test_a_wrong_value_is_shown_with_what_is_allowed(text, place, allowed):
    message = refused(text)
    assert message.startswith(f"q.yaml:{place}")
    assert allowed in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b\n\tc: d", r"q\.yaml:2: .*spaces"),
        ("seed: 1\nmodel: {name: default\ndata: {}", r"q\.yaml:3: .*line 2, column 8"),
        ("seed: 1\nrun: [", r"q\.yaml:2: .*YAML"),
        ("seed: 1\nrun: \x01", r"q\.yaml:2: .*YAML"),
        ("seed: 1\n---\nseed: 2", r"q\.yaml:2: .*another document"),
        ("seed: !!python/object/apply:os.getcwd []", r"q\.yaml:1: "),
        ("seed: 1\nrun: !!python/name:os.getcwd", r"q\.yaml:2: .*YAML"),
        ("seed: !!int abc", r"q\.yaml:1: .*'abc'"),
        ("run: !!timestamp 2024-01-01", r"q\.yaml:1: .*timestamp"),
        ("seed: 1\nmodel: {adapter: {r: .nan}}", r"q\.yaml:2: \.nan"),
        ("data: &loop {columns: *loop}", r"q\.yaml:1: .*nested"),
        ("? [a]\n: 1", r"q\.yaml:1: .*key"),
        ("- seed", r"q\.yaml:1: .*\['seed'\]"),
        ("", r"q\.yaml: .*empty"),
        ("# only a comment\n", r"q\.yaml: .*empty"),
    ],
)
def test_text_that_is_no_recipe_is_refused_with_its_line(text, message):
    assert re.match(message, refused(text))


def test_what_is_written_at_least_is_a_recipe():
    least = refused("").partition(":\n")[2]
    assert parse_recipe(least, "q.yaml").recipe == Recipe(run="runs/q")


def test_a_key_written_twice_is_refused_with_both_lines():
    message = refused("oracle:\n  fraction: 0.1\n\n  fraction: 0.2\n")
    assert message == "q.yaml:4: key 'fraction' appears twice in oracle, first on line 2. Keep one."
    assert "twice in the recipe, first on line 1" in refused("seed: 1\nseed: 1")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2e+3", -2e3),
        (".5", 0.5),
        ("3.", 3.0),
        ("1_000", 1000),
        ("-7", -7),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("e5", "e5"),
        ("yes", True),
        ("off", False),
        ("~", None),
        ("'1e-5'", "1e-5"),
    ],
)
def test_words_are_read_without_the_traps_of_yaml(written, value):
    read = parse_recipe(f"oracle: {{training: {{x: {written}}}}}", "q.yaml").recipe.oracle.training["x"]
    assert (read, type(read)) == (value, type(value))


@LAWFUL
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_every_number_is_read_as_python_writes_it(number):
    read = parse_recipe(f"oracle: {{training: {{x: {number!r}}}}}", "q.yaml").recipe.oracle.training["x"]
    assert (read, type(read)) == (number, type(number))


def test_a_strategy_of_no_is_a_word():
    text = "policy:\n  training: {eval_strategy: no, save_strategy: off, logging_strategy: steps, bf16: no}"
    assert parse_recipe(text, "q.yaml").recipe.policy.training == {
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "steps",
        "bf16": False,
    }
    override = parse_recipe("seed: 1", "q.yaml", ["sft.training.eval_strategy=no"]).recipe
    assert override.sft is not None
    assert override.sft.training == {"eval_strategy": "no"}


def test_an_emptied_table_has_its_defaults():
    text = "oracle:\ndata:\npolicy:\n  training:\n  selection:\nsft:\n"
    assert parse_recipe(text, "q.yaml").recipe == Recipe(run="runs/q")


def test_a_named_table_without_a_name_keeps_the_default_one():
    recipe = parse_recipe(
        "oracle: {objective: {beta: 0.3}}", "q.yaml", ["policy.selection.fraction=0.5"]
    ).recipe
    assert recipe.oracle.objective == Named(name="dpo", arguments={"beta": 0.3})
    assert recipe.policy.selection == Named(name="top_fraction", arguments={"fraction": 0.5})


def test_values_know_where_they_come_from():
    text = "oracle:\n  objective:\n    beta: 0.3\n  training: {max_steps: 3, seed: 1}\n"
    overrides = ["oracle.training.max_steps=4", "policy.objective={name: simpo, gamma: 1}", "data.limit="]
    found = origins(parse_recipe(text, "recipes/q.yaml", overrides))
    assert found["oracle.objective.beta"] == (0.3, "recipes/q.yaml:3")
    assert found["oracle.objective.name"] == ("dpo", "default")
    assert found["oracle.training.max_steps"] == (4, "--set")
    assert found["oracle.training.seed"] == (1, "recipes/q.yaml:4")
    assert found["policy.objective.gamma"] == (1, "--set")
    assert found["data.limit"] == (None, "--set")
    assert found["run"] == ("runs/q", "default")
    assert found["sft"] == (None, "default")


@LAWFUL
@given(
    st.none() | st.integers(0, 9),
    st.none() | st.integers(0, 9),
    st.sampled_from(
        [
            k
            for k in WHOLE
            if not k.startswith(("auxiliary_models", "examples", "prompt_task", "online", "data.eval."))
        ]
    ),
)
def test_default_gives_way_to_the_file_and_the_file_to_set(in_file, in_set, key):
    # + 1, because most of these must be positive
    file = "seed: 0" if in_file is None else yaml.safe_dump(nested(key.split("."), in_file + 1))
    overrides = [] if in_set is None else [f"{key}={in_set + 1}"]
    value, origin = origins(parse_recipe(file, "q.yaml", overrides))[key]
    default = origins(parse_recipe("run: runs/q", "q.yaml"))[key][0]
    if in_set is not None:
        assert (value, origin) == (in_set + 1, "--set")
    elif in_file is not None:
        assert value == in_file + 1
        assert origin == f"q.yaml:{key.count('.') + 1}"
    else:
        assert value == default


def test_the_last_of_two_overrides_counts():
    assert parse_recipe("seed: 1", "q.yaml", ["seed=2", "seed=3"]).recipe.seed == 3


def test_an_override_leaves_its_neighbours():
    recipe = parse_recipe(FULL, "q.yaml", ["policy.selection.fraction=0.5", "sft=null"]).recipe
    assert recipe.policy.selection == Named(name="top_fraction", arguments={"fraction": 0.5})
    assert recipe.policy.objective.arguments == {"beta": 2}
    assert recipe.sft is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("oracle.fractoin=1", "--set oracle.fractoin: .*'fraction'"),
        ("orcle.fraction=1", "--set orcle.fraction: .*'oracle'"),
        ("data.limit=x", "--set data.limit: data.limit: got 'x'"),
        ("seed", "--set seed: "),
        ("oracle..x=1", r"--set oracle\.\.x=1: "),
        ("seed.x=3", "--set seed.x=3: .*'x'"),
        ("model.adapter={a: 1, a: 2}", "--set model.adapter:1: .*twice"),
        ("data.limit={", "--set data.limit:1: .*YAML"),
    ],
)
def test_a_wrong_override_is_refused_by_its_own_name(override, message):
    assert re.match(message, refused("seed: 1", override))


def test_later_checks_can_name_the_place_of_a_key():
    text = "oracle:\n  objective:\n    name: dpo\n    betta: 1\n"
    lines = parse_recipe(text, "q.yaml", ["policy.objective.gama=1"]).lines
    assert lines.line_of("oracle.objective.betta") == 4
    assert lines.line_of("oracle.fraction") is None
    assert lines.where("oracle.objective.betta") == "q.yaml:4"
    assert lines.where("oracle.objective.other") == "q.yaml:2"
    assert lines.where("scores.scorer") == "q.yaml"
    assert lines.where("policy.objective.gama") == "--set policy.objective.gama"
    assert lines.where("policy.objective") == "--set policy.objective.gama"


def test_a_table_that_was_changed_names_its_line_and_every_change():
    text = "seed: 1\noracle:\n  objective: {name: dpo}\n"
    lines = parse_recipe(text, "q.yaml", ["oracle.objective.betta=1", "oracle.objective.lss=2"]).lines
    assert lines.where("oracle.objective") == (
        "q.yaml:3 with --set oracle.objective.betta and --set oracle.objective.lss"
    )
    assert lines.where("oracle.objective.name") == "q.yaml:3"
    whole = ["policy.objective.a=1", "policy.objective={name: dpo}"]
    assert parse_recipe(text, "q.yaml", whole).lines.where("policy.objective") == "--set policy.objective"


def test_an_alias_is_reported_where_the_key_stands():
    lines = parse_recipe("sft:\n  training: &t\n    max_steps: 1\noracle:\n  training: *t\n", "q.yaml").lines
    assert lines.where("oracle.training.max_steps") == "q.yaml:3"
    assert lines.where("oracle.training") == "q.yaml:5"


def test_a_renamed_key_is_refused_with_its_new_name():
    for old, new in config.RENAMED.items():
        written = old.replace(ANY_NAME, "x")
        message = refused(yaml.safe_dump(nested(written.split("."), None)))
        assert f"key '{written}' is now called {new}." in message
        assert any(f".{key}".endswith(f".{new.partition(',')[0]}") for key in KEYS)
    message = refused("guidance:\n  reward_looks: 3\nextra: 1\ndata: {held_out: 0.1}\n")
    assert message.splitlines() == [
        "q.yaml:1: key 'guidance' is now called online.",
        "q.yaml:2: key 'guidance.reward_looks' is now called online.reward_evals.",
        "q.yaml:4: key 'data.held_out' is now called data.eval.",
    ]


def test_evaluation_rows_are_a_share_or_a_source_of_their_own():
    assert parse_recipe("data: {eval: 0.2}", "q.yaml").recipe.data.eval == 0.2
    assert parse_recipe("data: {eval: {split: test}}", "q.yaml").recipe.data.eval == EvalTable(split="test")


def test_a_recipe_file_is_read_with_or_without_a_byte_order_mark(tmp_path):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "mein-lauf.yaml").write_text("model: {name: größe}\n", encoding=encoding)
        loaded = load_recipe(tmp_path / "mein-lauf.yaml", ["seed=5"])
        assert (loaded.recipe.model.name, loaded.recipe.seed) == ("größe", 5)
        assert loaded.recipe.run == "runs/mein-lauf"
        assert loaded.lines.where("model") == f"{tmp_path / 'mein-lauf.yaml'}:1"


def test_a_missing_recipe_names_the_nearest_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/quickstart.yaml").write_text("seed: 1")
    for path in ("recipes/quikstart.yaml", "quikstart.yaml", "recipe/quickstart.yaml"):
        with pytest.raises(UserError, match=r"no recipe .*\. Did you mean recipes/quickstart\.yaml\?"):
            load_recipe(path)
    with pytest.raises(UserError, match=r"Recipes near it: quickstart\.yaml\."):
        load_recipe("zzz")
    with pytest.raises(UserError, match="recipes is a folder, not a recipe"):
        load_recipe("recipes")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(UserError, match=r"a\.yaml: this is not UTF-8 text \(byte 6\)"):
        load_recipe(tmp_path / "a.yaml")


def test_training_tables_are_checked_against_transformers():
    text = "oracle:\n  training:\n    learning_rte: 1\n    output_dir: x\n    max_steps: 3\n    zzz: 1\n"
    recipe, lines = parse_recipe(text, "q.yaml")
    with pytest.raises(UserError) as caught:
        check_training(recipe.oracle.training, "oracle.training", lines)
    words = ("q.yaml:3: .*'learning_rate'", "q.yaml:4: .*'output_dir'", "q.yaml:6: .*'zzz'")
    assert all(re.match(*both) for both in zip(words, str(caught.value).splitlines(), strict=True))
    check_training({"max_steps": 3, "bf16": True}, "oracle.training", lines)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("learning_rate: fast", "learning_rate: got 'fast'.*>= 0"),
        ("learning_rate: -1", "learning_rate: got -1.*>= 0"),
        ("learning_rate: '1e-5'", "learning_rate: got '1e-5'.*without quotes"),
        ("max_steps: many", "max_steps: got 'many'.*whole number"),
        ("max_steps: null", "max_steps: got null.*Leave it out"),
        ("max_steps: 1e3", "max_steps: got 1000.0.*Write 1000"),
        ("max_steps: true", "max_steps: got true"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size: got 0.*>= 1"),
        ("per_device_eval_batch_size: 0", "per_device_eval_batch_size: got 0.*>= 1"),
        ("gradient_accumulation_steps: 0", "gradient_accumulation_steps: got 0.*>= 1"),
        ("num_train_epochs: [3]", "num_train_epochs: got .*number"),
        ("bf16: ture", "bf16: got 'ture'.*'true'"),
        ("gradient_checkpointing: 1", "gradient_checkpointing: got 1"),
        ("report_to: 3", "report_to: got 3.*quotes"),
        ("lr_scheduler_type: cosin", "lr_scheduler_type: got 'cosin'.*linear"),
        ("eval_strategy: step", "eval_strategy: got 'step'.*'steps'"),
    ],
)
def test_values_of_training_tables_are_checked_with_their_line(written, words):
    recipe, lines = parse_recipe(f"sft:\n  training: {{{written}}}", "q.yaml")
    with pytest.raises(UserError, match=f"^q.yaml:2: sft.training.{words}"):
        check_training(recipe.sft.training, "sft.training", lines)


def test_every_field_of_the_training_arguments_is_decided():
    """A new version of transformers with another field fails here: somebody must decide what a recipe may say with it."""
    groups = [ACTS, OURS.keys(), CANNOT_ACT.keys(), BESIDE.keys(), set(BY_OPTIMIZER)]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert set().union(*groups) == {
        field.name for field in dataclasses.fields(TokenTrainingArguments) if field.init
    }


def test_lawful_values_of_training_tables_pass():
    text = (
        "sft: {training: {learning_rate: 1, num_train_epochs: 2, warmup_steps: 0.1, bf16: yes, max_steps: 3, "
        "eval_strategy: no, save_strategy: best, lr_scheduler_type: cosine, optim: adamw_torch, report_to: [wandb], "
        "gradient_checkpointing: true, gradient_checkpointing_kwargs: {use_reentrant: false}, tf32: true, "
        "optim_args: null, deepspeed: null, debug: '', logging_steps: 5, eval_steps: null, save_total_limit: 2}}"
    )
    recipe, lines = parse_recipe(text, "q.yaml")
    assert recipe.sft is not None
    check_training(recipe.sft.training, "sft.training", lines)


EXAMPLES = "examples: {source: a.jsonl, references: b}"
TASK = "prompt_task: {train: a.tsv, development: b.tsv, test: c.tsv, verbalizers: [a, b]}"
SOURCE = "online: {source: {name: rouge}}"


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (EXAMPLES, "q.yaml:1: examples"),
        (TASK, "q.yaml:1: prompt_task"),
        (f"{EXAMPLES}\ndata: {{source: c.jsonl}}\n{SOURCE}", "q.yaml:2: data"),
        (f"{EXAMPLES}\n{SOURCE}\npolicy: {{objective: {{name: sepo}}}}", "q.yaml:3: policy"),
        (f"{EXAMPLES}\n{SOURCE}\nscores: {{scorer: {{name: random}}}}", "q.yaml:3: scores.scorer"),
        (f"{TASK}\n{SOURCE}", "q.yaml:2: online.source"),
        (f"{TASK}\nonline: {{}}\nevaluation: {{metrics: [vader]}}", "q.yaml:3: evaluation.metrics"),
    ],
)
def test_what_was_written_and_cannot_act_is_refused(text, start):
    with pytest.raises(UserError, match=f"^{start} "):
        check_unused(parse_recipe(text, "q.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "data: {source: a.jsonl}",
        f"{EXAMPLES}\n{SOURCE}\ndata:\noracle: {{}}\neval_reward:\nscores: {{precision: bfloat16}}",
        f"{TASK}\nonline: {{source: null}}\nevaluation: {{bootstrap: 9, metrics: []}}",
    ],
)
def test_what_says_nothing_is_let_through(text):
    check_unused(parse_recipe(text, "q.yaml"))


def test_neither_module_loads_torch():
    program = (
        "import sys, tokenward.config, tokenward.artifacts\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
