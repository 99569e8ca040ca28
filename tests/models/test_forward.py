"""Law 3: shared rows, separate rows and plain transformers calls give the same numbers and gradients.

Tolerances in float64: GPT-2 computes in float64 throughout (LayerNorm, sdpa) and is held to 1e-10, as
is Llama with its RMSNorm in float64. The Llama of transformers computes RMSNorm in float32 whatever the
weights' type; a gradient that reaches the shared prompt as one sum is then rounded once instead of once
per response, so there the gradients agree to float32 only, and the loss still to 1e-10.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

import tokenward.models.head
from tests.models.plain import plain_logits, plain_logprobs
from tests.tiny import tiny_gpt2, tiny_llama
from tests.tokens.rows import encoded
from tokenward.models.forward import token_kl, token_logprobs
from tokenward.models.head import SelectiveHead, install_head
from tokenward.ops.logprob import chunked_statistics
from tokenward.tokens.batches import collate

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
LAYOUTS = ["shared", "separate"]
generator = torch.Generator().manual_seed(5)
random_ids = torch.randint(0, 250, (60,), generator=generator).tolist()
ROWS = [
    encoded(random_ids[:9], random_ids[9:13], random_ids[13:20]),
    encoded(random_ids[20:23], random_ids[23:24], random_ids[24:29], random_ids[29:31]),
    encoded(random_ids[31:45], random_ids[45:50], random_ids[50:60]),
]
TOTAL = sum(len(response) for row in ROWS for response in row.responses)
FACTORS = torch.randn(TOTAL, generator=generator, dtype=torch.float64)


def made(name, dtype):
    model = MODELS[name](dtype=dtype).eval()
    return model, install_head(model)


def batch_of(rows, layout, *, weights=None, pad_id=0):
    """A batch; ``weights`` is flat, over the tokens of all rows."""
    if weights is None:
        return collate(list(rows), layout=layout, pad_id=pad_id)
    parts = iter(weights.split([len(response) for row in rows for response in row.responses]))
    with_weights = [replace(row, weights=[next(parts) for _ in row.responses]) for row in rows]
    return collate(with_weights, layout=layout, pad_id=pad_id)


def gradients(model, logp, factors):
    """Gradient of the weighted sum of log-probabilities, by every parameter."""
    model.zero_grad()
    (logp * factors.to(logp.dtype)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def check_against_plain(name, layout, dtype, *, values, slopes, with_head=True):
    model, head = made(name, dtype)
    expected = plain_logprobs(model, ROWS)
    expected_gradients = gradients(model, expected, FACTORS)
    found = token_logprobs(model, head if with_head else None, batch_of(ROWS, layout))
    found_gradients = gradients(model, found, FACTORS)
    torch.testing.assert_close(found, expected, rtol=0, atol=values)
    largest = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    # Relative to the largest gradient of the model, so that the bound means digits.
    torch.testing.assert_close(found_gradients, expected_gradients, rtol=0, atol=slopes * largest)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("exact_llama")
def test_rows_equal_plain_calls_in_float64(name, layout):
    """By the selective head, and by all logits."""
    for with_head in (True, False):
        check_against_plain(name, layout, torch.float64, values=1e-10, slopes=1e-10, with_head=with_head)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_equal_plain_calls_of_the_llama_of_transformers(layout):
    check_against_plain("llama", layout, torch.float64, values=1e-10, slopes=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_rows_equal_plain_calls_in_float32(name, layout):
    check_against_plain(name, layout, torch.float32, values=1e-5, slopes=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2], [0]])
@pytest.mark.parametrize("pad_id", [0, 249])
def test_order_neighbours_and_padding_change_nothing(layout, order, pad_id):
    model, head = made("gpt2", torch.float64)
    rows = [ROWS[index] for index in order]
    found = token_logprobs(model, head, batch_of(rows, layout, pad_id=pad_id))
    torch.testing.assert_close(found, plain_logprobs(model, rows), rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_the_chunk_of_a_head_that_is_not_linear_changes_nothing(chunk, monkeypatch):
    model, head = made("gpt2", torch.float64)
    monkeypatch.setattr(type(head), "linear", None)
    expected = plain_logprobs(model, ROWS)
    expected_gradients = gradients(model, expected, FACTORS)
    rows_seen = []
    plain_head = head._plain
    monkeypatch.setattr(head, "_plain", lambda hidden: rows_seen.append(len(hidden)) or plain_head(hidden))
    monkeypatch.setattr(tokenward.models.head, "chunked_statistics", partial(chunked_statistics, chunk=chunk))
    found = token_logprobs(model, head, batch_of(ROWS, "shared"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(model, found, FACTORS), expected_gradients, rtol=0, atol=1e-11)
    assert max(rows_seen) == min(chunk, TOTAL)


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_of_weight_zero_are_deleted(layout, with_head):
    model, head = made("gpt2", torch.float64)
    weights = (torch.arange(TOTAL) % 3 != 1).float()
    expected_gradients = gradients(model, plain_logprobs(model, ROWS), FACTORS * weights)
    batch = batch_of(ROWS, layout, weights=weights)
    found = token_logprobs(model, head if with_head else None, batch)
    kept = weights != 0
    torch.testing.assert_close(found[kept], plain_logprobs(model, ROWS)[kept], rtol=0, atol=1e-10)
    assert found[~kept].tolist() == [0.0] * int((~kept).sum())
    # The factors of the deleted tokens do not count, although they are not zero here.
    torch.testing.assert_close(gradients(model, found, FACTORS), expected_gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_deleted_response_gives_no_gradient_at_all(layout):
    # Every id occurs once, so the gradient of an embedding is that of one token.
    row = encoded([1, 2, 3], [4, 5, 6], [7, 8, 9])
    model = tiny_llama(tie_word_embeddings=False, dtype=torch.float64)
    head = install_head(model)
    batch = batch_of([row], layout, weights=torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 0.0]))
    token_logprobs(model, head, batch).sum().backward()
    reached = model.get_input_embeddings().weight.grad.abs().sum(-1).nonzero()[:, 0].tolist()
    # Prompt, and the token before the second kept one: nothing of response 1, nothing after.
    assert reached == [1, 2, 3, 7]


def test_states_of_unselected_places_may_be_anything():
    module = torch.nn.Linear(4, 6, bias=False)
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    positions, ids = torch.tensor([4, 0]), torch.tensor([5, 2])
    expected = module(hidden.reshape(6, 4)[positions]).log_softmax(-1)[torch.arange(2), ids]
    head = SelectiveHead(module)
    hidden[0, 1:], hidden[1, 0], hidden[1, 2] = torch.nan, torch.inf, -torch.inf
    hidden.requires_grad_()
    with head.answering(positions, ids):
        found = module(hidden)
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    assert module.weight.grad.isfinite().all()
    assert hidden.grad.reshape(6, 4)[[1, 2, 3, 5]].tolist() == [[0.0] * 4] * 4
    assert hidden.grad[0, 0].abs().min() > 0


@pytest.mark.parametrize("padding", [None, random_ids[3]])
def test_a_tied_weight_gets_one_gradient(padding, monkeypatch):
    """The rows of the embedding's gradient join the head's; a row of padding gets none from there."""
    model = tiny_gpt2(dtype=torch.float64).eval()
    embedding = model.get_input_embeddings()
    assert embedding.weight is model.get_output_embeddings().weight
    embedding.padding_idx = padding
    expected = gradients(model, plain_logprobs(model, ROWS), FACTORS)
    head = install_head(model)
    arrived = []
    plain = torch.Tensor.index_add_
    monkeypatch.setattr(
        torch.Tensor,
        "index_add_",
        lambda self, *rest: (arrived.append(self.data_ptr()), plain(self, *rest))[1],
    )
    found = gradients(model, token_logprobs(model, head, batch_of(ROWS, "shared")), FACTORS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    # What the head's backward made is what the optimizer will see: no other tensor of that size.
    assert arrived == [embedding.weight.grad.data_ptr()]


def test_outside_a_request_a_tied_embedding_is_as_before():
    model, other = tiny_gpt2().eval(), tiny_gpt2().eval()
    head = install_head(model)
    token_logprobs(model, head, batch_of(ROWS, "shared"))
    ids = torch.tensor([[1, 2, 3]])
    for each in (model, other):
        each(input_ids=ids).logits.sum().backward()
    assert torch.equal(model.get_input_embeddings().weight.grad, other.get_input_embeddings().weight.grad)


def test_outside_a_request_the_model_is_as_before():
    model = tiny_llama()
    ids = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids).logits
    keys = list(model.state_dict())
    head = install_head(model)
    # A tensor that cannot be an index breaks the call in the middle of the request.
    with pytest.raises(IndexError), head.answering(torch.tensor([99]), torch.tensor([1])):
        model(input_ids=ids)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert list(model.state_dict()) == keys


def test_a_batch_without_a_kept_token_is_all_zero():
    model, head = made("gpt2", torch.float32)
    logp = token_logprobs(model, head, batch_of(ROWS[:1], "shared", weights=torch.zeros(11)))
    assert logp.tolist() == [0.0] * 11
    logp.sum().backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_shared_rows_compute_the_prompt_once():
    assert batch_of(ROWS[:1], "shared").inputs.input_ids.numel() == 9 + 4 + 7
    assert batch_of(ROWS[:1], "separate").inputs.input_ids.numel() == 2 * (9 + 7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_head", [True, False])
def test_divergence_equals_that_of_all_logits(layout, with_head):
    model, head = made("gpt2", torch.float64)
    reference = tiny_gpt2(dtype=torch.float64, seed=1).eval()
    reference_head = install_head(reference)
    with torch.no_grad():
        pairs = [(row.prompt, response) for row in ROWS for response in row.responses]
        logp = torch.cat([plain_logits(model, *pair) for pair in pairs]).log_softmax(-1)
        other = torch.cat([plain_logits(reference, *pair) for pair in pairs]).log_softmax(-1)
        expected = (logp.exp() * (logp - other)).sum(-1)
    heads = (head, reference_head) if with_head else (None, None)
    found = token_kl(model, heads[0], reference, heads[1], batch_of(ROWS, layout))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-10)
    assert expected.min() > 0.1
    same = token_kl(model, heads[0], model, heads[0], batch_of(ROWS, layout))
    assert same.abs().max() == 0.0


def test_a_uniform_model_gives_the_log_of_the_vocabulary():
    model, head = made("llama", torch.float32)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    logp = token_logprobs(model, head, batch_of(ROWS, "shared"))
    assert logp.tolist() == pytest.approx([-math.log(266)] * TOTAL, abs=1e-5)
