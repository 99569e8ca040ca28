"""Law 3: shared rows, separate rows and plain transformers calls give the same numbers and gradients.

GPT-2 computes in float64 throughout and is held to 1e-10, as is Llama with its RMSNorm in float64. The RMSNorm of
transformers computes in float32 whatever the dtype of the weights: a gradient that reaches the shared prompt as one sum is
rounded once instead of once per response, so there the gradients agree to float32 only.
"""

import math
from dataclasses import replace

import pytest
import torch

from tests.models.plain import plain_logprobs, token_logprobs
from tests.tiny import tiny_gpt2, tiny_llama
from tests.tokens.rows import encoded
from tokenward.models.head import SelectiveHead, install_head
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
SOME = (torch.arange(TOTAL) % 3 != 1).float()
"""Weights, some of them 0."""


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
    """Gradient of the weighted sum of log-probabilities by each parameter."""
    model.zero_grad()
    (logp * factors.to(logp.dtype)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def largest(slopes):
    return max(float(slope.abs().max()) for slope in slopes.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "dtype", "exact", "with_head", "values", "slopes"),
    [
        ("gpt2", torch.float64, True, True, 1e-10, 1e-10),
        ("gpt2", torch.float64, True, False, 1e-10, 1e-10),
        ("llama", torch.float64, True, True, 1e-10, 1e-10),
        ("llama", torch.float64, False, True, 1e-10, 1e-6),
        ("gpt2", torch.float32, False, True, 1e-5, 1e-5),
        ("llama", torch.float32, False, True, 1e-5, 1e-5),
    ],
)
def test_rows_equal_plain_calls(request, layout, name, dtype, exact, with_head, values, slopes):
    if exact:
        request.getfixturevalue("exact_llama")
    model, head = made(name, dtype)
    expected = plain_logprobs(model, ROWS)
    expected_gradients = gradients(model, expected, FACTORS)
    found = token_logprobs(model, head if with_head else None, batch_of(ROWS, layout))
    torch.testing.assert_close(found, expected, rtol=0, atol=values)
    atol = slopes * largest(expected_gradients)
    torch.testing.assert_close(gradients(model, found, FACTORS), expected_gradients, rtol=0, atol=atol)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("order", "pad_id"), [([2, 0, 1], 0), ([1, 2], 249), ([0], 0)])
def test_order_neighbors_and_padding_change_nothing(layout, order, pad_id):
    model, head = made("gpt2", torch.float64)
    rows = [ROWS[index] for index in order]
    found = token_logprobs(model, head, batch_of(rows, layout, pad_id=pad_id))
    torch.testing.assert_close(found, plain_logprobs(model, rows), rtol=0, atol=1e-10)


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_of_weight_zero_are_removed(layout, with_head):
    model, head = made("gpt2", torch.float64)
    plain, kept = plain_logprobs(model, ROWS), SOME != 0
    expected_gradients = gradients(model, plain, FACTORS * SOME)
    found = token_logprobs(model, head if with_head else None, batch_of(ROWS, layout, weights=SOME))
    torch.testing.assert_close(found, torch.where(kept, plain, 0.0), rtol=0, atol=1e-10)
    # The factors of removed tokens are not 0 here, but have no effect.
    torch.testing.assert_close(gradients(model, found, FACTORS), expected_gradients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_removed_response_has_no_gradient(layout):
    # Every id occurs once, so the gradient of an embedding row is that of one token.
    row = encoded([1, 2, 3], [4, 5, 6], [7, 8, 9])
    model = tiny_llama(tie_word_embeddings=False, dtype=torch.float64)
    head = install_head(model)
    batch = batch_of([row], layout, weights=torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 0.0]))
    token_logprobs(model, head, batch).sum().backward()
    reached = model.get_input_embeddings().weight.grad.abs().sum(-1).nonzero()[:, 0].tolist()
    # The prompt, and the token before the second kept one: nothing of response 1, nothing later.
    assert reached == [1, 2, 3, 7]
    model, head = made("gpt2", torch.float32)
    logp = token_logprobs(model, head, batch_of(ROWS[:1], layout, weights=torch.zeros(11)))
    assert logp.tolist() == [0.0] * 11
    logp.sum().backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_states_of_unselected_positions_have_no_effect():
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
def test_tied_weight_gets_one_gradient_tensor(padding, monkeypatch):
    """The gradient of the embedding is added to that of the head; the padding row gets none from the embedding."""
    model = tiny_gpt2(dtype=torch.float64).eval()
    embedding = model.get_input_embeddings()
    assert embedding.weight is model.get_output_embeddings().weight
    embedding.padding_idx = padding
    expected = gradients(model, plain_logprobs(model, ROWS), FACTORS)
    head, arrived, plain = install_head(model), [], torch.Tensor.index_add_
    seen = lambda self, *rest: (arrived.append(self.data_ptr()), plain(self, *rest))[1]  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "index_add_", seen)
    found = gradients(model, token_logprobs(model, head, batch_of(ROWS, "shared")), FACTORS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert arrived == [embedding.weight.grad.data_ptr()], "no other tensor of that size"


def test_outside_a_request_the_model_is_unchanged():
    model, other, ids = tiny_gpt2().eval(), tiny_gpt2().eval(), torch.tensor([[1, 2, 3]])
    head = install_head(model)
    token_logprobs(model, head, batch_of(ROWS, "shared"))
    # An index out of range breaks a call in the middle of a request.
    with pytest.raises(IndexError), head.answering(torch.tensor([99]), torch.tensor([1])):
        model(input_ids=ids)
    found = [each(input_ids=ids).logits for each in (model, other)]
    assert torch.equal(*found)
    assert list(model.state_dict()) == list(other.state_dict())
    slopes = [gradients(*each, torch.ones(1)) for each in zip((model, other), found, strict=True)]
    assert all(torch.equal(slope, slopes[1][name]) for name, slope in slopes[0].items())


def test_shared_rows_compute_the_prompt_once():
    assert batch_of(ROWS[:1], "shared").inputs.input_ids.numel() == 9 + 4 + 7
    assert batch_of(ROWS[:1], "separate").inputs.input_ids.numel() == 2 * (9 + 7)


def test_uniform_model_gives_the_log_of_the_vocabulary():
    model, head = made("llama", torch.float32)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    logp = token_logprobs(model, head, batch_of(ROWS, "shared"))
    assert logp.tolist() == pytest.approx([-math.log(266)] * TOTAL, abs=1e-5)
