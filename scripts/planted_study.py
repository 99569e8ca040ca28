"""Planted truth: rank sequences by a hidden token score, and see which aggregate finds it again.

    OMP_NUM_THREADS=1 python scripts/planted_study.py --seeds 3 --output docs/pictures --page docs/results.md

Groups of K sequences over 50 token types are ranked by the mean, the sum, the strongest or the worst of hidden
scores, or by whether one keyword is there; lengths are drawn on their own. A token reward model of two layers
learns from the ranks alone, once with every aggregate of TLM (arXiv 2306.00398). ``--tune`` prints what learning
rates and temperatures do on a seed that the study never uses.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast, PrinterCallback

from tokenward.evaluation.statistics import Figure, auroc, mean_figure
from tokenward.models.reward import RewardModel, RewardSettings, TokenRewardModule
from tokenward.objectives.listwise import PlackettLuce
from tokenward.scoring.values import token_values
from tokenward.tokens.encode import Encoded
from tokenward.tokens.rows import TokenRow
from tokenward.training.arguments import training_arguments
from tokenward.training.trainer import TokenTrainer
from tokenward.types import Comparison

TYPES, KEYWORDS, K = 50, 10, 5
SHORTEST, LONGEST = 5, 25
PROMPT = TYPES
TUNING_SEED = 1000
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class World(NamedTuple):
    """Token types with hidden scores, and a way to write and to judge a sequence.

    Attributes:
        scores: ``[types]``, the planted score of each.
        write: ``f(rng, length)`` gives the types of a sequence.
        judge: ``f(scores of the sequence)`` gives what sequences are ranked by.
    """

    scores: Floats
    write: Callable[[np.random.Generator, int], Ints]
    judge: Callable[[Floats], float]


def smooth(rng: np.random.Generator) -> World:
    """Every type has a normal score, every token is drawn alike, and the mean decides."""
    return World(
        rng.normal(size=TYPES),
        lambda draw, length: draw.integers(0, TYPES, length),
        lambda found: float(found.mean()),
    )


def positive(rng: np.random.Generator) -> World:
    """Every type has a score between 0 and 1, and they add up: long sequences are better."""
    return World(
        rng.random(TYPES),
        lambda draw, length: draw.integers(0, TYPES, length),
        lambda found: float(found.sum()),
    )


def graded(rng: np.random.Generator, sign: float) -> World:
    """Ten types have scores of 0.1 to 1.0 times ``sign``, the others 0; the one furthest from 0 decides.

    It is drawn first, or none is, and as strong or weaker ones are added, each number apart from the length, so
    that neither length nor the number of such tokens gives the rank away. Sequences without any are needed:
    if every one had a keyword, nothing would tell the weakest keyword from the other types.
    """
    marked = rng.permutation(TYPES)[:KEYWORDS]
    scores = np.zeros(TYPES)
    scores[marked] = sign * np.arange(1, KEYWORDS + 1) / KEYWORDS
    plain = np.flatnonzero(scores == 0)

    def write(draw: np.random.Generator, length: int) -> Ints:
        top = int(draw.integers(-1, KEYWORDS))
        if top < 0:
            return draw.choice(plain, length)
        some = marked[draw.integers(0, top + 1, int(draw.integers(0, 4)))]
        rest = draw.choice(plain, length - 1 - len(some))
        return draw.permutation(np.concatenate([[marked[top]], some, rest]))

    return World(scores, write, lambda found: float(sign * np.abs(found).max()))


def present(rng: np.random.Generator) -> World:
    """One type is the keyword; half of the sequences have it, one to three times."""
    keyword = int(rng.integers(TYPES))
    scores = np.zeros(TYPES)
    scores[keyword] = 1.0
    plain = np.flatnonzero(scores == 0)

    def write(draw: np.random.Generator, length: int) -> Ints:
        times = int(draw.integers(1, 4)) * int(draw.random() < 0.5)
        return draw.permutation(np.concatenate([np.full(times, keyword), draw.choice(plain, length - times)]))

    return World(scores, write, lambda found: float(found.max()))


WORLDS: dict[str, Callable[[np.random.Generator], World]] = {
    "mean": smooth,
    "sum": positive,
    "present": present,
    "keyword": lambda rng: graded(rng, 1.0),
    "worst": lambda rng: graded(rng, -1.0),
}


class Method(NamedTuple):
    """An aggregate with the settings that it was given; without attention a token's reward depends on it alone."""

    objective: PlackettLuce
    learning_rate: float = 1e-2
    bound: str = "softplus"
    attention: bool = True


def soft(aggregate: str, temperature: float, *, neutral: bool = False) -> Method:
    """A softmax or a softmin."""
    return Method(PlackettLuce(aggregate=aggregate, temperature=temperature, length_neutral=neutral))


SHARP = 0.1
METHODS = {
    "average": Method(PlackettLuce()),
    "sum": Method(PlackettLuce(aggregate="sum")),
    "sum, no bound": Method(PlackettLuce(aggregate="sum"), bound="none"),
    "softmax 2 (published)": soft("softmax", 2.0),
    "softmax 0.1": soft("softmax", SHARP),
    "softmax 0.1, neutral": soft("softmax", SHARP, neutral=True),
    "softmin 2 (published)": soft("softmin", 2.0),
    "softmin 0.1": soft("softmin", SHARP),
    "softmin 0.1, neutral": soft("softmin", SHARP, neutral=True),
}
OWN = {"mean": "average", "sum": "sum", "present": "softmax", "keyword": "softmax", "worst": "softmin"}
"""The aggregate that says what each case is ranked by; fixed before anything was measured."""
ALONE = {"mean": "average", "keyword": "softmax 0.1", "worst": "softmin 0.1"}
"""What the picture shows, and what is tried without attention too."""


class Sizes(NamedTuple):
    """How much data and training."""

    groups: int = 600
    held_out: int = 300
    steps: int = 200
    batch: int = 16
    width: int = 32
    k: int = K


class Cell(NamedTuple):
    """What one training gave, on held-out groups.

    Attributes:
        accuracy: ``[groups]``, share of a group's pairs in the right order.
        longer: ``[groups]``, share of a group's pairs of unlike lengths in which the longer one has the higher ``e``;
            equal values count half.
        learned: ``[n]``, reward of each token.
        planted: ``[n]``, its score.
        types: ``[n]``, its type.
        lengths: ``[r]``, tokens of each sequence.
    """

    accuracy: Floats
    longer: Floats
    learned: Floats
    planted: Floats
    types: Ints
    lengths: Ints


def groups(world: World, rng: np.random.Generator, count: int, k: int = K) -> list[TokenRow]:
    """Groups of ``k`` sequences, their planted scores beside them; groups without any order are drawn again."""
    rows: list[TokenRow] = []
    while len(rows) < count:
        found = [world.write(rng, int(rng.integers(SHORTEST, LONGEST + 1))) for _ in range(k)]
        values = np.array([world.judge(world.scores[ids]) for ids in found])
        ranks = np.unique(-values, return_inverse=True)[1]
        if ranks.max() == 0:
            continue
        name = f"group:{len(rows) + 1}"
        comparison = Comparison(
            key=name, prompt=(), responses=("",) * k, ranks=tuple(ranks.tolist()), source=name
        )
        encoded = Encoded(comparison, [PROMPT], [ids.tolist() for ids in found], [True] * k, 0)
        rows.append(TokenRow(encoded=encoded, scores=[torch.tensor(world.scores[ids]) for ids in found]))
    return rows


def reward_model(seed: int, *, width: int, bound: str = "softplus") -> RewardModel:
    """Two layers with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=TYPES + 2,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=PROMPT + 1,
        bos_token_id=None,
        eos_token_id=None,
    )
    settings = RewardSettings(hidden=2 * width, bound=bound)  # type: ignore[arg-type]
    words = {f"w{index}": index for index in range(TYPES)} | {"prompt": PROMPT, "pad": PROMPT + 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="pad")), pad_token="pad"
    )
    return RewardModel(
        model=TokenRewardModule(LlamaModel(config), settings),
        tokenizer=tokenizer,
        layout="shared",
        fingerprint="",
        name="planted",
    )


def without_attention(backbone: LlamaModel) -> None:
    """Let nothing flow from token to token, now and in training."""
    for layer in backbone.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        layer.self_attn.requires_grad_(False)


def train(model: RewardModel, method: Method, rows: Sequence[TokenRow], sizes: Sizes, seed: int) -> None:
    """Learn the token reward from the ranks of groups."""
    table: dict[str, Any] = {
        "learning_rate": method.learning_rate,
        "max_steps": sizes.steps,
        "per_device_train_batch_size": sizes.batch,
        "max_grad_norm": 5.0,
        "logging_steps": sizes.steps,
        "tokens_per_forward": 8192,
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(table, folder=Path(folder), seed=seed, where="study", device="cpu")
        trainer = TokenTrainer(model, method.objective, arguments, rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def measure(model: RewardModel, objective: PlackettLuce, rows: Sequence[TokenRow]) -> Cell:
    """Rank accuracy on groups, and each token's learned and planted score."""
    values = token_values(model, rows, precision="float32", tokens_per_batch=8192)
    learned = torch.cat([part for row in values for part in row])
    batch = model.collate(rows)
    assert batch.scores is not None
    length = torch.bincount(batch.response)
    accuracy, longer, shorter = (
        objective(learned, replace(batch, rank=rank)).metrics["rank/accuracy"].double().numpy()
        for rank in (batch.rank, LONGEST - length, length)
    )
    return Cell(
        accuracy=accuracy,
        longer=(longer + 1 - shorter) / 2,
        learned=learned.double().numpy(),
        planted=batch.scores.double().numpy(),
        types=batch.ids.numpy(),
        lengths=length.numpy(),
    )


def run(case: str, method: Method, seed: int, sizes: Sizes) -> Cell:
    """One case, one method, one seed; data and initial weights follow from the seed."""
    rng = np.random.default_rng([seed, list(WORLDS).index(case)])
    world = WORLDS[case](rng)
    held_out = groups(world, rng, sizes.held_out)
    rows = groups(world, rng, sizes.groups, sizes.k)
    model = reward_model(seed, width=sizes.width, bound=method.bound)
    if not method.attention:
        without_attention(model.model.backbone)  # type: ignore[arg-type]
    if sizes.steps:
        train(model, method, rows, sizes, seed)
    return measure(model, method.objective, held_out)


Cells = dict[tuple[str, str], list[Cell]]


def in_ranks(values: Floats) -> Floats:
    """Ranks, equal values sharing their mean rank."""
    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(times) - (times - 1) / 2)[place]


def correlation(first: Floats, second: Floats) -> float:
    """Pearson's."""
    return float(np.corrcoef(first, second)[0, 1])


class Credit(NamedTuple):
    """How the learned token reward agrees with the planted score, on held-out tokens of one seed.

    Attributes:
        pearson: Over tokens.
        spearman: Over tokens.
        by_score: Spearman over the planted scores that there are, of the mean reward at each.
        marked: Spearman over tokens whose score is not 0.
        auroc: Chance that a token whose score is not 0 is further on its side than one whose score is 0.
        running: Pearson of the reward and the extreme score of the sequence so far, over tokens.
    """

    pearson: float
    spearman: float
    by_score: float
    marked: float
    auroc: float
    running: float


def by_type(cell: Cell) -> tuple[Floats, Floats]:
    """Mean learned reward and planted score of each type that occurred."""
    times = np.maximum(np.bincount(cell.types, minlength=TYPES), 1e-9)
    seen = times >= 1
    sums = (np.bincount(cell.types, values, TYPES) for values in (cell.learned, cell.planted))
    learned, planted = ((total / times)[seen] for total in sums)
    return learned, planted


def credit(cell: Cell) -> Credit:
    """Agreement with the planted scores."""
    sign = -1.0 if cell.planted.max() <= 0 else 1.0
    marked = cell.planted != 0
    mixed = not marked.all()
    scores, place = np.unique(cell.planted, return_inverse=True)
    means = np.bincount(place, cell.learned) / np.bincount(place)
    by_score = correlation(in_ranks(means), in_ranks(scores)) if len(scores) > 2 else float("nan")
    extreme = np.concatenate(
        [np.maximum.accumulate(part) for part in np.split(sign * cell.planted, np.cumsum(cell.lengths)[:-1])]
    )
    return Credit(
        correlation(cell.learned, cell.planted),
        correlation(in_ranks(cell.learned), in_ranks(cell.planted)),
        by_score,
        correlation(in_ranks(cell.learned[marked]), in_ranks(cell.planted[marked]))
        if mixed and len(np.unique(cell.planted[marked])) > 1
        else float("nan"),
        auroc(sign * cell.learned, marked) if mixed else float("nan"),
        correlation(sign * cell.learned, extreme) if mixed else float("nan"),
    )


def pooled(cells: Sequence[Cell]) -> Figure:
    """Mean accuracy over the held-out groups of all seeds."""
    return mean_figure(np.concatenate([cell.accuracy for cell in cells]))


def difference(first: Sequence[Cell], second: Sequence[Cell]) -> Figure:
    """Mean difference in accuracy, group by group."""
    pairs = zip(first, second, strict=True)
    return mean_figure(np.concatenate([one.accuracy - other.accuracy for one, other in pairs]))


def shown(figure: Figure, digits: int = 3) -> str:
    """A figure with its interval."""
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f} .. {figure.high:.{digits}f})"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def accuracy_table(cells: Cells) -> str:
    """Held-out rank accuracy of every method on every case; bold where the aggregate is the case's own."""

    def entry(name: str, case: str) -> str:
        text = shown(pooled(cells[case, name]))
        return f"**{text}**" if name.split()[0].rstrip(",") == OWN[case] else text

    return table(
        ["aggregate", *WORLDS], [[name, *(entry(name, case) for case in WORLDS)] for name in METHODS]
    )


def length_table(cells: Cells, fresh: dict[str, list[Cell]]) -> str:
    """How often the longer of two sequences gets the higher ``e``: before training, and after it."""

    def share(found: Sequence[Cell]) -> str:
        return f"{np.mean([cell.longer.mean() for cell in found]):.3f}"

    lines = [[name, share(fresh[name]), *(share(cells[case, name]) for case in WORLDS)] for name in METHODS]
    return table(["aggregate", "untrained", *WORLDS], lines)


def outsider(cells: Cells, case: str) -> str:
    """Of the methods with another aggregate than the case's own, the one that did best."""
    others = [name for name in METHODS if not name.startswith(OWN[case])]
    return max(others, key=lambda name: pooled(cells[case, name]).value)


def difference_table(cells: Cells) -> str:
    """The case's own aggregate against the best other one."""
    lines = []
    for case, own in OWN.items():
        other = outsider(cells, case)
        for name in (name for name in METHODS if name.startswith(own)):
            found = difference(cells[case, name], cells[case, other])
            lines.append([case, name, other, shown(found), str(found.n)])
    return table(["case", "own aggregate", "best other aggregate", "difference", "n groups"], lines)


def spread(values: Sequence[float]) -> str:
    """Mean over seeds, lowest and highest seed."""
    if np.isnan(values).any():
        return "-"
    return f"{np.mean(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


def credit_line(case: str, name: str, cells: Sequence[Cell]) -> list[str]:
    """Accuracy, and agreement of token rewards with planted scores."""
    columns = zip(*map(credit, cells), strict=True)
    tokens = sum(len(cell.learned) for cell in cells)
    return [case, name, f"{pooled(cells).value:.3f}", *map(spread, columns), str(tokens)]


def credit_table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of :func:`credit_line`."""
    head = ["case", "aggregate", "rank accuracy", "Pearson", "Spearman", "Spearman by score"]
    marked = ["Spearman, score not 0", "AUROC, score not 0", "Pearson with the extreme so far"]
    return table([*head, *marked, "n tokens"], lines)


def credits_of(cells: Cells, seeds: Sequence[int], sizes: Sizes) -> str:
    """The case's own aggregates, the average, and the own aggregate in a model without attention."""
    lines = []
    for case, own in OWN.items():
        names = [name for name in METHODS if name.startswith(own) or name == "average"]
        lines += [credit_line(case, name, cells[case, name]) for name in names]
        if case in ALONE:
            method = METHODS[ALONE[case]]._replace(attention=False)
            found = [run(case, method, seed, sizes) for seed in seeds]
            lines.append(credit_line(case, f"{ALONE[case]}, no attention", found))
    return credit_table(lines)


def sweep_table(seeds: Sequence[int], sizes: Sizes) -> str:
    """Group sizes at an equal number of judged sequences, in training and in each step; held out are groups of five."""
    lines = []
    for case, name in (("mean", "average"), ("keyword", "softmax 0.1")):
        for k in (2, 3, 5, 10):
            same = sizes._replace(k=k, groups=sizes.groups * K // k, batch=sizes.batch * K // k)
            found = pooled([run(case, METHODS[name], seed, same) for seed in seeds])
            lines.append([case, name, str(k), str(same.groups), shown(found), str(found.n)])
    return table(["case", "aggregate", "K", "groups", "rank accuracy", "n held-out groups"], lines)


def picture(cells: Cells, path: Path) -> None:
    """Accuracy of every method on every case, and learned against planted scores of the case's own aggregate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 8.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    _heat(upper.subplots(), cells)
    for axes, (case, name) in zip(lower.subplots(1, 3), ALONE.items(), strict=True):
        _scatter(axes, cells[case, name], case, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


TITLES = {
    "mean": "mean of the scores",
    "sum": "sum of the scores",
    "present": "keyword there or not",
    "keyword": "strongest keyword",
    "worst": "worst token",
}


def _heat(axes: Any, cells: Cells) -> None:
    values = np.array([[pooled(cells[case, name]).value for case in WORLDS] for name in METHODS])
    image = axes.imshow(values, cmap="cividis", vmin=0.5, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(WORLDS)), [TITLES[case] for case in WORLDS])
    axes.set_yticks(range(len(METHODS)), list(METHODS))
    axes.set_xlabel("what the sequences are ranked by")
    for row, name in enumerate(METHODS):
        for column, case in enumerate(WORLDS):
            own = name.split()[0].rstrip(",") == OWN[case]
            axes.text(
                column,
                row,
                f"{values[row, column]:.3f}" + (" *" if own else ""),
                ha="center",
                va="center",
                weight="bold" if own else "normal",
                color="black" if values[row, column] > 0.75 else "white",
            )
    axes.set_title("Held-out rank accuracy, chance 0.5 (* the aggregate that the ranks were made with)")
    axes.figure.colorbar(image, ax=axes, shrink=0.9, label="rank accuracy")


def _scatter(axes: Any, cells: Sequence[Cell], case: str, name: str) -> None:
    marks = zip(cells, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"), "os^Dv", strict=False)
    for number, (cell, colour, mark) in enumerate(marks):
        learned, planted = by_type(cell)
        axes.scatter(planted, learned, s=22, c=colour, marker=mark, alpha=0.7, label=f"seed {number}")
    axes.set_title(f"{TITLES[case]}: {name}")
    axes.set_xlabel("planted score of the token type")
    axes.set_ylabel("mean learned reward")
    axes.legend(frameon=False)


TUNED = {
    "mean": ("average", "sum", "sum, no bound"),
    "sum": ("sum", "average"),
    "keyword": ("softmax 0.1", "softmax 0.1, neutral", "average", "softmax 2 (published)"),
    "worst": ("softmin 0.1", "softmin 0.1, neutral", "average", "softmin 2 (published)"),
}
"""Cells in which learning rates are compared: the own aggregates and their rivals."""


def tune(sizes: Sizes) -> str:
    """Learning rates and temperatures on the tuning seed."""
    rates, temperatures = (3e-3, 1e-2, 3e-2), (0.03, 0.1, 0.3, 1.0, 2.0)

    def accuracy(case: str, method: Method) -> str:
        return f"{run(case, method, TUNING_SEED, sizes).accuracy.mean():.3f}"

    by_rate = [
        [case, name, *(accuracy(case, METHODS[name]._replace(learning_rate=rate)) for rate in rates)]
        for case, names in TUNED.items()
        for name in names
    ]
    by_temperature = [
        [
            case,
            OWN[case] + (", neutral" if neutral else ""),
            bound,
            *(
                accuracy(case, soft(OWN[case], temperature, neutral=neutral)._replace(bound=bound))
                for temperature in temperatures
            ),
        ]
        for case, neutral, bound in itertools.product(
            ("keyword", "worst"), (False, True), ("softplus", "none")
        )
    ]
    rate_head = ["case", "aggregate", *(f"learning rate {rate:g}" for rate in rates)]
    temperature_head = ["case", "aggregate", "bound", *(f"temperature {value:g}" for value in temperatures)]
    return table(rate_head, by_rate) + "\n\n" + table(temperature_head, by_temperature)


BEGIN, END = "<!-- tables: written by scripts/planted_study.py -->", "<!-- end of tables -->"


def write_page(path: Path, tables: str) -> None:
    """Put the tables between the page's two marks."""
    text = path.read_text(encoding="utf-8") if path.is_file() else f"{BEGIN}\n{END}\n"
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")


def study(seeds: Sequence[int], sizes: Sizes) -> tuple[Cells, dict[str, list[Cell]]]:
    """Every case with every method over the seeds, and every method untrained."""
    cells = {}
    for case in WORLDS:
        for name, method in METHODS.items():
            cells[case, name] = [run(case, method, seed, sizes) for seed in seeds]
            print(f"{case:8} {name:22} {shown(pooled(cells[case, name]))}", flush=True)
    untrained = sizes._replace(steps=0)
    fresh = {
        name: [run("mean", method, seed, untrained) for seed in seeds] for name, method in METHODS.items()
    }
    return cells, fresh


def main() -> None:
    """Run the study and write its tables and its picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, 0 and up")
    parser.add_argument("--output", type=Path, default=Path("docs/pictures"), help="folder of planted.png")
    parser.add_argument("--page", type=Path, help="Markdown file whose tables are replaced")
    parser.add_argument("--steps", type=int, default=Sizes().steps)
    parser.add_argument("--groups", type=int, default=Sizes().groups, help="to learn from, per case and seed")
    parser.add_argument("--tune", action="store_true", help="show settings on the tuning seed, and stop")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    sizes, seeds = Sizes(groups=chosen.groups, steps=chosen.steps), range(chosen.seeds)
    if chosen.tune:
        print(tune(sizes))
        return
    begun = time.monotonic()
    cells, fresh = study(seeds, sizes)
    parts = {
        "Held-out rank accuracy": accuracy_table(cells),
        "Own aggregate less the best other": difference_table(cells),
        "Share of held-out pairs in which the longer sequence has the higher value": length_table(
            cells, fresh
        ),
        "Token rewards against planted scores": credits_of(cells, seeds, sizes),
        "Group size at an equal number of judged sequences": sweep_table(seeds, sizes),
    }
    tables = "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items())
    print(tables)
    print(f"\n{time.monotonic() - begun:.0f} seconds")
    picture(cells, chosen.output / "planted.png")
    if chosen.page:
        write_page(chosen.page, tables)


if __name__ == "__main__":
    main()
