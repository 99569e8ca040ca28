"""Can an oracle with another tokenizer supervise a policy? A small oracle selects tokens for a larger policy, and the reverse.

    python -m studies.transfer --stories FOLDER --page docs/results.md

Stories whose words of praise or blame decide the preference, so that the tokens that carry it are known. The models are
stories260K (512 tokens, 0.3 M weights), a model of 0.9 M weights with byte-level BPE as GPT-2's, which is trained here on stories
of both kinds, and the default model (49,152 tokens, 135 M weights; one seed, ``--default``). Each is the policy with its own
oracle, with the oracle of another tokenizer, and with random tokens at the same cost. The BPE has 1,000 tokens learned from the
stories; ``--gpt2 FOLDER`` takes GPT-2's own 50,257, whose head costs fifty times as much.

Every arm and seed is one file in ``studies/values/transfer``, so a stopped study resumes.
"""

import argparse
import itertools
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2TokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

import tokenward
from studies.arms import VALUES
from studies.tables import cell, write
from tokenward import SideRule, TokenSettings, TopFraction
from tokenward.evaluation.credit import KnownResponse, credit_figures, known_response
from tokenward.evaluation.statistics import mean_figure
from tokenward.models.identity import resolve
from tokenward.tokens.segments import moved
from tokenward.tokens.spans import ByteSpan
from tokenward.types import Span

END = "<|endoftext|>"
TOKENS = TokenSettings(template="plain", max_prompt_tokens=96, max_response_tokens=192)
PRAISE = ["happy", "kind", "warm", "bright", "brave", "soft", "sweet", "nice"]
BLAME = ["sad", "mean", "cold", "dark", "scared", "rough", "sour", "bad"]
CHILDREN = ["Lily", "Tom", "Anna", "Ben", "Mia", "Sam", "Sue", "Max"]
PLACES = ["park", "zoo", "farm", "beach", "shop", "house", "garden", "school", "forest", "lake"]
PLAIN = [
    "They saw a big tree.", "There was a cat on the road.", "They ate some bread.", "A man had a red hat.", "They ran up the hill.",
    "A bird sat on the box.", "They had a ball and a toy car.", "Then they went home.", "A dog was by the door.", "They played with a boat.",
]  # fmt: skip
TRAIN, EVAL, REPLIES = 64, 32, 32


def tone(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Words of praise minus words of blame in each reply."""
    found = [re.findall(r"[a-z]+", text.lower()) for text in completions]
    return [float(sum((word in PRAISE) - (word in BLAME) for word in words)) for words in found]


def stories(seed: int, count: int, first: int) -> list[dict[str, Any]]:
    """Pairs of stories that begin alike, with the spans of the words that decide. Prompts differ by their number."""
    rng, rows = random.Random(f"{seed} {first}"), []
    for number in range(first, first + count):
        child, place = CHILDREN[number % 8], PLACES[number // 8 % 10]
        sides, spans = [], []
        for words, value in ((PRAISE, 1.0), (BLAME, -1.0)):
            parts = [f"It was {rng.choice(words)}.", *rng.sample(PLAIN, rng.randint(2, 3))]
            rng.shuffle(parts)
            text = " " + " ".join(parts)
            place_of = re.search(r"It was (\w+)\.", text)
            assert place_of is not None
            sides.append(text)
            spans.append([[*place_of.span(1), value]])
        prompt = f"Once upon a time, {child} went to the {place} on day {number // 80 + 1}."
        rows.append({"prompt": prompt, "responses": sides, "ranks": [0, 1], "spans": spans})
    return rows


def byte_level_bpe(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """BPE of 1,000 tokens over the bytes of some texts, split as GPT-2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, bos_token=END, pad_token=END)


def small_bpe(gpt2: Path | None, folder: Path) -> Path:
    """A model with byte-level BPE, trained on stories of both kinds, so that it writes both; made once."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    rows = stories(99, 400, 10_000)
    texts = [row["prompt"] + text for row in rows for text in row["responses"]]
    tokenizer = byte_level_bpe(texts)
    if gpt2 is not None:
        tokenizer = GPT2TokenizerFast(vocab=str(gpt2 / "vocab.json"), merges=str(gpt2 / "merges.txt"))
    end = tokenizer.eos_token_id
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end,
        )
    )  # fmt: skip
    steps, batch = 110, 8
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
    order = random.Random(0)
    for step in range(steps):
        ids = [[*tokenizer(text)["input_ids"], end] for text in order.sample(texts, batch)]
        longest = max(map(len, ids))
        padded = torch.tensor([[*own, *[end] * (longest - len(own))] for own in ids])
        labels = torch.tensor([[*own, *[-100] * (longest - len(own))] for own in ids])
        loss = model(input_ids=padded, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 25 == 0:
            print(f"start with byte-level BPE: step {step}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Kind(NamedTuple):
    """A model of the study, and how it trains.

    Attributes:
        folder: Makes the model, or finds it.
        rate: Learning rate of an oracle and of a policy.
        steps: Updates of an oracle and of a policy, of 8 pairs each.
    """

    folder: Callable[[], str]
    rate: float
    steps: int


def arguments(folder: Path, kind: Kind, seed: int) -> TrainingArguments:
    """Of an oracle or a policy."""
    return TrainingArguments(
        str(folder), learning_rate=kind.rate, max_steps=kind.steps, per_device_train_batch_size=8, seed=seed, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, lr_scheduler_type="constant",
    )  # fmt: skip


def oracle_of(name: str, kind: Kind, seed: int, runs: Path) -> str:
    """The folder of a kind's oracle for a seed, trained on the seed's pairs; made once."""
    folder = runs / f"oracle-{name}-{seed}"
    if not (folder / "model" / "token_scorer.json").exists():
        tokenward.train_oracle(
            kind.folder(), stories(seed, TRAIN, 0), args=arguments(folder, kind, seed), tokens=TOKENS
        )
    return str(folder / "model")


def measured(
    policy: str, oracle: str, kinds: Mapping[str, Kind], seed: int, runs: Path
) -> dict[str, list[float]]:
    """Train a policy on the tokens that an oracle selects, and measure it on other prompts.

    Returns:
        For each figure its value; and ``tone``, of each reply.
    """
    kind, scores = (
        kinds[policy],
        oracle_of(
            policy if oracle == "random" else oracle,
            kinds[policy if oracle == "random" else oracle],
            seed,
            runs,
        ),
    )
    rule = SideRule(fraction=0.3, direction="random" if oracle == "random" else None)
    start = kind.folder()
    scorer = tokenward.TokenScorer.load(scores)
    trainer = tokenward.SelectiveTrainer(
        AutoModelForCausalLM.from_pretrained(start), arguments(runs / "policy", kind, seed), stories(seed, TRAIN, 0), oracle=scorer,
        selector=TopFraction(chosen=rule, rejected=rule, seed=seed), objective=tokenward.SePO(gamma=2.0), tokens=TOKENS,
        processing_class=tokenward.TokenScorer.load(oracle_of(policy, kind, seed, runs)).template.tokenizer,
    )  # fmt: skip
    kept = trainer.kept
    trainer.train()
    replies: list[str] = []

    def kept_tone(prompts: Sequence[str], completions: Sequence[str], **more: Any) -> list[float]:
        replies.extend(completions)
        return tone(prompts, completions, **more)

    metric = "studies.transfer:tone"
    figures = tokenward.evaluate(
        trainer.model, stories(seed, EVAL, 2000), reference=start, oracle=scorer, metrics=[metric], prompts=REPLIES, seed=seed,
        sampling=tokenward.SamplingSettings(max_new_tokens=64 if policy == "stories" else 32), bootstrap=50, tokens=TOKENS, quiet=True,
    )  # fmt: skip
    values = {name: [figure.value] for name, figure in figures.items()}
    return values | {"kept": [kept["chosen"], kept["rejected"]]}


def credit(
    policy: str, oracle: str, kinds: Mapping[str, Kind], seed: int, runs: Path
) -> dict[str, list[float]]:
    """How well an oracle's scores find the deciding words among a policy's tokens, on pairs that it was not trained on."""
    rows = stories(seed, EVAL, 2000)
    scorer = tokenward.TokenScorer.load(oracle_of(oracle, kinds[oracle], seed, runs))
    tokenizer = AutoTokenizer.from_pretrained(kinds[policy].folder())
    scored = tokenward.score(rows, oracle=scorer, processing_class=tokenizer, tokens=TOKENS, quiet=True)
    known, alone, count = list[KnownResponse](), 0, 0
    for row in cast(Any, scored):
        for place, text in enumerate(row["responses"]):
            written = row["response_texts"][place] if "response_texts" in row else None
            spans = [Span(int(start), int(end), value) for start, end, value in row["spans"][place]]
            spans = spans if written is None else moved(spans, text, written, "a story")
            tokens = [
                ByteSpan(*both)
                for both in zip(row["token_starts"][place], row["token_ends"][place], strict=True)
            ]
            scores = np.nan_to_num(row["token_scores"][place]).tolist()  # a token without text has none
            known.append(known_response(written or text, spans, tokens, {"scores": scores}))
            segments = row["token_segments"][place] if "token_segments" in row else [*range(len(tokens))]
            alone += sum(segments.count(number) == 1 for number in segments)
            count += len(tokens)
    figure = credit_figures(known, resamples=50)["credit/auroc/scores"]
    return {"auroc": [figure.value], "alone": [alone / count]}


def credit_lines(found: Mapping[tuple[str, str, int], Mapping[str, list[float]]]) -> list[str]:
    """The table of the scores: AUROC over seeds, and how many tokens have a score of their own."""
    lines = [
        "| tokens of | oracle | AUROC | of each seed | tokens with a score of their own |",
        "|---|---|---|---|---|",
    ]
    for policy, oracle in dict.fromkeys(key[:2] for key in found):
        values, alone = (
            [one[name][0] for key, one in found.items() if key[:2] == (policy, oracle)]
            for name in ("auroc", "alone")
        )
        seeds = ", ".join(f"{value:.3f}" for value in values)
        name = "its own" if oracle == policy else NAMES[oracle]
        lines.append(
            f"| {NAMES[policy]} | {name} | {_over_seeds(values, 3)} | {seeds} | {np.mean(alone):.1%} |"
        )
    count = len({key[2] for key in found})
    note = (
        f"n = {count} seeds, with a 95 % bootstrap interval over them. Each seed trains its oracles on {TRAIN} pairs, and {EVAL} other pairs are "
        "measured: the tokens of the deciding word against the others."
    )
    return [*lines, "", note]


ARMS = {
    "bpe": ("bpe", "stories", "random"),
    "stories": ("stories", "bpe", "random"),
}
"""For each policy, whose oracle selects its tokens: its own, another's, or nobody's."""

WITH_DEFAULT = {"stories": ("default",), "default": ("default", "stories", "random")}


def values_file(values: Path, policy: str, oracle: str, seed: int) -> Path:
    """The file of an outcome."""
    return values / "transfer" / f"{policy}-by-{oracle}-{seed}.json"


def outcome(
    values: Path, policy: str, oracle: str, seed: int, make: Callable[[], dict[str, list[float]]]
) -> dict[str, list[float]]:
    """A stored outcome, measured first if there is none."""
    file = values_file(values, policy, oracle, seed)
    if not file.exists():
        print(f"{policy}, tokens of {oracle}, seed {seed}", flush=True)
        found = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


FIGURES = {
    "credit/auroc/log_ratio": ("AUROC of the scores", 3),
    "tone": ("tone of replies, change", 2),
    "preference/accuracy": ("accuracy", 3),
    "preference/margin": ("margin, nats", 2),
    "kl/per_token": ("KL per token", 3),
}
NAMES = {
    "bpe": "byte-level BPE",
    "stories": "stories260K",
    "default": "the default model",
    "random": "random",
}


def _over_seeds(values: Sequence[float], digits: int) -> str:
    """A mean over seeds with its interval; a single seed has none."""
    return cell(mean_figure(values), digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


def _value(found: Mapping[str, list[float]], name: str) -> float:
    key = "studies.transfer:tone/change" if name == "tone" else name
    return found[key][0] if key in found else float("nan")


def lines_of(found: Mapping[tuple[str, str, int], Mapping[str, list[float]]]) -> list[str]:
    """The table: means over seeds with their bootstrap interval, and each seed's tone against random tokens."""
    head = ["policy", "oracle", "seeds", *(title for title, _ in FIGURES.values()), "tone minus random"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for policy, oracle in dict.fromkeys(key[:2] for key in found):
        seeds = [seed for one, other, seed in found if (one, other) == (policy, oracle)]
        cells = []
        for name, (_, digits) in FIGURES.items():
            values = [_value(found[policy, oracle, seed], name) for seed in seeds]
            cells.append(
                "" if oracle == "random" and name.startswith("credit") else _over_seeds(values, digits)
            )
        pairs = [seed for seed in seeds if (policy, "random", seed) in found]
        apart = [
            _value(found[policy, oracle, s], "tone") - _value(found[policy, "random", s], "tone")
            for s in pairs
        ]
        change = (
            ""
            if oracle == "random" or not apart
            else f"{_over_seeds(apart, 2)}: {', '.join(f'{one:+.2f}' for one in apart)}"
        )
        row = [
            NAMES[policy],
            NAMES[oracle] if oracle != policy else "its own",
            str(len(seeds)),
            *cells,
            change,
        ]
        lines.append("| " + " | ".join(row) + " |")
    note = (
        f"Each value is the mean over seeds, with a 95 % bootstrap interval over them. A seed has {TRAIN} pairs to train on, {EVAL} pairs and "
        f"{REPLIES} replies to measure on. AUROC: the tokens of the deciding word against the others, on the policy's tokens."
    )
    return [*lines, "", note]


def main() -> None:
    """Run the missing arms, then print the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--stories", type=Path, required=True, help="folder of stories260K")
    made.add_argument("--gpt2", type=Path, help="folder with GPT-2's vocab.json and merges.txt")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    made.add_argument("--default", action="store_true", help="also the default model, with the first seed")
    made.add_argument("--credit", action="store_true", help="only the scores, no policies")
    made.add_argument("--runs", type=Path, default=Path("runs/studies/transfer"))
    made.add_argument("--values", type=Path, default=VALUES)
    made.add_argument("--page", type=Path)
    made.add_argument("--table", action="store_true", help="only the table, of what is stored")
    chosen = made.parse_args()
    kinds = {
        "bpe": Kind(lambda: str(small_bpe(chosen.gpt2, chosen.runs / "bpe")), 1e-3, 12),
        "stories": Kind(lambda: str(chosen.stories), 1e-3, 12),
        "default": Kind(lambda: resolve("default"), 2e-5, 6),
    }
    arms = [
        (policy, oracle, seed) for seed in chosen.seeds for policy, names in ARMS.items() for oracle in names
    ]
    if chosen.default:
        arms += [
            (policy, oracle, chosen.seeds[0]) for policy, names in WITH_DEFAULT.items() for oracle in names
        ]
    credits = {}
    for seed, policy, oracle in itertools.product(chosen.seeds, ("bpe", "stories"), ("bpe", "stories")):
        if chosen.table and not values_file(chosen.values, f"credit-{policy}", oracle, seed).exists():
            continue
        credits[policy, oracle, seed] = outcome(
            chosen.values,
            f"credit-{policy}",
            oracle,
            seed,
            lambda p=policy, o=oracle, s=seed: credit(p, o, kinds, s, chosen.runs),
        )
    found = {}
    for policy, oracle, seed in [] if chosen.credit else arms:
        if chosen.table and not values_file(chosen.values, policy, oracle, seed).exists():
            continue
        found[policy, oracle, seed] = outcome(
            chosen.values,
            policy,
            oracle,
            seed,
            lambda p=policy, o=oracle, s=seed: measured(p, o, kinds, s, chosen.runs),
        )
    lines = [
        "Scores:",
        "",
        *credit_lines(credits),
        "",
        "Policies that were trained on the selected tokens:",
        "",
        *lines_of(found),
    ]
    print("\n".join(lines))
    if chosen.page is not None:
        write(chosen.page, "transfer", lines)


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
