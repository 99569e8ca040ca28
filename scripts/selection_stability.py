"""Do two or more scorings of the same responses select the same tokens?

    python scripts/selection_stability.py runs/a runs/b runs/c --fraction 0.3
    python scripts/selection_stability.py runs/a --again precision=bfloat16 --again tokens_per_batch=512 --limit 100

Each folder is a run, or its scores. The first is compared with every other one. With ``--again``, it is also compared with
new scores of the same texts by its own oracle in another precision or batch shape, so that only rounding differs.
End-of-turn tokens are excluded. Prints a Markdown table.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tokenward
from tokenward.artifacts import read_jsonl
from tokenward.evaluation.credit import Scores, stability_figures
from tokenward.evaluation.statistics import Figure
from tokenward.plugins import build
from tokenward.scoring.join import scores_of
from tokenward.scoring.scorers import SCORERS, Scorer
from tokenward.scoring.store import TokenStore
from tokenward.tokens.rows import response_key


def stored(folder: Path, scorer: Scorer) -> dict[str, list[float]]:
    """Scores of every response in a run's store."""
    place = folder / "scores" if (folder / "scores").is_dir() else folder
    store = TokenStore(place)
    if not len(store):
        raise tokenward.UserError(
            f"{place} has no scores (tokens-*.parquet). Name a run whose scores stage has finished."
        )
    found = {}
    for key in store:
        record = store[key]
        values = scores_of(scorer, record).tolist()
        found[key] = [
            value for value, start, end in zip(values, record.start, record.end, strict=True) if end > start
        ]
    return found


def texts_of(run: Path) -> Iterator[tuple[Sequence, str]]:
    """Prompt and response of every row of a run's data."""
    for part in ("train", "eval"):
        path = run / "data" / f"{part}.jsonl"
        for row in read_jsonl(path):
            for response in row["responses"]:
                yield row["prompt"], response


def scored_again(run: Path, setting: str, wanted: Scores, limit: int | None) -> dict[str, list[float]]:
    """Scores of some of a run's responses by its oracle, with one setting changed."""
    name, _, value = setting.partition("=")
    scorer = tokenward.TokenScorer.load(run / "oracle")
    tokens = 8192
    if name == "precision" and value in ("float32", "bfloat16"):
        scorer.precision = value
    elif name == "tokens_per_batch" and value.isdigit():
        tokens = int(value)
    else:
        raise tokenward.UserError(
            f"--again {setting}: write precision=float32, precision=bfloat16, or tokens_per_batch=512."
        )
    texts = {response_key(prompt, text): (prompt, text) for prompt, text in texts_of(run)}
    keys = [key for key in sorted(texts) if key in wanted][:limit]
    found = scorer.score_all([texts[key] for key in keys], tokens_per_batch=tokens)
    return {
        key: [token.score for token in response.tokens if token.end > token.start]
        for key, response in zip(keys, found, strict=True)
    }


def table(rows: Mapping[str, Mapping[str, Figure]]) -> str:
    """Markdown table with a row per comparison."""
    names = next(iter(rows.values()))
    lines = [f"| | {' | '.join(names)} | responses |", "|---|" + "---|" * (len(names) + 1)]
    for label, figures in rows.items():
        cells = [f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]" for figure in figures.values()]
        lines.append(f"| {label} | {' | '.join(cells)} | {figures['jaccard/top'].n} |")
    return "\n".join(lines)


def main() -> None:
    """Compare the runs and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--fraction", type=float, default=0.3)
    parser.add_argument("--scorer", default="log_ratio", choices=sorted(SCORERS))
    parser.add_argument("--again", action="append", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--limit", type=int, help="number of responses to score again")
    arguments = parser.parse_args()
    scorer = build("scorer", arguments.scorer, {}, SCORERS)
    first, *others = arguments.folders
    base = stored(first, scorer)
    others = {str(folder): stored(folder, scorer) for folder in others}
    others |= {setting: scored_again(first, setting, base, arguments.limit) for setting in arguments.again}
    rows = {
        label: stability_figures(base, scores, fraction=arguments.fraction)
        for label, scores in others.items()
    }
    if not rows:
        parser.error("there is nothing to compare with. Name a second folder, or use --again")
    print(
        f"Selected {arguments.fraction:.0%} of each response's tokens in {first}, compared with:\n\n{table(rows)}"
    )


if __name__ == "__main__":
    main()
