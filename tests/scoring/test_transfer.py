"""Values carried from one tokenizer's tokens to another's, between three real kinds of tokenizer and any texts."""

import copy
import random
import re
from itertools import permutations

import pytest
import torch

from tests.tiny import planted_rows, tiny_tokenizer
from tests.tokenizers import byte_fallback, byte_level
from tokenward.data.prepare import from_rows
from tokenward.errors import UserError
from tokenward.scoring.basic import Entropy, LogRatio, Probability, Random, Surprisal
from tokenward.scoring.coverage import coverage
from tokenward.scoring.scorers import Combine
from tokenward.scoring.store import TokenStore, write_store
from tokenward.scoring.transfer import Carrier, Speller, check_carried, check_texts
from tokenward.tokens.encode import Limits
from tokenward.tokens.store import EncodedStore
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template

TEMPLATES = {
    "chatml": Template(tokenizer=tiny_tokenizer()),
    "gpt2": Template(tokenizer=byte_level()),
    "llama": Template(tokenizer=byte_fallback()),
}
PIECES = [
    "the good tea ",
    "👩‍👩‍👧",
    "Café",
    "日本語",
    "e\u0301",
    " ",
    "  ",
    "\n",
    "x",
    "שלום",
    "\t",
    "12",
    "ﬁ",
    "A\u200fB",
    "\u00a0",
    ".",
]
EVERYTHING = Limits(10_000, 10_000, "drop")


def comparisons(count: int, seed: int = 0):
    """Pairs of planted replies and of random texts, with white space at their ends."""
    rng = random.Random(seed)

    def text(number: int) -> str:
        return f"{number}" + "".join(rng.choices(PIECES, k=rng.randint(1, 9)))

    rows = [{"prompt": f"q{n}", "responses": [text(0), text(1)], "ranks": [0, 1]} for n in range(count)]
    planted = [{**row, "ranks": [0, 1, 2]} for row in planted_rows(count)]
    return from_rows([*rows, *planted], name="rows").comparisons


def table(rows, name: str, limits: Limits = EVERYTHING) -> TokenTable:
    return TokenTable.whole(EncodedStore.made(rows, TEMPLATES[name], limits))


def drawn(group, progress):
    """Values of every token that depend on the row only."""
    found = []
    for row in group:
        generator = torch.Generator().manual_seed(int(row.comparison.key, 16) % 2**31)
        found.append([-torch.rand(len(ids), generator=generator) * 8 for ids in row.responses])
    return {"oracle_logp": found}


def stores(
    folder, source: tuple[str, TokenTable], target: tuple[str, TokenTable]
) -> tuple[TokenStore, TokenStore]:
    """The drawn values in the source's tokens, and in the target's."""
    settings = {"shard_rows": 16, "progress": lambda count: None}
    before = write_store(folder / "source", [drawn], TEMPLATES[source[0]], source[1], **settings)
    carrier = Carrier(
        before, ["oracle_logp"], source[1], *(Speller(TEMPLATES[side[0]]) for side in (source, target))
    )
    return before, write_store(folder / "target", [carrier], TEMPLATES[target[0]], target[1], **settings)


@pytest.mark.parametrize(("one", "other"), [*permutations(TEMPLATES, 2)])
def test_the_sum_of_every_response_is_kept(tmp_path, one, other):
    rows = comparisons(30)
    source, target = table(rows, one), table(rows, other)
    before, after = stores(tmp_path, (one, source), (other, target))
    counts = [dict(zip(rows.keys.tolist(), rows.eos.tolist(), strict=True)) for rows in (source, target)]
    split = 0
    for key in before:
        own, made = before[key], after[key]
        values = made.value("oracle_logp")
        assert values.dtype == torch.float64
        assert float(values.nansum()) == pytest.approx(sum(own.values["oracle_logp"]), abs=1e-12)
        # The ends of the turn, two tokens in one of the templates, keep their value.
        first, second = (count[int(key, 16)] for count in counts)
        ends = sum(own.values["oracle_logp"][-first:]), sum(made.values["oracle_logp"][-second:])
        assert ends[0] == pytest.approx(ends[1], abs=1e-12)
        assert made.segment[-second] > made.segment[-second - 1]
        split += len(made.segment) - len(set(made.segment))
    assert split  # some of the source's tokens are longer than the target's
    found = coverage(before, after, ["oracle_logp"])
    assert (found.responses, found.unscored, found.scored, found.text) == (len(before), 0, 1.0, 1.0)
    assert found.placed == {"oracle_logp": 1.0}
    assert found.segments
    assert 0 < found.alone < 1


def test_another_template_of_the_same_tokenizer_changes_no_bit(tmp_path):
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = tokenizer.chat_template.replace("[INST] ", "[INST] Be kind. ")
    TEMPLATES["kind"], rows = Template(tokenizer=tokenizer), comparisons(20)
    assert TEMPLATES["kind"].fingerprint != TEMPLATES["gpt2"].fingerprint
    before, after = stores(tmp_path, ("gpt2", table(rows, "gpt2")), ("kind", table(rows, "kind")))
    for key in before:
        assert after[key]._replace(segment=None) == before[key]
        assert after[key].segment == list(range(len(after[key].ids)))


def test_worked_by_hand(tmp_path):
    """A tokenizer of single bytes, and one of words: the value of a word is divided by its bytes."""
    (row,) = from_rows([{"prompt": "q", "chosen": "the tea 👩", "rejected": "no"}], name="rows").comparisons
    words, letters = table([row], "gpt2"), table([row], "chatml")
    before, after = stores(tmp_path, ("gpt2", words), ("chatml", letters))
    key = next(iter(before))
    own, made = before[key], after[key]
    pieces = TEMPLATES["gpt2"].tokenizer.convert_ids_to_tokens(own.ids)
    assert pieces[:2] == ["Ġthe", "Ġtea"]
    assert TEMPLATES["chatml"].tokenizer.convert_ids_to_tokens(made.ids)[:5] == ["the", "Ġ", "t", "e", "a"]
    assert made.values["oracle_logp"][0] == own.values["oracle_logp"][0]
    assert made.values["oracle_logp"][1:5] == [own.values["oracle_logp"][1] / 4] * 4
    assert made.segment[:5] == [0, 1, 1, 1, 1]
    # The other way round, the word has the sum of its letters.
    back = stores(tmp_path / "back", ("chatml", letters), ("gpt2", words))
    letters_of, word = back[0][key].values["oracle_logp"], back[1][key]
    assert word.values["oracle_logp"][1] == pytest.approx(sum(letters_of[1:5]), abs=1e-12)
    assert word.segment == [
        0,
        1,
        2,
        3,
        4,
        4,
    ]  # the last two end the turn, as one token of the other template does


def test_responses_that_are_cut_or_missing_have_no_scores_beyond(tmp_path):
    rows = [row for row in comparisons(12) if row.responses[0].isascii()]
    short, whole = table(rows, "chatml", Limits(1000, 6, "truncate")), table(rows, "gpt2")
    before, after = stores(tmp_path, ("chatml", short[:20]), ("gpt2", whole))
    found = coverage(before, after, ["oracle_logp"])
    assert found.unscored == len(whole.responses) - len(short[:20].responses)
    assert found.placed == {"oracle_logp": 1.0}
    assert found.scored < 1
    assert found.text < 1
    for key in after:
        values = after[key].value("oracle_logp")
        if key not in before:
            assert values.isnan().all()
            continue
        scored = ~values.isnan()
        assert scored[: int(scored.sum())].all()  # none after the cut
        assert float(values.nansum()) == pytest.approx(sum(before[key].values["oracle_logp"]), abs=1e-12)
    # A policy that is cut where the oracle is not: what the oracle says of the rest has no place, and that is reported.
    before, after = stores(tmp_path / "back", ("gpt2", whole), ("chatml", short))
    found = coverage(before, after, ["oracle_logp"])
    assert found.scored == 1
    missing = sum(
        abs(sum(before[key].values["oracle_logp"]) - float(after[key].value("oracle_logp").nansum()))
        for key in after
    )
    total = sum(abs(sum(before[key].values["oracle_logp"])) for key in after)
    assert found.placed["oracle_logp"] == pytest.approx(1 - missing / total, abs=1e-12)
    assert "too long" in coverage(
        *stores(tmp_path / "more", ("chatml", short[:3]), ("gpt2", whole)), ["oracle_logp"]
    ).line("A", "B")


def test_a_tokenizer_that_changes_the_text_is_refused_with_the_text():
    rows = from_rows([{"prompt": "q", "chosen": "Ein Tee", "rejected": "kein tee"}], name="rows").comparisons
    TEMPLATES["lower"] = Template(tokenizer=byte_level(lower=True))
    for pair in (("lower", "gpt2"), ("llama", "lower")):
        with pytest.raises(
            UserError, match=r"byte_level 420 lower changes the text: it reads 'ein tee' for 'Ein Tee'"
        ) as caught:
            check_texts(
                *(table(rows, name) for name in pair), tuple(Speller(TEMPLATES[name]) for name in pair)
            )
        assert caught.value.code == "normalized-text"
    # Two that change it alike agree.
    check_texts(table(rows, "lower"), table(rows, "lower"), (Speller(TEMPLATES["lower"]),) * 2)


def test_templates_that_write_a_reply_differently_are_refused_with_the_texts():
    tokenizer = byte_level(400)
    tokenizer.chat_template = tokenizer.chat_template.replace("| trim", "| trim | replace('tea', 'coffee')")
    TEMPLATES["coffee"] = Template(tokenizer=tokenizer)
    rows = from_rows([{"prompt": "q", "chosen": "good tea", "rejected": "no"}], name="rows").comparisons
    with pytest.raises(UserError, match="'good tea' and 'good coffee'") as caught:
        check_texts(
            *(table(rows, name) for name in ("gpt2", "coffee")),
            (Speller(TEMPLATES["gpt2"]), Speller(TEMPLATES["coffee"])),
        )
    assert caught.value.code == "texts-differ"


class Twice:
    """A scorer of one's own."""

    reads = ("oracle_logp", "reference_logp")

    def __call__(self, record):
        return 2 * (record.value("oracle_logp") - record.value("reference_logp"))


class Sum(Twice):
    additive = True


RATIO, CHANCE = {"name": "log_ratio"}, {"name": "random"}
SCALED = ({"scorer": RATIO, "steps": [{"affine": {"scale": 2}}]}, {"scorer": CHANCE, "steps": ["relu"]})
OTHERS = {"oracle": "one", "reference": "one"}


@pytest.mark.parametrize(
    ("scorer", "others", "words"),
    [
        (LogRatio(), OTHERS, ""),
        (Sum(), OTHERS, ""),
        (Random(), OTHERS, ""),
        (Entropy(), {}, ""),
        (Combine(SCALED), OTHERS, ""),
        (Twice(), OTHERS, "cannot-transfer: .*Twice.*additive = True"),
        (Probability(), OTHERS, "cannot-transfer: .*Probability.*not the sum"),
        (Entropy(), OTHERS, "cannot-transfer: .*reference_entropy"),
        (LogRatio(numerator="policy"), OTHERS, "cannot-transfer: .*in training"),
        (Combine(SCALED, how="max"), OTHERS, "cannot-transfer: .*how: max"),
        (Combine(({"scorer": RATIO, "steps": ["relu"]},)), OTHERS, "cannot-transfer: .*steps: relu"),
        (LogRatio(), {"oracle": "one"}, "tokenizer-mismatch: .*oracle and reference"),
        (Surprisal(), {"oracle": "one"}, ""),
    ],
)  # fmt: skip
def test_only_sums_are_carried(scorer, others, words):
    if not words:
        check_carried(scorer, others)
        return
    with pytest.raises(UserError) as caught:
        check_carried(scorer, others)
    code, _, pattern = words.partition(": ")
    assert caught.value.code == code
    assert re.search(pattern, str(caught.value)), str(caught.value)
