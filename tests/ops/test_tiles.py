"""The tiled head against the plain form: values, gradients, and how much exists at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenward.ops.logprob import chunked_statistics, entropy_of, kl_of, logprobs_of
from tokenward.ops.tiles import LinearHead, Reference, linear_statistics

N, D, V = 7, 5, 23


def case(*, bias: bool = True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    head = LinearHead(normal(V, D).requires_grad_(), normal(V).requires_grad_() if bias else None)
    other = Reference(normal(N, D), LinearHead(normal(V, D)))
    ids = torch.randint(V, (N,), generator=generator)
    return normal(N, D).requires_grad_(), ids, head, other


def plain(hidden, ids, head, other, direction="reverse"):
    logits = hidden @ head.weight.T
    logits = logits if head.bias is None else logits + head.bias
    theirs = other.hidden @ other.head.weight.T
    return logprobs_of(logits, ids), entropy_of(logits), kl_of(logits, theirs, direction)


def loss(statistics, factors):
    weights = torch.cos(torch.arange(N, dtype=torch.float64))
    return sum(factor * (item * weights).sum() for factor, item in zip(factors, statistics, strict=True))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("bias", [True, False])
def test_any_tile_gives_the_plain_values_and_gradients(bias, direction):
    hidden, ids, head, other = case(bias=bias)
    inputs = [item for item in (hidden, *head[:2]) if item is not None]
    expected = plain(hidden, ids, head, other, direction)
    asked = {"reference": other, "direction": direction}
    mixtures = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, -2, 3))
    slopes = [torch.autograd.grad(loss(expected, part), inputs, retain_graph=True) for part in mixtures]
    for elements in (1, N * 4, N * V, 10**6):
        made = linear_statistics(hidden, ids, head, ("entropy", "kl"), elements=elements, **asked)
        found = tuple(made.values())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for part, slope in zip(mixtures, slopes, strict=True):
            mine = torch.autograd.grad(loss(found, part), inputs, retain_graph=True)
            torch.testing.assert_close(mine, slope, rtol=0, atol=1e-12)


def ranks(rows, head, ids, *, elements=None, chunk=None):
    """By the tiled head, or by the chunked one."""
    if chunk is None:
        return linear_statistics(rows, ids, head, ("token_rank",), elements=elements)["token_rank"]
    found = chunked_statistics(rows, ids, lambda part: part @ head.weight.T, ("token_rank",), chunk=chunk)
    return found["token_rank"]


WAYS = [{"elements": 1}, {"elements": 2 * 2}, {"elements": 10**6}, {"chunk": 1}, {"chunk": 100}]


def test_ranks_by_hand():
    """Logits 2, 5, 2, 9, 5: equals share a rank, whichever tile they are in."""
    head = LinearHead(torch.tensor([[2.0], [5.0], [2.0], [9.0], [5.0]], dtype=torch.float64))
    one = torch.ones(5, 1, dtype=torch.float64)
    for way in WAYS:
        assert ranks(one, head, torch.arange(5), **way).tolist() == [3, 1, 3, 0, 1]
        # Turned round, the smallest is the most probable.
        assert ranks(-one, head, torch.arange(5), **way).tolist() == [0, 2, 0, 4, 2]


@pytest.mark.parametrize("elements", [1, N * 4, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ranks_are_those_of_the_whole_logits(dtype, elements):
    """Half precision has many equal logits, and no token is above itself or its equals."""
    hidden, ids, head, other = case(dtype=dtype)
    found = linear_statistics(
        hidden, ids, head, ("entropy", "kl", "token_rank"), reference=other, elements=elements
    )
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias).double()
    own = logits.gather(1, ids[:, None])
    assert found["token_rank"].tolist() == (logits > own).sum(-1).tolist()
    plain = linear_statistics(hidden, ids, head, ("entropy", "kl"), reference=other, elements=elements)
    assert all(torch.equal(found[name], value) for name, value in plain.items())
    assert plain.keys() == {"logp", "entropy", "kl"}


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_has_no_gradient_and_takes_none_from_the_rest(way):
    hidden, ids, head, _ = case(bias=False)
    head = LinearHead(head.weight)
    chunked = "chunk" in way

    def slopes(rank):
        names = ("token_rank",) if rank else ()
        if chunked:
            found = chunked_statistics(hidden, ids, lambda part: part @ head.weight.T, names, **way)
        else:
            found = linear_statistics(hidden, ids, head, names, **way)
        assert not rank or not found["token_rank"].requires_grad
        weights = found["token_rank"] + 1 if rank else 1.0
        plain = ranks(hidden.detach(), head, ids, **way) + 1
        return torch.autograd.grad(
            (found["logp"] * (weights / plain if rank else 1)).sum(), [hidden, head.weight]
        )

    for one, other in zip(slopes(rank=True), slopes(rank=False), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_what_was_not_asked_for_is_not_there():
    hidden, ids, head, other = case()
    found = linear_statistics(hidden, ids, head)
    assert found.keys() == {"logp"}
    torch.testing.assert_close(found["logp"], plain(hidden, ids, head, other)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_finite_differences(direction):
    hidden, ids, head, other = case()

    def function(hidden, weight, bias):
        head = LinearHead(weight, bias)
        found = linear_statistics(
            hidden, ids, head, ("entropy", "kl"), reference=other, direction=direction, elements=N * 6
        )
        return tuple(found.values())

    assert torch.autograd.gradcheck(function, (hidden, *head[:2]))


def test_frozen_weights_get_no_gradient_and_the_states_do():
    hidden, ids, head, other = case()
    frozen = LinearHead(head.weight.detach(), None)
    (mine,) = torch.autograd.grad(linear_statistics(hidden, ids, frozen)["logp"].sum(), [hidden])
    (theirs,) = torch.autograd.grad(plain(hidden, ids, frozen, other)[0].sum(), [hidden])
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_logits_never_exist_beyond_a_tile():
    """No tensor that any operation makes, forward or backward, is larger than a tile or than what was given."""
    sizes = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            made = function(*arguments, **(options or {}))
            sizes.extend(item.numel() for item in tree_leaves(made) if isinstance(item, torch.Tensor))
            return made

    hidden, ids, head, _ = case()
    many, ids = hidden.detach().repeat(60, 1).requires_grad_(), ids.repeat(60)
    with Seen():
        linear_statistics(many, ids, head, elements=many.shape[0] * 4)["logp"].sum().backward()
    assert max(sizes) <= many.numel() < many.shape[0] * V


def test_a_token_that_cannot_come_has_no_share():
    """A logit of -inf adds nothing to the entropy and to the KL, and its gradient is 0."""
    hidden, ids, head, other = case()
    ids = ids.clamp(min=1)
    with torch.no_grad():
        head.bias[0] = -torch.inf
    found = linear_statistics(hidden, ids, head, ("entropy", "kl"), reference=other, elements=N * 4)
    logits = (hidden @ head.weight.T + head.bias)[:, 1:]
    torch.testing.assert_close(found["entropy"], entropy_of(logits), rtol=0, atol=1e-12)
    grads = torch.autograd.grad(sum(item.sum() for item in found.values()), [hidden, *head[:2]])
    assert all(grad.isfinite().all() for grad in grads)
    assert float(grads[2][0]) == 0


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_token_that_neither_model_can_write_leaves_the_divergence_as_it_is(direction):
    hidden, ids, head, other = case()
    barred = torch.zeros(V, dtype=torch.float64)
    barred[0] = -torch.inf
    with torch.no_grad():
        head.bias[0] = -torch.inf
    other = Reference(other.hidden, LinearHead(other.head.weight, barred))
    found = linear_statistics(
        hidden, ids.clamp(min=1), head, ("kl",), reference=other, direction=direction, elements=N * 4
    )
    logits = (hidden @ head.weight.T + head.bias)[:, 1:]
    expected = kl_of(logits, (other.hidden @ other.head.weight.T)[:, 1:], direction)
    torch.testing.assert_close(found["kl"], expected, rtol=0, atol=1e-12)
    grads = torch.autograd.grad(found["kl"].sum(), [hidden, *head[:2]])
    assert all(grad.isfinite().all() for grad in grads)
    assert float(grads[2][0]) == 0
    (slope,) = torch.autograd.grad(expected.sum(), [hidden])
    torch.testing.assert_close(grads[0], slope, rtol=0, atol=1e-12)


def test_a_token_that_only_the_reference_writes_makes_the_forward_divergence_infinite():
    hidden, ids, head, other = case()
    with torch.no_grad():
        head.bias[0] = -torch.inf
    for elements in (N * 4, N * V):
        found = linear_statistics(
            hidden, ids.clamp(min=1), head, ("kl",), reference=other, direction="forward", elements=elements
        )
        assert found["kl"].tolist() == [torch.inf] * N


@pytest.mark.parametrize("elements", [N * 4, N * V])
def test_a_share_too_small_to_be_written_adds_nothing_even_where_the_model_cannot_write_it(elements):
    """The published TDPO code has 0 times -inf there."""
    hidden, ids, head, other = case()
    unlikely = torch.zeros(V, dtype=torch.float64)
    unlikely[-1] = 2000.0  # the others' shares underflow, after the first tile has had a share of 1
    with torch.no_grad():
        head.bias[0] = -torch.inf
    other = Reference(other.hidden, LinearHead(other.head.weight, unlikely))
    settings = {"reference": other, "direction": "forward", "elements": elements}
    found = linear_statistics(hidden, ids.clamp(min=1), head, ("kl",), **settings)["kl"]
    logits = hidden @ head.weight.T + head.bias
    expected = -logits.log_softmax(-1)[:, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    theirs = other.hidden @ other.head.weight.T + unlikely
    torch.testing.assert_close(kl_of(logits, theirs, "forward"), expected, rtol=0, atol=1e-10)


def test_sums_stay_exact_in_half_precision():
    """Products in bfloat16, sums over the vocabulary in float32: the probabilities add up to 1."""
    hidden, _, head, _ = case(dtype=torch.bfloat16, bias=False)
    total = sum(linear_statistics(hidden, torch.full((N,), token), head)["logp"].exp() for token in range(V))
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, torch.ones(N), rtol=0, atol=1e-5)


def test_gradients_have_the_type_of_what_they_belong_to():
    hidden, ids, head, _ = case(dtype=torch.float32)
    found = linear_statistics(hidden, ids, head, dtype=torch.bfloat16)
    exact = linear_statistics(hidden, ids, head)
    assert found["logp"].dtype == torch.float32
    torch.testing.assert_close(found["logp"], exact["logp"], rtol=0, atol=0.1)
    grads = torch.autograd.grad(found["logp"].sum(), [hidden, *head[:2]])
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_no_token_at_all():
    hidden, _, head, _ = case()
    found = linear_statistics(hidden[:0], torch.tensor([], dtype=torch.int64), head, ("entropy",))
    assert found["logp"].shape == (0,)
    found["logp"].sum().backward()
    assert float(head.weight.grad.abs().sum()) == 0
