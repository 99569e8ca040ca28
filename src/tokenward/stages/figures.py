"""The figures of an evaluation: stored as JSON, read again, shown as tables."""

from tokenward.display import Display, interval, largest, rounded
from tokenward.evaluation.statistics import Figure, Figures, load_figures
from tokenward.stages.run import Run


def read_figures(run: Run) -> Figures:
    """The figures of a finished evaluation."""
    return load_figures(run.path("evaluation") / "metrics.json")


def show_figures(run: Run) -> None:
    """The closing tables of a run."""
    show_tables(run.display, read_figures(run), "figures on held-out data")


def show_tables(display: Display, figures: Figures, title: str) -> None:
    """Every figure that is no comparison under this title, then what changed from before to after."""
    changed = [name.removesuffix("/change") for name in figures if name.endswith("/change")]
    before_after = [_changed(figures, name) for name in changed]
    parts = {f"{name}/{part}" for name in changed for part in ("before", "after", "change")}
    others = [(name, *_shown(figure, figure.value)) for name, figure in figures.items() if name not in parts]
    columns = ("95 % interval", "n")
    if others:
        display.table(title, ("", "value", *columns), others)
    if before_after:
        display.table(
            "before and after, same prompts", ("", "before", "after", "change", *columns), before_after
        )


def _changed(figures: Figures, name: str) -> tuple[str, ...]:
    whole = [figures[f"{name}/{side}"].value for side in ("before", "after")]
    change = figures[f"{name}/change"]
    scale = largest([*whole, change.value])
    return name, *(rounded(value, scale) for value in whole), *_shown(change, scale)


def _shown(figure: Figure, scale: float) -> tuple[str, str, str]:
    return rounded(figure.value, scale), interval(figure.low, figure.high, figure.n, scale), str(figure.n)


def evaluation_statistics(run: Run) -> dict[str, int]:
    """Settings of every interval."""
    return {"resamples": run.recipe.evaluation.bootstrap, "seed": run.recipe.seed}
