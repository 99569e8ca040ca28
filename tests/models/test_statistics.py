"""Log-probability and entropy of each token in one pass: the plain form's values and gradients."""

import copy
from functools import partial

import pytest
import torch

import tokenward.models.head
from tests.models.plain import plain_logits
from tests.models.test_forward import FACTORS, ROWS, TOTAL, batch_of, gradients, made
from tests.tiny import move_trained, tiny_llama
from tests.training.tools import language_model
from tokenward.models.forward import FrozenReference, run_model, token_statistics
from tokenward.models.head import install_head
from tokenward.ops.logprob import STATISTICS, chunked_statistics
from tokenward.ops.representation import entropy_and_rank
from tokenward.ops.tiles import linear_statistics
from tokenward.tokens.batches import Needs


def plain_statistics(model, rows):
    """Both numbers of every token from whole rows of logits, one response at a time.  -> [n], [n]"""
    logits = torch.cat(
        [plain_logits(model, row.prompt, response) for row in rows for response in row.responses]
    )
    ids = torch.tensor([token for row in rows for response in row.responses for token in response])
    logp = logits.log_softmax(-1)
    return logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def close(found, expected, largest=1.0):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * largest)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_one_pass_of_a_head_gives_both(chunk):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 7, (9,), generator=generator)
    logp = (hidden @ weight.T).log_softmax(-1)
    picked, entropy = logp[torch.arange(9), ids], -(logp.exp() * logp).sum(-1)
    found = chunked_statistics(hidden, ids, lambda rows: rows @ weight.T, ("entropy",), chunk=chunk)
    close(found["logp"], picked)
    close(found["entropy"], entropy)
    total = (picked * FACTORS[:9]).sum() + (entropy * FACTORS[9:18]).sum()
    mine = (found["logp"] * FACTORS[:9]).sum() + (found["entropy"] * FACTORS[9:18]).sum()
    close(torch.autograd.grad(mine, [hidden, weight]), torch.autograd.grad(total, [hidden, weight]))


def test_entropy_is_made_only_on_request():
    found = chunked_statistics(torch.zeros(2, 3), torch.tensor([0, 1]), lambda rows: rows)
    assert found.keys() == {"logp"}
    model, head = made("gpt2", torch.float32)
    assert token_statistics(model, head, batch_of(ROWS, "shared")).keys() == {"logp"}


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.usefixtures("exact_llama")
def test_a_model_gives_both_with_and_without_the_selective_head(name, layout, with_head):
    model, head = made(name, torch.float64)
    logp, entropy = plain_statistics(model, ROWS)
    other = FACTORS.flip(0)
    expected = gradients(model, torch.cat((logp, entropy)), torch.cat((FACTORS, other)))
    found = token_statistics(model, head if with_head else None, batch_of(ROWS, layout), Needs(entropy=True))
    mine = gradients(model, torch.cat((found["logp"], found["entropy"])), torch.cat((FACTORS, other)))
    close(found["logp"], logp)
    close(found["entropy"], entropy)
    assert entropy.std() > 0.01
    close(mine, expected, max(float(slope.abs().max()) for slope in expected.values()))


@pytest.mark.parametrize("with_head", [True, False])
def test_tokens_without_weight_have_neither(with_head):
    model, head = made("gpt2", torch.float64)
    weights = (torch.arange(TOTAL) % 3 != 1).float()
    batch = batch_of(ROWS, "shared", weights=weights)
    found = token_statistics(model, head if with_head else None, batch, Needs(entropy=True))
    kept = weights != 0
    _, entropy = plain_statistics(model, ROWS)
    close(found["entropy"][kept], entropy[kept])
    assert found["entropy"][~kept].tolist() == found["logp"][~kept].tolist() == [0.0] * int((~kept).sum())
    slopes = gradients(model, found["entropy"], FACTORS)
    expected = gradients(model, entropy, FACTORS * weights)
    close(slopes, expected, max(float(slope.abs().max()) for slope in expected.values()))


def test_after_a_request_for_both_the_head_is_an_ordinary_one():
    model, head = made("gpt2", torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    token_statistics(model, head, batch_of(ROWS, "shared"), Needs(entropy=True))
    assert torch.equal(model(input_ids=ids).logits, before)


def stored_ranks(model, head, rows):
    """As the scorer ``rank`` has them: of the states at each token's place, 128 rows at a time."""
    batch = batch_of(rows, "separate")
    with torch.no_grad(), head.answering(batch.inputs.predicted_from, None):
        states = run_model(model, batch.inputs).logits
    with torch.no_grad():
        return entropy_and_rank(states, batch.tokens.ids, head.logits)[1]


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.usefixtures("exact_llama")
def test_ranks_in_the_step_are_those_of_the_scorer(name, layout, with_head):
    """Beside everything else that the head may answer, and alone."""
    model, head = made(name, torch.float64)
    expected = stored_ranks(model, head, ROWS)
    assert len(set(expected.tolist())) > 5
    held = FrozenReference(*made(name, torch.float64))
    for needs in (
        Needs(token_rank=True),
        Needs(token_rank=True, entropy=True, states=True, kl="reverse"),
    ):
        found = token_statistics(model, head if with_head else None, batch_of(ROWS, layout), needs, held)
        assert found["token_rank"].tolist() == expected.tolist()
        assert not found["token_rank"].requires_grad
        close(found["logp"], plain_statistics(model, ROWS)[0])


@pytest.mark.parametrize("elements", [1, 700, 10**7])
def test_ranks_do_not_depend_on_tiles_and_are_0_without_weight(elements, monkeypatch):
    model, head = made("gpt2", torch.float64)
    expected = stored_ranks(model, head, ROWS)
    monkeypatch.setattr(
        tokenward.models.head, "linear_statistics", partial(linear_statistics, elements=elements)
    )
    weights = (torch.arange(TOTAL) % 3 != 1).float()
    batch = batch_of(ROWS, "shared", weights=weights)
    found = token_statistics(model, head, batch, Needs(token_rank=True))["token_rank"]
    assert found.tolist() == (expected * weights).tolist()


@pytest.mark.parametrize("target", ["all-linear", ["lm_head"]])
def test_ranks_with_an_adapter_are_those_of_the_merged_weights(target):
    """With one on the head too, which is then no plain matrix product."""
    model = language_model(tiny_llama(dtype=torch.float64, tie_word_embeddings=False))
    adapted = model.with_adapter({"r": 2, "target_modules": target})
    move_trained(adapted.model.to(torch.float64).eval())
    batch = batch_of(ROWS, "separate")
    found = token_statistics(adapted.model, adapted.head, batch, Needs(token_rank=True))["token_rank"]
    merged = copy.deepcopy(adapted.model).merge_and_unload()
    assert found.tolist() == stored_ranks(merged, install_head(merged), ROWS).tolist()
    plain = tiny_llama(dtype=torch.float64, tie_word_embeddings=False).eval()
    assert found.tolist() != stored_ranks(plain, install_head(plain), ROWS).tolist()


@pytest.mark.parametrize("with_head", [True, False])
def test_a_statistic_that_is_new_to_the_table_is_given_by_every_head(with_head, monkeypatch):
    """A name there and a field of what is needed are all it takes; beside one that goes by tiles, too."""
    monkeypatch.setitem(STATISTICS, "top", lambda chunk: chunk.logits.log_softmax(-1).amax(-1))
    monkeypatch.setattr(Needs, "of_head", ("entropy", "top"))
    model, head = made("gpt2", torch.float64)
    found = token_statistics(model, head if with_head else None, batch_of(ROWS, "shared"), Needs())
    expected = [plain_logits(model, row.prompt, ids) for row in ROWS for ids in row.responses]
    close(found["top"], torch.cat(expected).log_softmax(-1).amax(-1))
    close(found["entropy"], plain_statistics(model, ROWS)[1])
    assert found["top"].requires_grad
