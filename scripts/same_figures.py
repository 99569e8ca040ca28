"""Record every figure and artifact of small runs, and compare them before and after a change that must not change any.

    python -m scripts.same_figures record before.json            # on the old commit
    python -m scripts.same_figures record after.json             # on the new one
    python -m scripts.same_figures compare before.json after.json

The runs are one recipe per method on a tiny model, recipes of other shapes, and, with ``--model``, a shortened quick
start. Weights and scores are compared by a hash of their bits, figures by their text. Manifests are excluded, because
they contain setting names, and so are values that depend on the clock.
"""

import argparse
import contextlib
import hashlib
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file

import tokenward
from tests.stages.runs import EXAMPLES, PROMPTS, plugin, write_examples, write_labelled
from tests.tiny import TINY_RECIPE, planted_rows, save_tiny, tiny_t5
from tokenward.methods import all_methods

TRAINING = {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "max_steps": 3}
WITHOUT_CLOCK = (
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "seconds",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "comparisons_per_second",
    "tokens_per_second",
    "peak_memory_gb",
)
OF_THE_FOLDER = ("base_model_name_or_path", "target_modules", "base")
"""Values with paths of a temporary folder, and a set without a fixed order."""

VERIFIER = "def right(prompts, completions):\n    return [float(len(text) % 3) for text in completions]\n"

SAME_NAME: dict[str, str] = {
    "held_out.jsonl": "eval.jsonl",
    "expert-": "auxiliary-",
    "picks.jsonl": "subset.jsonl",
    "guidance/": "online/",
    "referee": "eval_reward",
}
"""Names of files and figures in older commits, and their current names."""

Recipe = dict[str, Any]


def base(model: Path) -> Recipe:
    """The tests' recipe for a tiny model, with the whole evaluation."""
    return yaml.safe_load(TINY_RECIPE.format(model=model))


def of_methods(model: Path) -> Iterator[tuple[str, Recipe]]:
    """A recipe per method."""
    verifier = plugin(VERIFIER)
    for name, method in all_methods().items():
        text = method.body.replace("my_module:is_correct", f"{verifier}:right")
        body = yaml.safe_load(text.replace("LOW", "-0.5").replace("HIGH", "1.5"))
        recipe = base(model)
        recipe["oracle"] |= body.get("oracle", {})
        policy = {"training": recipe["policy"]["training"]}
        recipe |= body | {"oracle": recipe["oracle"], "policy": policy | body.get("policy", {})}
        for table in recipe.get("auxiliary_models", {}).values():
            if "training" in table:
                table["training"] = dict(TRAINING)
            if "subset" in table:
                table["subset"]["fraction"] = 0.4
        yield name, recipe


def of_shapes(model: Path, encoder: Path) -> Iterator[tuple[str, Recipe]]:
    """Recipes with every stage, adapters, other layouts, selections and scorers, and online runs."""

    def changed(**tables: Any) -> Recipe:
        recipe = base(model)
        for name, table in tables.items():
            recipe[name] = {**recipe.get(name, {}), **table} if isinstance(table, dict) else table
        return recipe

    evaluated = {"training": {**TRAINING, "eval_strategy": "steps", "eval_steps": 2}}
    yield (
        "every_stage",
        changed(
            sft={"training": TRAINING},
            eval_reward={"fraction": 0.4, "training": TRAINING},
            oracle=evaluated,
            policy=evaluated,
            fixed_prompts=2,
        ),
    )
    yield "adapter", changed(model={"adapter": {"r": 2, "target_modules": ["q_proj", "v_proj"]}})
    yield "separate", changed(model={"packing": "none"}, data={"pairs": "all"})
    yield "pairs_by_gap", changed(data={"pairs": "adjacent", "min_gap": 0.5}, oracle={"fraction": 0.6})
    yield (
        "over_the_step",
        changed(
            policy={"selection": {"name": "top_fraction", "scope": "batch", "chosen": {"fraction": 0.5}}},
        ),
    )
    yield "over_all", changed(policy={"selection": {"name": "threshold", "scope": "dataset"}})
    yield (
        "online",
        changed(scores={"scorer": {"name": "log_ratio", "numerator": "policy", "denominator": "oracle"}}),
    )
    yield "reward_scores", changed(scores={"scorer": {"name": "reward"}}, reward={"training": TRAINING})
    yield "spans", changed(scores={"scorer": {"name": "spans"}}, policy={"objective": {"name": "dpo"}})
    yield "truncated", changed(tokens={"max_response_tokens": 12, "too_long": "truncate"})
    yield (
        "listwise",
        changed(policy={"objective": {"name": "weighted_likelihood"}, "selection": {"name": "all"}}),
    )
    yield "encoder", changed(model={"name": str(encoder)})
    alone = {
        "data": {"source": "alone.jsonl", "eval": 0.3},
        "evaluation": {"prompts": 2, "bootstrap": 20},
    }
    yield (
        "alone",
        changed(**alone, policy={"objective": {"name": "kto"}, "selection": {"name": "all"}})
        | {"scores": {"scorer": {"name": "surprisal"}}},
    )
    for name, text in (("examples", EXAMPLES), ("prompts", PROMPTS)):
        yield f"sampled_{name}", yaml.safe_load(text.format(model=model))
    reinforced = yaml.safe_load(EXAMPLES.format(model=model))
    reinforced["online"] |= {"objective": {"name": "reinforce"}}
    yield "sampled_reinforce", reinforced


def quick(model: str) -> Recipe:
    """The built-in reviews, cut short."""
    recipe = yaml.safe_load(Path("recipes/reviews.yaml").read_text(encoding="utf-8"))
    recipe["model"] = {**recipe.get("model", {}), "name": model}
    recipe["data"]["limit"] = 90
    for table, steps in (("oracle", 2), ("policy", 2), ("eval_reward", 1)):
        recipe[table]["training"] |= {"max_steps": steps, "warmup_steps": steps - 1}
    recipe["evaluation"] |= {"prompts": 6, "max_new_tokens": 12, "bootstrap": 50}
    return recipe | {"fixed_prompts": 0}


def figures_of(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and content of everything in a run's folder, except what the module excludes."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        kept = path.is_file() and not any(
            part.startswith((".", "encoded", "report", "pairs")) for part in name.split("/")
        )
        if kept and (read := READERS.get(path.suffix)) and path.name not in ("manifest.json", "recipe.json"):
            yield from ((f"{name}: {part}", value) for part, value in read(path))
        elif kept and path.name == "manifest.json":
            facts = json.loads(path.read_text(encoding="utf-8"))["facts"]
            figures = {
                key: facts[key]
                for key in ("steps", "rows", "train_loss", "kept", "responses")
                if key in facts
            }
            yield from ((f"{name}: {key}", json.dumps(value)) for key, value in figures.items())


def _tensors(path: Path) -> Iterator[tuple[str, str]]:
    for name, tensor in sorted(load_file(path).items()):
        bits = hashlib.sha256(tensor.contiguous().view(-1).numpy().tobytes()).hexdigest()[:16]
        yield name, f"{tensor.dtype} {list(tensor.shape)} {bits}"


def _parquet(path: Path) -> Iterator[tuple[str, str]]:
    table = pq.read_table(path)
    for name in table.column_names:
        content = repr(table.column(name).to_pylist()).encode()
        yield name, hashlib.sha256(content).hexdigest()[:16]


def _json(path: Path) -> Iterator[tuple[str, str]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in content.items() if isinstance(content, dict) else enumerate(content):
        if name not in OF_THE_FOLDER:
            yield str(name), json.dumps(value)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        content = json.loads(line)
        yield str(number), json.dumps({key: content[key] for key in content if key not in WITHOUT_CLOCK})


READERS: Mapping[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    ".safetensors": _tensors,
    ".parquet": _parquet,
    ".json": _json,
    ".jsonl": _lines,
}


def record(out: Path, only: str, model: str | None) -> None:
    """Run the recipes and write their values. Runs that are already in the file are skipped."""
    out, root = out.resolve(), Path.cwd()
    found: dict[str, dict[str, str]] = json.loads(out.read_text()) if out.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(temporary):
        sys.path.insert(0, temporary)
        folder = Path(temporary)
        tiny, encoder = save_tiny(folder / "tiny"), save_tiny(folder / "t5", tiny_t5())
        _write_data(folder)
        recipes = [*of_methods(tiny), *of_shapes(tiny, encoder)]
        if model is not None:
            with contextlib.chdir(root):
                recipes.append(("quick", quick(model)))
        for name, recipe in recipes:
            if only in name and name not in found:
                found[name] = _left_by(name, recipe)
                out.write_text(json.dumps(found, indent=1))
                print(f"{name}: {len(found[name])} values", flush=True)


def _write_data(folder: Path) -> None:
    rows = planted_rows(24)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = [
        {"prompt": row["prompt"], "completion": row["responses"][number % 3], "label": number % 3 == 0}
        for number, row in enumerate(rows)
    ]
    (folder / "alone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alone))
    write_examples(folder / "examples.jsonl")
    write_labelled(folder)


def _left_by(name: str, recipe: Recipe) -> dict[str, str]:
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump({**recipe, "run": f"runs/{name}"}))
    try:
        run = tokenward.run(path, quiet=True)
    except tokenward.UserError as error:
        return {"refused": str(error)}
    except Exception:  # a failure is recorded too, and the other runs continue
        return {"failed": traceback.format_exc()}
    return dict(figures_of(run.folder))


def compare(before: Path, after: Path) -> int:
    """Print all differences. Returns 0 if there are none."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    same = differ = 0
    for run in sorted(old.keys() | new.keys()):
        one, other = (
            {renamed(key): comparable(renamed(value)) for key, value in found.get(run, {}).items()}
            for found in (old, new)
        )
        keys = sorted(key for key in one.keys() | other.keys() if not key.endswith(OF_THE_FOLDER))
        wrong = [key for key in keys if one.get(key) != other.get(key)]
        same, differ = same + len(one) - len(wrong), differ + len(wrong)
        for key in wrong[:8]:
            print(f"{run}: {key}\n   before {str(one.get(key))[:300]}\n   after  {str(other.get(key))[:300]}")
        if len(wrong) > 8:
            print(f"{run}: and {len(wrong) - 8} more")
    print(f"{same} values are equal, {differ} are not")
    return int(differ > 0)


def comparable(value: str) -> str:
    """A value without the parts that depend on the clock, or on the folder of the checkout."""
    value = re.sub(r'"/[^"]*?/src/tokenward/', '"src/tokenward/', value)
    if not value.startswith("{"):
        return value
    return json.dumps({key: item for key, item in json.loads(value).items() if key not in WITHOUT_CLOCK})


def renamed(text: str) -> str:
    """A name or value of an older commit with current names."""
    for old, new in SAME_NAME.items():
        text = text.replace(old, new)
    return text


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    recorder = verbs.add_parser("record")
    recorder.add_argument("out", type=Path)
    recorder.add_argument("--only", default="", help="only runs whose name contains this")
    recorder.add_argument("--model", help="also run a shortened quick start with this model")
    comparer = verbs.add_parser("compare")
    comparer.add_argument("before", type=Path)
    comparer.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "compare":
        return compare(arguments.before, arguments.after)
    torch.set_num_threads(1)  # sums of several threads differ in their last bits
    record(arguments.out, arguments.only, arguments.model)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
