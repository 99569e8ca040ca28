"""Two runs on the same rows: differences paired by row, rows that changed sides, and what cannot be compared."""

import json
import shutil
from pathlib import Path

import pytest

import tokenward
from tests.manifests import rewritten
from tokenward.artifacts.files import canonical
from tokenward.config import parse_recipe
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.evaluation.measures import read_row_values
from tokenward.tools.compare import Flip, colour_tokens, compare_runs, mark_changes, show_comparison
from tokenward.tools.export import model_card
from tokenward.tools.finished import finished_model, recipe_changes

RUN = Path("runs/quickstart")


def edit(folder: Path, change) -> None:
    """Rewrite each line of an evaluation's values by row."""
    path = folder / "evaluation" / "rows.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))
    rewritten(path.parent)


def test_means_by_row_are_the_figures(finished_run: Path) -> None:
    values = read_row_values(finished_run / RUN / "evaluation")
    figures = json.loads((finished_run / RUN / "evaluation" / "metrics.json").read_text())
    for name in (
        "preference/margin",
        "likelihood/margin_after",
        "vader/change",
        "length/after",
        "kl/per_token",
    ):
        found = [row[name] for row in values.values() if name in row]
        assert sum(found) / len(found) == pytest.approx(figures[name]["value"])
        assert len(found) == figures[name]["n"]


def test_a_known_difference_is_found_and_shown(copied_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path("runs/other")
    shutil.copytree(RUN, other)
    rows = read_row_values(RUN / "evaluation")
    margins = {key.key: row["preference/margin"] for key, row in rows.items() if "preference/margin" in row}
    turned, margin = next(iter(margins.items()))

    def change(line: dict) -> dict:
        if line["key"] == turned:
            line["values"]["preference/margin"] *= -1
        return line

    edit(other, change)
    found = compare_runs(RUN / "policy", other)
    assert not any(item.name.endswith("/before") for item in found.figures), "both start from one model"
    item = next(item for item in found.figures if item.name == "preference/margin")
    assert item.difference.value == pytest.approx(-2 * margin / len(margins))
    assert (item.higher + item.lower, item.equal) == (1, len(margins) - 1)
    (flip,) = found.flips
    assert (flip.first, flip.second) == (margin, -margin)
    assert found.settings == []
    shown = found.as_json()
    assert shown["figures"]["preference/margin"]["difference"]["n"] == len(margins)
    assert shown["flipped"] == [
        {"kind": "pair", "key": turned, "figure": "preference/margin", "first": margin, "second": -margin}
    ]
    show_comparison(Display(), found, 1)
    assert "chosen, scores of A and B:" in capsys.readouterr().out
    # Scores of an online scorer are not stored; built-in ones are shown instead.

    def online(manifest: dict) -> dict:
        manifest["settings"]["scores"]["scorer"] = {"name": "probability", "of": "policy"}
        return manifest

    rewritten(other / "policy", online)
    show_comparison(Display(), found, 1)
    assert "chosen, scores of" in capsys.readouterr().out


def leaves(value, path=()):
    """Every value of a recipe with its key, also in tables inside lists."""
    if isinstance(value, dict) and value:
        return [found for key, inner in value.items() for found in leaves(inner, (*path, key))]
    return [(path, value)]


def with_leaf(recipe: dict, path: tuple[str, ...], value) -> dict:
    changed = json.loads(json.dumps(recipe))
    table = changed
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    return changed


FULL = """
sft: {training: {learning_rate: 1.0e-5, max_steps: 2}}
eval_reward: {fraction: 0.2, objective: {name: dpo, beta: 0.1}, training: {max_steps: 2}}
auxiliary_models:
  good: {model: m, prompt: "Well. {prompt}", training: {max_steps: 2}, objective: {name: sft}, fraction: 0.5,
    subset: {scorer: {name: log_ratio}, side: chosen, fraction: 0.1}}
scores: {scorer: {name: combine, how: sum, parts: [{scorer: {name: rank}, steps: [{top: {fraction: 0.3}}]}]}}
policy: {selection: {name: top_fraction, chosen: {fraction: 0.4}}, objective: {name: sum, terms: [{name: dpo}]}}
examples: {source: x.jsonl, prompt: "{a}", references: b}
prompt_task: {train: a.jsonl, development: b.jsonl, test: c.jsonl, verbalizers: [a, b]}
online: {source: {name: rouge}, every: 3}
reward: {head: {hidden: 16}, training: {max_steps: 3}}
"""
FULL_RECIPE = parse_recipe(FULL, "full.yaml")[0].model_dump(mode="json")


def test_every_recipe_value_that_differs_is_named(tmp_path):
    """Only the folder of the run does not count."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        (folder / "evaluation").mkdir(parents=True)
        (folder / "evaluation" / "recipe.json").write_text(json.dumps(FULL_RECIPE))
    every = leaves(FULL_RECIPE)
    assert len(every) > 100
    for path, value in every:
        changed = with_leaf(FULL_RECIPE, path, ["other"])
        (folders[1] / "evaluation" / "recipe.json").write_text(json.dumps(changed))
        line = f'{".".join(path)}: {json.dumps(canonical(value))} -> ["other"]'
        assert recipe_changes(folders) == ([] if path == ("run",) else [line])


def test_an_evaluation_keeps_the_whole_recipe(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished_run)
    run = tokenward.open_run("recipes/quickstart.yaml", quiet=True)
    kept = json.loads((RUN / "evaluation" / "recipe.json").read_text())
    assert kept == run.recipe.model_dump(mode="json")
    assert {path[0] for path, _ in leaves(kept)} == set(type(run.recipe).model_fields)


AUXILIARY = [
    "auxiliary_models={good: {objective: {name: sft}, training: {max_steps: 2}}, other: {prompt: 'So. {prompt}'}}",
    "scores.scorer={name: log_ratio, numerator: good, denominator: other}",
]


def test_settings_of_auxiliary_models_are_on_the_card_while_a_scorer_reads_them(copied_run: Path) -> None:
    def card(*changes: str) -> str:
        run = tokenward.run(copied_run, ["policy.training.max_steps=1", *changes], last="policy", quiet=True)
        return model_card(finished_model(str(run.folder)), "m", merged=False)

    shown = card(*AUXILIARY)
    for words in ("auxiliary-good:", "max_steps: 2", "So. {prompt}"):
        assert words in shown
    assert "auxiliary-good" not in card("scores.scorer={name: surprisal}", "policy.selection={name: all}")


def test_what_cannot_be_compared_is_refused(copied_run: Path) -> None:
    other = Path("runs/other")
    shutil.copytree(RUN, other)

    def code(second: Path) -> str:
        with pytest.raises(UserError) as error:
            compare_runs(RUN, second)
        return error.value.code

    edit(other, lambda line: {**line, "key": line["key"] + "x"} if line["kind"] == "prompt" else line)
    assert code(other) == "different-rows"
    shutil.copy(RUN / "evaluation" / "rows.jsonl", other / "evaluation" / "rows.jsonl")
    rewritten(other / "evaluation")
    template = other / "policy" / "model" / "chat_template.jinja"
    written = template.read_text()
    template.write_text(written + " ")
    rewritten(other / "policy")
    assert code(other) == "tokenizer-mismatch"
    template.write_text(written)
    rewritten(other / "policy")
    (other / "evaluation" / "recipe.json").unlink()
    rewritten(other / "evaluation")
    assert code(other) == "missing-file"
    assert code(Path("nowhere")) == "not-a-run"
    (other / "evaluation" / "rows.jsonl").unlink()
    rewritten(other / "evaluation")
    with pytest.raises(UserError, match=r"rows.jsonl"):
        compare_runs(RUN, other)


def test_online_runs_compare_by_prompt(copied_online: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = Path("runs/online"), Path("runs/other")
    shutil.copytree(one, other)
    edit(other, lambda line: {**line, "values": {name: value + 1 for name, value in line["values"].items()}})
    found = compare_runs(one, other)
    assert {item.name: item.difference.value for item in found.figures}["rouge1/after"] == pytest.approx(1.0)
    rows = read_row_values(one / "evaluation")
    assert all(row.kind == "prompt" for row in rows)
    flip = Flip(next(iter(rows)), "rouge1/change", 0.5, -0.5)
    show_comparison(Display(), found._replace(flips=[flip]), 1)
    assert "A: " in capsys.readouterr().out


def test_colours_and_changed_words() -> None:
    styles = {str(span.style) for span in colour_tokens(["good", " so", " bad"], [2.0, 0.01, -1.0]).spans}
    assert styles == {"blue underline", "dark_orange"}
    line = mark_changes("a good cup of tea", "a bad cup of tea")
    assert str(line) == "a bad cup of tea"
    assert [str(line)[span.start : span.end] for span in line.spans if span.style == "bold"] == ["bad "]
