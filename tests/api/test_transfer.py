"""An oracle with another tokenizer and chat template than the policy, in every function of the library."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokenward
from tests.api.conftest import TOKENS, Script, arguments
from tests.tokenizers import byte_fallback, byte_level, save_other
from tokenward.errors import UserError
from tokenward.tokens.table import JOINT, TokenTable


@pytest.fixture(scope="module")
def foreign(script: Script, tmp_path_factory: pytest.TempPathFactory) -> tokenward.TokenScorer:
    """An oracle of GPT-2's kind, whose tokens are longer than the policy's, with LLaMA's chat template."""
    folder = tmp_path_factory.mktemp("foreign")
    base = save_other(folder / "base", byte_level())
    return tokenward.train_oracle(
        str(base), script.train, args=arguments(folder / "oracle", 3, learning_rate=1e-2), tokens=TOKENS
    )


@pytest.fixture(scope="module")
def policy_tokens(script: Script) -> Any:
    return AutoTokenizer.from_pretrained(script.model)


@pytest.fixture(scope="module")
def scored(script: Script, foreign: tokenward.TokenScorer, policy_tokens: Any) -> Dataset:
    return tokenward.score(
        script.train, oracle=foreign, processing_class=policy_tokens, tokens=TOKENS, quiet=True
    )


def exact(rows: Dataset) -> Dataset:
    """Scores in float64: a log-ratio of the oracle's own tokens is rounded to float32."""
    values = zip(rows["token_oracle_logp"][:], rows["token_reference_logp"][:], strict=True)
    found = [
        [[one - two for one, two in zip(*both, strict=True)] for both in zip(*row, strict=True)]
        for row in values
    ]
    return rows.remove_columns("token_scores").add_column("token_scores", cast(Any, found))


def spread(row: dict[str, Any], place: int, other: dict[str, Any]) -> list[float]:
    """The definition, byte by byte: the other tokens' scores as scores of a row's tokens, without the ends of turn."""
    space = len(other["response_texts"][place]) - len(
        other["response_texts"][place].lstrip()
    )  # of the template
    by_byte: dict[int, float] = {}
    columns = (other[f"token_{name}"][place][:-2] for name in ("starts", "ends", "scores"))
    for start, end, score in zip(*columns, strict=True):
        start = max(start - space, 0)
        by_byte |= dict.fromkeys(range(start, end - space), score / (end - space - start))
    spans = zip(row["token_starts"][place][:-1], row["token_ends"][place][:-1], strict=True)
    return [sum(by_byte[byte] for byte in range(*span)) for span in spans]


def test_scores_are_those_of_the_definition_and_keep_their_sum(
    script: Script, foreign: tokenward.TokenScorer, scored: Dataset, policy_tokens: Any
) -> None:
    own = exact(tokenward.score(script.train, oracle=foreign, tokens=TOKENS, quiet=True))
    assert "token_segments" not in own.column_names
    assert own[0]["token_ids"] != scored[0]["token_ids"]
    joined = 0
    for row, other in zip(cast(Any, scored), cast(Any, own), strict=True):
        for place, text in enumerate(row["responses"]):
            assert policy_tokens.decode(row["token_ids"][place][:-1]) == text
            sums = [sum(side["token_scores"][place]) for side in (row, other)]
            assert sums[0] == pytest.approx(sums[1], abs=1e-12)
            assert other["response_eos"][place] == 2  # a space and </s>, which are one <|im_end|> here
            assert row["token_scores"][place][-1] == pytest.approx(
                sum(other["token_scores"][place][-2:]), abs=1e-12
            )
            assert row["token_scores"][place][:-1] == pytest.approx(spread(row, place, other), abs=1e-12)
            joined += len(row["token_segments"][place]) - len(set(row["token_segments"][place]))
    assert joined


def trained(script: Script, folder: Path, rows: Any, **more: Any) -> TokenTable:
    more = {"objective": tokenward.SePO(gamma=2.0), **more}
    trainer = tokenward.SelectiveTrainer(script.model, arguments(folder, 1), rows, tokens=TOKENS, **more)
    trainer.train()
    table = trainer.train_dataset
    assert isinstance(table, TokenTable)
    return table


def test_segments_are_selected_as_one_whichever_way_the_scores_come(
    script: Script, foreign: tokenward.TokenScorer, scored: Dataset, tmp_path: Path
) -> None:
    selected = tokenward.select(scored)
    ways = [
        trained(script, tmp_path, script.train, oracle=foreign),
        trained(script, tmp_path, scored),
        trained(script, tmp_path, script.train, oracle=scored),
        trained(script, tmp_path, selected),
    ]
    expected = {key: list(zip(*both, strict=True)) for key, *both in _responses(selected)}
    for table in ways:
        for number in range(len(table)):
            row = table[number]
            for place, weights in enumerate(row.weights or ()):
                assert len(weights) == len(row.responses[place])
                if JOINT in row.values:
                    for segment in row.values[JOINT][place].unique():
                        assert len(weights[row.values[JOINT][place] == segment].unique()) == 1
        assert _by_key(ways[0]) == _by_key(table)
    # A third of the segments, not of the tokens, and the best of them by their sums.
    for key, weights in _by_key(ways[0]).items():
        pairs = expected[key]
        sums: dict[int, float] = {}
        kept = set()
        for (score, segment), weight in zip(pairs, weights, strict=True):
            sums[segment] = sums.get(segment, 0.0) + score
            kept |= {segment} if weight else set()
        assert len(kept) == max(int(0.3 * len(sums)), 1)
        better = sorted(sums, key=lambda one: sums[one])
        assert kept in (set(better[-len(kept) :]), set(better[: len(kept)]))


def _responses(rows: Dataset) -> list[tuple[str, list[float], list[int]]]:
    return [
        (key, row["token_scores"][place], row["token_segments"][place])
        for row in cast(Any, rows)
        for place, key in enumerate(row["response_keys"])
    ]


def _by_key(table: TokenTable) -> dict[str, list[float]]:
    keys = iter(table.keys.tolist())
    return {
        f"{next(keys):016x}": weights.tolist()
        for number in range(len(table))
        for weights in table[number].weights or ()
    }


def test_a_store_in_parts_is_that_of_one_job(
    script: Script,
    foreign: tokenward.TokenScorer,
    scored: Dataset,
    policy_tokens: Any,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr("tokenward.api.values.SHARD_ROWS", 4)
    oracle = str(Path(foreign.models["oracle_logp"].name))
    settings = {"oracle": oracle, "processing_class": policy_tokens, "tokens": TOKENS, "quiet": True}
    for part in ("2/2", "1/2"):
        found = tokenward.score(script.train, store=tmp_path / "store", part=part, **settings)
        assert (found is None) == (part == "2/2")
    assert found is not None
    assert found["token_scores"][:] == scored["token_scores"][:]
    again = trained(script, tmp_path / "run", script.train, oracle=tmp_path / "store")
    assert _by_key(again) == _by_key(trained(script, tmp_path / "run", script.train, oracle=foreign))


def test_evaluation_is_on_the_tokens_of_the_policy(script: Script, foreign: tokenward.TokenScorer) -> None:
    policy = AutoModelForCausalLM.from_pretrained(script.model)
    with torch.no_grad():
        next(policy.parameters()).mul_(1.1)
    figures = tokenward.evaluate(
        policy, script.eval, reference=script.model, oracle=foreign, tokens=TOKENS, bootstrap=20, quiet=True
    )
    known = 2 * len(script.eval)
    assert figures["credit/auroc/log_ratio"].n == known
    plain = tokenward.evaluate(
        policy, script.eval, reference=script.model, tokens=TOKENS, bootstrap=20, quiet=True
    )
    assert {name: figures[name] for name in plain} == plain


def test_an_oracle_of_the_same_tokens_changes_nothing(script: Script, policy_tokens: Any) -> None:
    usual = tokenward.score(script.train, oracle=script.oracle, tokens=TOKENS, quiet=True)
    named = tokenward.score(
        script.train, oracle=script.oracle, processing_class=policy_tokens, tokens=TOKENS, quiet=True
    )
    assert usual.to_dict() == named.to_dict()


def test_what_cannot_be_right_is_refused_before_anything_is_computed(
    script: Script, foreign: tokenward.TokenScorer, tmp_path: Path
) -> None:
    base = foreign.models["reference_logp"].name
    lower = str(save_other(tmp_path / "lower", byte_level(lower=True)))
    cases: list[tuple[str, dict[str, Any]]] = [
        ("tokenizer-mismatch", {"oracle": foreign.models["oracle_logp"]}),  # its reference is not known
        (
            "tokenizer-mismatch",
            {"oracle": foreign.models["oracle_logp"], "reference": base, "objective": tokenward.DPO()},
        ),
        ("cannot-transfer", {"oracle": foreign, "scorer": tokenward.Entropy(of="oracle")}),
        ("cannot-transfer", {"oracle": foreign, "scorer": tokenward.Probability(of="oracle")}),
        ("normalized-text", {"oracle": _oracle_of(lower, tmp_path)}),
    ]
    rows = [{**row, "responses": [text.capitalize() for text in row["responses"]]} for row in script.train]
    for code, given in cases:
        with pytest.raises(UserError) as caught:
            trained(script, tmp_path, rows, **given)
        assert caught.value.code == code, caught.value
    # With its own reference, and an objective that needs none, the same oracle works.
    trained(script, tmp_path, script.train, oracle=foreign.models["oracle_logp"], reference=base)


def _oracle_of(folder: str, scratch: Path) -> tokenward.TokenScorer:
    other = str(save_other(scratch / "other", byte_level(lower=True), seed=9))
    return tokenward.TokenScorer.load(other, reference=folder)


def test_the_other_way_round_and_bytes_of_a_character(script: Script, tmp_path: Path) -> None:
    """A policy of LLaMA's kind with an oracle whose tokens are single bytes: no token is joined, and emoji keep their sum."""
    policy = str(save_other(tmp_path / "policy", byte_fallback()))
    rows = [{"prompt": "q", "chosen": "the tea 👩‍👩‍👧 é", "rejected": "日本語 no"}] * 1
    found = tokenward.score(
        rows,
        oracle=script.oracle,
        processing_class=AutoTokenizer.from_pretrained(policy),
        tokens=TOKENS,
        quiet=True,
    )
    own = exact(tokenward.score(rows, oracle=script.oracle, tokens=TOKENS, quiet=True))
    for place in (0, 1):
        sums = [sum(side[0]["token_scores"][place]) for side in (found, own)]
        assert sums[0] == pytest.approx(sums[1], abs=1e-12)
    tokenward.SelectiveTrainer(
        policy, arguments(tmp_path, 1), rows, oracle=script.oracle, tokens=TOKENS
    ).train()
