import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.config import (
    RENAMED,
    Named,
    Recipe,
    check_training,
    check_unused,
    load_recipe,
    parse_recipe,
    resolved,
)
from tokenward.config.base import Settings
from tokenward.config.problems import unknown_keys
from tokenward.config.schema import ANY_NAME, EvalTable, named_table_of, schema_fields, table_of
from tokenward.config.source import read_source
from tokenward.config.training import BESIDE, BY_OPTIMIZER, CANNOT_ACT, OURS
from tokenward.errors import UserError
from tokenward.training.arguments import TokenTrainingArguments

LAWFUL = settings(derandomize=True, deadline=None, max_examples=50)

FULL = """\
run: runs/full
seed: 3
fixed_prompts: 4
model: {name: some/model, dtype: bfloat16, device: cpu, attention: eager, packing: none, trust_remote_code: true,
  adapter: {r: 8, target_modules: all-linear}, head_mlp: {hidden: 64}}
data:
  {source: [a.jsonl, b.jsonl], format: trl, columns: {chosen: better}, split: train, subset: main, limit: 100,
  pairs: adjacent, min_gap: 0.5,
  eval: {source: [my_test.jsonl], split: test, subset: en, limit: 50, format: pairs, columns: {prompt: question}}}
tokens: {template: plain, chat_template_kwargs: {enable_thinking: false}, max_prompt_tokens: 64, max_response_tokens: 32,
  too_long: truncate, processes: 2}
sft:
  training: {num_train_epochs: 1}
auxiliary_models:
  NAME: {model: other/model, prompt: "Answer badly: {prompt}", training: {num_train_epochs: 1}, objective: {name: sft},
    swap_labels: true, fraction: 0.5, adapter: {r: 4},
    subset: {scorer: {name: random}, side: both, pair_score: mean, fraction: 0.2, count: null, alone: false}}
oracle: {model: other/model, fraction: 0.3, objective: {name: dpo, beta: 0.1}, adapter: null, training: {learning_rate: 1e-5}}
reward: {model: fourth/model, head: {hidden: 64, bound: sigmoid}, fraction: 0.6, training: {max_steps: 9},
  objective: {name: plackett_luce, aggregate: softmin}}
scores: {scorer: {name: log_ratio}, precision: bfloat16, tokens_per_batch: 512, shard_rows: 16}
policy: {model: third/model, selection: {name: top_fraction, fraction: 0.3}, objective: {name: sepo, beta: 2},
  training: {eval_strategy: no}, rollouts: 8, sampler: {name: transformers},
  sampling: {max_new_tokens: 16, temperature: 0.8, top_p: 0.85, top_k: 128, stop: ["END"], batch: 32, precision: bfloat16}}
eval_reward: {fraction: 0.4, objective: {name: dpo}, training: {max_steps: 3}}
examples: {source: examples.jsonl, development: [dev.jsonl], test: test.jsonl, prompt: "Summarise: {article}", system: Be brief.,
  references: highlights, limit: 50, development_limit: 5, test_limit: 6, split: train, subset: main}
prompt_task: {train: train.tsv, development: dev.tsv, test: test.tsv, text: sentence, label: class, masked: true,
  template: "{sentence} {prompt} {mask}", verbalizers: [" terrible", " great"], model: task/model, precision: bfloat16,
  share: 0.7, correct: 100, wrong: 90, start: Answer, candidates: 8, best: 2, manual: ["It was"], random: 4, test_limit: 7,
  max_sentence_tokens: 64}
online: {source: {name: rouge, variant: rougeL}, reward: runs/other/reward, samples: 5, reward_steps: 10, reward_groups: 40, development: 8,
  reward_evals: 2, reward_patience: 3, every: 100, until: 0.4, restart: fresh, evaluate_every: 50, evaluation_samples: 2,
  patience: 7, rollouts: 16, sampler: {name: transformers}, selection: {name: soft, transform: exp}, training: {max_steps: 1000},
  sampling: {max_new_tokens: 32, temperature: 0.9, top_p: 0.95, top_k: 256, stop: ["TL;DR"], batch: 16, precision: bfloat16},
  objective: {name: reinforce, entropy: 0.1}}
evaluation: {precision: bfloat16, prompts: 4, max_new_tokens: 8, temperature: 0.7, top_p: 0.9, top_k: 5, metrics: [rouge],
  bootstrap: 10, batch: 2, sampler: {name: vllm, chunk: 9}}
"""
KEYS = [key for key, _ in schema_fields()]
WHOLE = [key for key, field in schema_fields() if table_of(field) is None and "int" in str(field.annotation)]
FREE = ("auxiliary_models", "examples", "prompt_task", "online", "data.eval.")  # not there unless written


def error_of(text, *overrides, name="q.yaml"):
    with pytest.raises(UserError) as caught:
        parse_recipe(text, name, overrides)
    return caught.value


def recipe_of(text, *overrides):
    return parse_recipe(text, "q.yaml", overrides).recipe


def origins(loaded):
    return {key: (value, origin) for key, value, origin in resolved(loaded)}


def mutations(key):
    """The key with a letter missing, doubled, changed or swapped with the next: at its start, middle and end."""
    for i in {0, len(key) // 2, len(key) - 1}:
        yield key[:i] + key[i + 1 :]
        yield key[:i] + key[i] + key[i:]
        yield key[:i] + "x" + key[i + 1 :]
        yield key[:i] + key[i + 1 : i + 2] + key[i] + key[i + 2 :]


def nested(path, value):
    for part in reversed(path):
        value = {part: value}
    return value


def renamed(tree, path, new):
    """The tree with the last key of the path replaced, at the same position."""
    first, rest = path[0], path[1:]
    return {
        (new if k == first and not rest else k): (renamed(v, rest, new) if k == first and rest else v)
        for k, v in tree.items()
    }


def written_keys(values: dict, table: type[Settings] = Recipe, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted keys of a recipe, without those inside named objects and other free tables."""
    for key, value in values.items():
        yield ".".join((*path, key))
        inner, named = table_of(table.model_fields[key]), named_table_of(table.model_fields[key])
        if inner is not None:
            yield from written_keys(value, inner, (*path, key))
        for auxiliary in value.values() if named is not None else ():
            yield from written_keys(auxiliary, named, (*path, key, ANY_NAME))


def test_full_recipe_is_read_as_written():
    recipe = recipe_of(FULL)
    assert recipe.model.adapter == {"r": 8, "target_modules": "all-linear"}
    assert recipe.oracle.objective == Named(name="dpo", arguments={"beta": 0.1})
    assert (recipe.oracle.adapter, recipe.oracle.training) == (None, {"learning_rate": 1e-5})
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert set(written_keys(yaml.safe_load(FULL))) == set(KEYS)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_defaults_are_the_documented_ones():
    recipe = parse_recipe("seed: 0", "recipes/quickstart.yaml").recipe
    assert recipe == Recipe(run="runs/quickstart")
    assert (recipe.sft, recipe.eval_reward, recipe.online, recipe.examples, recipe.prompt_task) == (None,) * 5
    assert (recipe.oracle.objective.name, recipe.scores.scorer.name) == ("dpo", "log_ratio")
    assert (recipe.policy.selection.name, recipe.policy.objective.name) == ("top_fraction", "sepo")
    assert (recipe.data.source, recipe.data.eval, recipe.oracle.adapter) == ("builtin", 0.1, "inherit")
    assert (recipe.model.head_mlp, recipe.reward.objective.name) == (None, "plackett_luce")
    online = recipe_of("online: {}\nexamples: {source: a.jsonl}\n").online
    assert (online.objective.name, online.selection.name) == ("weighted_likelihood", "soft")
    assert (online.samples, online.every, online.until, online.restart) == (3, None, 0.5, "warm")
    assert (online.rollouts, online.sampling.temperature, online.sampling.top_k) == (64, 1.0, 0)


def test_every_key_has_a_description():
    assert [key for key, field in schema_fields() if not (field.description or "").endswith(".")] == []


def test_misspelled_key_names_the_right_one():
    full, wrongly = read_source(FULL, "full.yaml").values, []
    elsewhere = {key.rpartition(".")[2] for key in KEYS}
    for key in KEYS:
        *tables, last = key.split(".")
        siblings = {k.rpartition(".")[2] for k in KEYS if k.rpartition(".")[0] == ".".join(tables)}
        # One letter can turn a key into another valid one, as top_k into top_p, or into a key of another table.
        without_s = {name[:-1] for name in siblings - {last} if name.endswith("s")}  # then two are named
        for wrong in sorted(set(mutations(last)) - elsewhere - without_s - {""}):
            ((path, message, code),) = unknown_keys(renamed(full, (*tables, last), wrong))
            right = path == ".".join((*tables, wrong)) and message.endswith(f"Did you mean '{last}'?")
            if not right or code != "unknown-key":
                wrongly.append((key, wrong, message))
    assert not wrongly


def test_every_key_knows_its_line():
    rows, lines = FULL.splitlines(), parse_recipe(FULL, "full.yaml").lines
    for key in KEYS:
        assert f"{key.rpartition('.')[2]}:" in rows[(lines.line_of(key) or 0) - 1], key


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("seed: 1\noracle:\n  # how much\n  fractoin: 0.3\n", "oracle.fractoin", ["q.yaml:4", "'fraction'"]),
        ("sft: {zzz: 1}", "sft.zzz", ["training."]),
        ("online: {sample: 3}\n", "online.sample", ["'samples' or 'sampler'"]),
        ("oracle: {beta: 1}", "oracle.beta", ["oracle.objective."]),
        ("oracle: {learning_rate: 1}", "oracle.learning_rate", ["oracle.training."]),
        ("policy: {eval: 1}", "policy.eval", ["'eval' belongs to data."]),
        ("data: {seed: 1}", "data.seed", ["the top level"]),
        ("beta: 1", "beta", ["auxiliary_models.NAME.objective", "reward.objective", "online.objective"]),
    ],
)
def test_unknown_key_says_what_was_meant(text, key, words):
    error = error_of(text)
    assert (error.code, error.key) == ("unknown-key", key)
    assert all(word in str(error) for word in words), error


def test_every_problem_is_reported_in_the_order_of_the_file():
    for text, lines in (
        ("oracle:\n  fractoin: 1\nseeds: 1\nmodel:\n  nam: x\n", [2, 3, 5]),
        ("oracle: 1\nmodel: 2\nseed: x\n", [1, 2, 3]),
    ):
        found = [line.split(" ")[0] for line in str(error_of(text)).splitlines()]
        assert found == [f"q.yaml:{number}:" for number in lines]


@pytest.mark.parametrize(
    ("text", "key", "got", "allowed"),
    [
        ("oracle:\n  fraction: '0.1'", "oracle.fraction", "'0.1'", "> 0 and <= 1. Write it without quotes"),
        ("oracle:\n  fraction: 0", "oracle.fraction", "0", "a number > 0 and <= 1."),
        ("oracle: {fraction: true}", "oracle.fraction", "true", "a number"),
        ("data: {eval: 1}", "data.eval", "1", ">= 0 and < 1"),
        ("data: {limit: 1e3}", "data.limit", "1000.0", "a whole number >= 1 or null. Write 1000."),
        ("model:\n  packing: nnoe", "model.packing", "'nnoe'", "'none'"),
        ("oracle:\n  objective: dpo", "oracle.objective", "'dpo'", "Write {name: dpo}."),
        ("oracle: {objective: {name: 3}}", "oracle.objective", "{'name': 3}", "with a name"),
        ("data: {subset: no}", "data.subset", "false", "Put quotes"),
        ("model: {name: 1.10}", "model.name", "1.1", "quotes"),
        ("data: {columns: {a: 1}}", "data.columns", "{'a': 1}", "values are text"),
        ("data: {columns: 5}", "data.columns", "5", "values are text"),
        ("data: {source: [1]}", "data.source", "[1]", "text or a list of text"),
        ("oracle: {adapter: 3}", "oracle.adapter", "3", "inherit, a table or null"),
        ("scores: 3", "scores", "3", "a table"),
        ("policy: {training: [a]}", "policy.training", "['a']", "a table"),
        ("examples: {source: a, prompt: {opening}}", "examples.prompt", "{", '"{opening}"'),
        ("seed: null", "seed", "null", "a whole number >= 0"),
        ("auxiliary_models: {a: {fraction: 2}}", "auxiliary_models.a.fraction", "2", "<= 1"),
    ],
)
def test_wrong_value_is_shown_with_what_is_allowed(text, key, got, allowed):
    error = error_of(text)
    assert (error.code, error.key) == ("wrong-value", key)
    assert f"q.yaml:{text.count(chr(10)) + 1}: {key}: got {got}" in str(error)
    assert allowed in str(error)


@pytest.mark.parametrize(
    ("text", "line", "code", "words"),
    [
        ("a: b\n\tc: d", 2, "invalid-yaml", "spaces"),
        ("seed: 1\nmodel: {name: default\ndata: {}", 3, "invalid-yaml", "line 2, column 8"),
        ("seed: 1\nrun: [", 2, "invalid-yaml", ""),
        ("seed: 1\nrun: \x01", 2, "invalid-yaml", ""),
        ("seed: 1\n---\nseed: 2", 2, "invalid-yaml", "another document"),
        ("seed: !!python/object/apply:os.getcwd []", 1, "wrong-value", ""),
        ("seed: 1\nrun: !!python/name:os.getcwd", 2, "invalid-yaml", ""),
        ("seed: !!int abc", 1, "invalid-yaml", "'abc'"),
        ("run: !!timestamp 2024-01-01", 1, "invalid-yaml", "timestamp"),
        ("seed: 1\nmodel: {adapter: {r: .nan}}", 2, "not-finite", ".nan"),
        ("data: &loop {columns: *loop}", 1, "invalid-yaml", "nested"),
        ("? [a]\n: 1", 1, "invalid-yaml", "key"),
        ("- seed", 1, "not-a-table", "['seed']"),
        ("", None, "empty-recipe", ""),
        ("# only a comment\n", None, "empty-recipe", ""),
        ("oracle:\n  fraction: 0.1\n\n  fraction: 0.2\n", 4, "duplicate-key", "in oracle, first on line 2"),
        ("seed: 1\nseed: 1", 2, "duplicate-key", "first on line 1"),
    ],
)
def test_text_that_is_not_a_recipe_is_refused_with_its_line(text, line, code, words):
    error = error_of(text)
    assert error.code == code
    assert str(error).startswith("q.yaml: " if line is None else f"q.yaml:{line}: ")
    assert words in str(error)


def test_suggested_minimal_recipe_is_valid():
    assert recipe_of(str(error_of("")).partition(":\n")[2]) == Recipe(run="runs/q")


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-5", 1e-5), ("1E5", 1e5), ("-2e+3", -2e3), (".5", 0.5), ("3.", 3.0), ("1_000", 1000), ("-7", -7), ("010", "010"),
     ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("e5", "e5"), ("yes", True), ("off", False), ("~", None), ("'1e-5'", "1e-5")],
)  # fmt: skip
def test_scalars_avoid_the_traps_of_yaml(written, value):
    read = recipe_of(f"oracle: {{training: {{x: {written}}}}}").oracle.training["x"]
    assert (read, type(read)) == (value, type(value))


@LAWFUL
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers())
def test_numbers_are_read_as_python_writes_them(number):
    read = recipe_of(f"oracle: {{training: {{x: {number!r}}}}}").oracle.training["x"]
    assert (read, type(read)) == (number, type(number))


def test_strategy_no_is_a_word():
    text = "policy:\n  training: {eval_strategy: no, save_strategy: off, logging_strategy: steps, bf16: no}"
    assert recipe_of(text).policy.training == {
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "steps",
        "bf16": False,
    }
    assert recipe_of("seed: 1", "sft.training.eval_strategy=no").sft.training == {"eval_strategy": "no"}


def test_empty_table_has_its_defaults_and_a_table_without_a_name_the_default_one():
    text = "oracle:\ndata:\npolicy:\n  training:\n  selection:\nsft:\n"
    assert recipe_of(text) == Recipe(run="runs/q")
    recipe = recipe_of("oracle: {objective: {beta: 0.3}}", "policy.selection.fraction=0.5")
    assert recipe.oracle.objective == Named(name="dpo", arguments={"beta": 0.3})
    assert recipe.policy.selection == Named(name="top_fraction", arguments={"fraction": 0.5})


def test_values_know_their_origin():
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
    st.sampled_from([key for key in WHOLE if not key.startswith(FREE)]),
)
def test_file_overrides_the_default_and_set_overrides_the_file(in_file, in_set, key):
    # + 1, because most of these must be positive
    file = "seed: 0" if in_file is None else yaml.safe_dump(nested(key.split("."), in_file + 1))
    overrides = [] if in_set is None else [f"{key}={in_set + 1}"]
    found = origins(parse_recipe(file, "q.yaml", overrides))[key]
    if in_set is not None:
        assert found == (in_set + 1, "--set")
    elif in_file is not None:
        assert found == (in_file + 1, f"q.yaml:{key.count('.') + 1}")
    else:
        assert found[0] == origins(parse_recipe("run: runs/q", "q.yaml"))[key][0]


def test_the_last_override_wins_and_leaves_other_keys():
    assert recipe_of("seed: 1", "seed=2", "seed=3").seed == 3
    recipe = recipe_of(FULL, "policy.selection.fraction=0.5", "sft=null")
    assert recipe.policy.selection == Named(name="top_fraction", arguments={"fraction": 0.5})
    assert (recipe.policy.objective.arguments, recipe.sft) == ({"beta": 2}, None)


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("oracle.fractoin=1", "unknown-key", "--set oracle.fractoin: .*'fraction'"),
        ("orcle.fraction=1", "unknown-key", "--set orcle.fraction: .*'oracle'"),
        ("data.limit=x", "wrong-value", "--set data.limit: data.limit: got 'x'"),
        ("seed", "bad-override", "--set seed: "),
        ("oracle..x=1", "bad-override", r"--set oracle\.\.x=1: "),
        ("seed.x=3", "bad-override", "--set seed.x=3: .*'x'"),
        ("model.adapter={a: 1, a: 2}", "duplicate-key", "--set model.adapter:1: "),
        ("data.limit={", "invalid-yaml", "--set data.limit:1: "),
    ],
)
def test_wrong_override_is_refused_by_its_own_name(override, code, message):
    error = error_of("seed: 1", override)
    assert error.code == code
    assert re.match(message, str(error))


def test_later_checks_can_name_the_place_of_a_key():
    text = "oracle:\n  objective:\n    name: dpo\n    betta: 1\n"
    lines = parse_recipe(text, "q.yaml", ["policy.objective.gama=1"]).lines
    assert (lines.line_of("oracle.objective.betta"), lines.line_of("oracle.fraction")) == (4, None)
    assert lines.where("oracle.objective.betta") == "q.yaml:4"
    assert lines.where("oracle.objective.other") == "q.yaml:2"
    assert lines.where("scores.scorer") == "q.yaml"
    assert lines.where("policy.objective.gama") == "--set policy.objective.gama"
    assert lines.where("policy.objective") == "--set policy.objective.gama"
    overrides = ["oracle.objective.betta=1", "oracle.objective.lss=2", "sft.a=1", "sft={training: {}}"]
    lines = parse_recipe("seed: 1\noracle:\n  objective: {name: dpo}\n", "q.yaml", overrides).lines
    both = "q.yaml:3 with --set oracle.objective.betta and --set oracle.objective.lss"
    assert (lines.where("oracle.objective"), lines.where("oracle.objective.name")) == (both, "q.yaml:3")
    assert lines.where("sft") == "--set sft"
    lines = parse_recipe("seed: 1", "q.yaml", ["sft={training: {}}", "sft.training.x=1"]).lines
    assert lines.where("sft.training.x") == "--set sft.training.x"
    lines = parse_recipe("sft:\n  training: &t\n    max_steps: 1\noracle:\n  training: *t\n", "q.yaml").lines
    assert (lines.where("oracle.training.max_steps"), lines.where("oracle.training")) == (
        "q.yaml:3",
        "q.yaml:5",
    )


def test_renamed_key_is_refused_with_its_new_name():
    for old, new in RENAMED.items():
        written = old.replace(ANY_NAME, "x")
        error = error_of(yaml.safe_dump(nested(written.split("."), None)))
        assert error.code == "renamed-key"
        assert f"'{written}' was renamed to {new}." in str(error)
        assert any(f".{key}".endswith(f".{new.partition(',')[0]}") for key in KEYS)
    message = str(error_of("guidance:\n  reward_looks: 3\nextra: 1\ndata: {held_out: 0.1}\n"))
    assert [line[:8] for line in message.splitlines()] == ["q.yaml:1", "q.yaml:2", "q.yaml:4"]


def test_eval_rows_are_a_share_or_a_table():
    assert recipe_of("data: {eval: 0.2}").data.eval == 0.2
    assert recipe_of("data: {eval: {split: test}}").data.eval == EvalTable(split="test")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_recipe_file_is_read_with_or_without_a_byte_order_mark(tmp_path, encoding):
    path = tmp_path / "mein-lauf.yaml"
    path.write_text("model: {name: größe}\n", encoding=encoding)
    loaded = load_recipe(path, ["seed=5"])
    assert (loaded.recipe.model.name, loaded.recipe.seed, loaded.recipe.run) == ("größe", 5, "runs/mein-lauf")
    assert loaded.lines.where("model") == f"{path}:1"


def test_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/quickstart.yaml").write_text("seed: 1")
    (tmp_path / "a.yaml").write_bytes(b"seed: \xff")
    for path, code, words in (
        ("recipes/quikstart.yaml", "missing-file", "Did you mean recipes/quickstart.yaml?"),
        ("quikstart.yaml", "missing-file", "Did you mean recipes/quickstart.yaml?"),
        ("recipe/quickstart.yaml", "missing-file", "Did you mean recipes/quickstart.yaml?"),
        ("zzz", "missing-file", "a.yaml or quickstart.yaml."),
        ("recipes", "missing-file", "is a folder"),
        ("a.yaml", "not-utf8", "byte 6"),
    ):
        with pytest.raises(UserError) as caught:
            load_recipe(path)
        assert caught.value.code == code
        assert words in str(caught.value)


def training_error(written):
    recipe, lines = parse_recipe(f"sft:\n  training: {written}", "q.yaml")
    with pytest.raises(UserError) as caught:
        check_training(recipe.sft.training, "sft.training", lines)
    return caught.value


def test_unknown_training_fields_are_refused_with_their_lines():
    error = training_error("\n    learning_rte: 1\n    output_dir: x\n    max_steps: 3\n    zzz: 1\n")
    assert (error.code, error.key) == ("unknown-key", "sft.training.learning_rte")
    words = ("q.yaml:3: .*'learning_rate'", "q.yaml:4: .*output_dir", "q.yaml:6: .*'zzz'")
    assert all(re.match(*both) for both in zip(words, str(error).splitlines(), strict=True))


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("learning_rate: fast", "learning_rate: got 'fast'.*>= 0"),
        ("learning_rate: -1", "learning_rate: got -1.*>= 0"),
        ("learning_rate: '1e-5'", "learning_rate: got '1e-5'.*without quotes"),
        ("max_steps: many", "max_steps: got 'many'.*whole number"),
        ("max_steps: null", "max_steps: got null.*default"),
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
def test_values_of_training_fields_are_checked(written, words):
    error = training_error(f"{{{written}}}")
    assert (error.code, error.key) == ("wrong-value", f"sft.training.{written.partition(':')[0]}")
    assert re.match(f"q.yaml:2: sft.training.{words}", str(error))


ACTIVE = """
per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs optim weight_decay
gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing gradient_checkpointing torch_compile
torch_compile_backend torch_compile_mode logging_strategy logging_first_step logging_nan_inf_filter log_level disable_tqdm report_to
eval_strategy save_strategy save_total_limit full_determinism seed data_seed dataloader_drop_last dataloader_num_workers
dataloader_pin_memory train_sampling_strategy debug prediction_loss_only tokens_per_forward disable_dropout checkpoint_minutes
displacement_margin log_entropy fsdp deepspeed ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
ddp_backend ddp_timeout
"""
"""Fields that do what transformers, or tokenward's own arguments, document."""


def test_every_field_of_the_training_arguments_is_classified():
    """A new version of transformers with another field fails here: decide what a recipe can do with it."""
    groups = [ACTIVE.split(), OURS.keys(), CANNOT_ACT.keys(), BESIDE.keys(), set(BY_OPTIMIZER)]
    assert sum(map(len, groups)) == len(set().union(*groups))
    fields = {field.name for field in dataclasses.fields(TokenTrainingArguments) if field.init}
    assert set().union(*groups) == fields


def test_valid_training_fields_pass():
    recipe, lines = parse_recipe(
        "sft: {training: {learning_rate: 1, num_train_epochs: 2, warmup_steps: 0.1, bf16: yes, max_steps: 3, "
        "eval_strategy: no, save_strategy: best, lr_scheduler_type: cosine, optim: adamw_torch, report_to: [wandb], "
        "gradient_checkpointing: true, gradient_checkpointing_kwargs: {use_reentrant: false}, tf32: true, "
        "optim_args: null, deepspeed: zero3.json, fsdp: true, fsdp_config: {version: 2}, ddp_timeout: 60, debug: '', logging_steps: 5, eval_steps: null, save_total_limit: 2}}",
        "q.yaml",
    )
    check_training(recipe.sft.training, "sft.training", lines)


EXAMPLES = "examples: {source: a.jsonl, references: b}"
TASK = "prompt_task: {train: a.tsv, development: b.tsv, test: c.tsv, verbalizers: [a, b]}"
SOURCE = "online: {source: {name: rouge}}"


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        (EXAMPLES, 1, "examples"),
        (TASK, 1, "prompt_task"),
        ("data: {eval: {limit: 3}}", 1, "data.eval"),
        (f"{EXAMPLES}\ndata: {{source: c.jsonl}}\n{SOURCE}", 2, "data"),
        (f"{EXAMPLES}\n{SOURCE}\npolicy: {{objective: {{name: sepo}}}}", 3, "policy"),
        (f"{EXAMPLES}\n{SOURCE}\nscores: {{scorer: {{name: random}}}}", 3, "scores.scorer"),
        (f"{TASK}\n{SOURCE}", 2, "online.source"),
        (f"{EXAMPLES}\nreward: {{head: {{hidden: 4}}}}\nonline: {{reward: r}}", 2, "reward"),
        (f"{EXAMPLES}\nonline: {{reward: r, samples: 3}}", 2, "online.samples"),
        (f"{EXAMPLES}\nonline: {{reward: r, source: {{name: rouge}}}}", 2, "online.source"),
        (f"{TASK}\nonline: {{}}\nevaluation: {{metrics: [vader]}}", 3, "evaluation.metrics"),
    ],
)
def test_keys_without_effect_are_refused(text, line, key):
    with pytest.raises(UserError) as caught:
        check_unused(parse_recipe(text, "q.yaml"))
    assert (caught.value.code, caught.value.key) == ("unused-key", key)
    assert str(caught.value).startswith(f"q.yaml:{line}: ")


@pytest.mark.parametrize(
    "text",
    [
        "data: {source: a.jsonl}",
        f"{EXAMPLES}\n{SOURCE}\ndata:\noracle: {{}}\neval_reward:\nscores: {{precision: bfloat16}}",
        f"{TASK}\nonline: {{source: null}}\nevaluation: {{bootstrap: 9, metrics: []}}",
    ],
)
def test_empty_tables_count_as_absent(text):
    check_unused(parse_recipe(text, "q.yaml"))


def test_config_and_artifacts_do_not_import_torch():
    program = (
        "import sys, tokenward.config, tokenward.artifacts\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_recipe_is_bounded() -> None:
    """A text of a few hundred characters may stand for millions of values, or nest until Python's stack ends."""
    laughs = "a0: &a0 [" + ", ".join("x" * 9) + "]\n"
    laughs += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
    for text, code in (
        (laughs, "too-large"),
        ("a: " + "[" * 3000, "invalid-yaml"),
        ("- " * 3000, "invalid-yaml"),
        ("a: &a {b: *a}", "invalid-yaml"),
        ("seed: " + "9" * 400, "out-of-range"),
        ("a: !!bool maybe", "invalid-yaml"),
        ("a: " + "x" * 1_000_001, "too-large"),
    ):
        with pytest.raises(UserError) as caught:
            parse_recipe(text, "recipe.yaml")
        assert caught.value.code == code, text[:20]
