"""Losses on padded tensors: a hand-worked number for each, common laws, and equality with the objectives."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.objectives.tools import batch_of, values
from tokenward import UserError, losses
from tokenward.objectives import (
    DPO,
    IPO,
    KTO,
    ORPO,
    SFT,
    TBPO,
    TDPO,
    Pairwise,
    PlackettLuce,
    Reinforce,
    Selected,
    SePO,
    SimPO,
    SparsePO,
    TokenKL,
    TReg,
)
from tokenward.ops import links
from tokenward.plugins import build
from tokenward.scoring.scorers import SCORERS
from tokenward.selection import SELECTORS

LOG2 = math.log(2)


class Given(NamedTuple):
    """All inputs that a loss can take; each is (chosen, rejected)."""

    logp: Any
    weights: Any
    reference: Any
    kl: Any
    rewards: Any
    entropy: Any

    def lists(self) -> "Given":
        """The pairs as lists of two responses."""
        return Given(*(torch.stack(item, 1) for item in self))


def pair(chosen, rejected):
    return torch.tensor([chosen]), torch.tensor([rejected])


# Sums of log-ratios are 1 and -1, means of log-probabilities -0.75 and -1.5.
HAND = Given(
    logp=pair([-1.0, -0.5, math.nan], [-2.0, -1.0, math.inf]),
    weights=pair([1, 1, 0], [1, 1, 0]),
    reference=pair([-1.5, -1.0, math.nan], [-1.0, -1.0, math.nan]),
    kl=pair([0.25, 0.25, math.nan], [0.5, 0.5, math.nan]),
    rewards=pair([1.0, 0.0, math.nan], [1.0, 0.0, math.nan]),
    entropy=pair([1.0, 1.0, math.nan], [1.0, 1.0, math.nan]),
)
MASKS = (pair([2.0, 0.0, math.nan], [1.0, 1.0, math.nan]), pair([1.0, 1.0, math.nan], [0.0, 2.0, math.nan]))


def ratio(g: Given) -> tuple:
    return g.logp, g.weights, g.reference


def signed(g: Given):
    return g.weights[0], -g.weights[1]


def to_log2(g: Given):
    """Rewards of log 2 for the first chosen token and, once clamped, for the first rejected one."""
    return LOG2 * g.rewards[0], 5 * LOG2 * g.rewards[1]


def sizes(g: Given, of: int) -> Tensor:
    return torch.full((len(g.logp[0]),), of)


def both_masks(g: Given, masks=MASKS):
    return (*ratio(g), g.kl, *masks)


def ranked(g: Given, **settings) -> Tensor:
    g, ranks = g.lists(), torch.tensor([[0, 1]] * len(g.logp[0]))
    return losses.plackett_luce(g.logp, g.weights, ranks, **settings)


def sampled(g: Given, with_reference: bool = False, **settings) -> Tensor:
    g = g.lists()
    return losses.reinforce(*g[:2], g.rewards, g.entropy, g.reference if with_reference else None, **settings)


def of_good(g: Given, good: bool = True, **settings) -> Tensor:
    row = (item[0] for item in ratio(g))
    return losses.kto(*row, torch.full((len(g.logp[0]),), good), **settings)


# -log sigma(z): 1 -> 0.3132617, 0.5 -> 0.4740770, 0.875 -> 0.3484446, 0.75 -> 0.3868710, -0.1 -> 0.7443967
BY_HAND: dict[str, tuple[Callable[[Given], Tensor], float]] = {
    "dpo: z = 0.5 (1 - -1)": (lambda g: losses.dpo(*ratio(g), beta=0.5), 0.3132617),
    "smoothed: + 0.1 x 1": (lambda g: losses.dpo(*ratio(g), beta=0.5, label_smoothing=0.1), 0.4132617),
    "hinge: 1 - 0.25 x 2": (lambda g: losses.pairwise(*ratio(g), link=links.hinge, beta=0.25), 0.5),
    "means, margin: z = 2 x 0.75 - 1": (
        lambda g: losses.pairwise(*g[:2], beta=2.0, margin=1.0, mean=True),
        0.4740770,
    ),
    "ipo: (0.5 - -0.5 - 2)^2": (lambda g: losses.ipo(*ratio(g), beta=0.25), 1.0),
    "sepo: z = 2 x 0.75 - 1": (lambda g: losses.sepo(*g[:2], gamma=2.0, margin=1.0), 0.4740770),
    # sums over 2 and 4: -0.75 and -0.75
    "sepo: lengths": (lambda g: losses.sepo(*g[:2], lengths=(sizes(g, 2), sizes(g, 4))), LOG2),
    # the rejected mean is -1 x -3 / 2
    "sepo: signed: z = 2 (-0.75 - 1.5)": (lambda g: losses.sepo(g.logp, signed(g)), 4.5110477),
    "simpo: z = 2 x 0.75 - 1": (lambda g: losses.simpo(*g[:2], beta=2.0, gamma=1.0), 0.4740770),
    # of each side the less probable token: z = 1.5 (-1 - -2) - 1.6
    "confpo": (lambda g: losses.confpo(*g[:2]), 0.7443967),
    # odds of exp(-0.75) and exp(-1.5): 0.8952551 and 0.2872169; 0.75 + log(1 + 0.2872169 / 0.8952551)
    "orpo": (lambda g: losses.orpo(*g[:2], beta=1.0), 1.0282537),
    "tdpo: z = 0.5 (2 - 0.5 (1 - 0.5))": (lambda g: losses.tdpo(*ratio(g), g.kl, beta=0.5), 0.3484446),
    "tdpo: signed: z = 0.5 (1 - 1 - 0.5 (1 - 0.5))": (
        lambda g: losses.tdpo(g.logp, signed(g), g.reference, g.kl, beta=0.5),
        0.7575990,
    ),
    "tgdpo: z = 0.5 (1.5 x 0.5 + 0.5 - 0.5 x -1)": (
        lambda g: losses.tgdpo(*ratio(g), g.rewards, beta=0.5),
        0.3484446,
    ),
    "tis: z = 0.5 (2 x 0.5 + 0.5 - 0.5 x -1)": (
        lambda g: losses.tis_dpo(*ratio(g), to_log2(g), low=-LOG2, high=LOG2, beta=0.5),
        0.3132617,
    ),
    # z = 0.5 (2 x 0.5 - -1 - (2 x 0.5 - 0.5)) = 0.75, masks 0.1 (2 + 2) + 0.01 (2 + 2)
    "sparsepo": (
        lambda g: losses.sparsepo(*both_masks(g), beta=0.5, l1_ratio=0.1, l1_kl=0.01),
        0.3868710 + 0.44,
    ),
    "sparsepo: signed: z = 0.5 (1 - 1 - (1 - 0.5))": (
        lambda g: losses.sparsepo(g.logp, signed(g), *both_masks(g)[2:], beta=0.5),
        0.8259394,
    ),
    "tbpo: hinges of 1.5 and 0.5": (lambda g: losses.tbpo(*ratio(g), beta=1.0, link=links.hinge), 0.25),
    "tbpo: both less 0.25": (lambda g: losses.tbpo(*ratio(g), g.kl, beta=1.0, link=links.hinge), 0.375),
    # sigma(-1) = 0.2689414; -0.5 x 0.2689414 x (-1.5 + 3)
    "treg": (lambda g: losses.treg(g.logp, signed(g), g.reference, beta=0.5), -0.2017061),
    "kto: 1 - sigma(2 (1 - 0.5))": (lambda g: of_good(g, anchor=0.5, beta=2.0), 0.2689414),
    "kto: 0.5 (1 - sigma(-1))": (
        lambda g: of_good(g, False, anchor=0.5, beta=2.0, undesirable_weight=0.5),
        0.3655293,
    ),
    "likelihood: 1.5 / 2": (lambda g: losses.weighted_likelihood(g.logp[0], g.weights[0]), 0.75),
    "likelihood: 1.5 / 6": (
        lambda g: losses.weighted_likelihood(g.logp[0], g.weights[0], lengths=sizes(g, 6)),
        0.25,
    ),
    "kl: 0.25 + 0.25": (lambda g: losses.token_kl(g.kl[0], g.weights[0]), 0.5),
    "kl: by the weight's size": (lambda g: losses.token_kl(g.kl[1], signed(g)[1]), 1.0),
    "reinforce: (1 + 2) / 4 - 0.125": (sampled, 0.625),
    # mean log-probabilities x C: -1.5 and -3
    "plackett_luce: z = 1.5": (ranked, 0.2014133),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_loss_equals_hand_worked_number(name):
    loss, expected = BY_HAND[name]
    found = loss(HAND)
    assert found.dtype == torch.float32
    assert found.tolist() == [pytest.approx(expected, abs=1e-6)]


def drawn(seed: int = 0) -> Given:
    """Two pairs of 4 and 3 tokens, of which the last has no weight."""
    generator = torch.Generator().manual_seed(seed)

    def draw(sign: float) -> Any:
        sides = [torch.rand(2, t, generator=generator, dtype=torch.float64) for t in (4, 4)]
        return tuple((sign * (side + 0.1)).requires_grad_() for side in sides)

    weights = tuple(torch.tensor([[1.0, 0.5, 2.0, 0.0], [1.0, 0.0, 1.5, 0.0]]) for _ in range(2))
    return Given(draw(-1), weights, draw(-1), draw(1), draw(1), draw(1))


def leaves(given: Given) -> list[Tensor]:
    return [side for item in given for side in item if side.requires_grad]


def changed(given: Given, change: Callable[[Tensor, Tensor], Tensor]) -> Given:
    """Apply a function of value and weight to every input except the weights."""

    def of(item):
        return tuple(
            change(side.detach(), weight).requires_grad_()
            for side, weight in zip(item, given.weights, strict=True)
        )

    return Given(*(item if item is given.weights else of(item) for item in given))


def masks_of(given: Given):
    return given.rewards, given.entropy


LAWFUL = {name: loss for name, (loss, _) in BY_HAND.items() if not name.startswith("sparsepo")} | {
    "sparsepo": lambda g: losses.sparsepo(*both_masks(g, masks_of(g)), l1_ratio=0.125, l1_kl=0.25),
    "returns": lambda g: sampled(
        g, True, discount=0.9, kl=0.3, baseline="leave_one_out", mean_over="sequence"
    ),
    "softmax": partial(ranked, aggregate="softmax", length_neutral=True),
}


@pytest.mark.parametrize("name", LAWFUL)
def test_token_without_weight_has_no_effect(name):
    """Its values change neither the loss, to the bit, nor a gradient."""
    loss, plain = LAWFUL[name], drawn()
    expected = loss(plain)
    for nothing in (math.nan, math.inf, -math.inf):
        broken = changed(plain, lambda side, weight, of=nothing: torch.where(weight != 0, side, of))
        found = loss(broken)
        assert torch.equal(found, expected)
        found.sum().backward()
        for side in leaves(broken):
            gradient = torch.zeros_like(side) if side.grad is None else side.grad
            assert gradient.isfinite().all()
            assert not gradient[:, 3].any()
        assert any(side.grad is not None and side.grad.any() for side in leaves(broken))
    assert torch.equal(loss(Given(*(tuple(side[:, :3] for side in item) for item in plain))), expected)


@pytest.mark.parametrize("name", LAWFUL)
def test_gradients_match_finite_differences(name):
    given = drawn(1)
    # Inputs that a loss detaches stay fixed.
    moving = given.kl if name.startswith("kl") else given.logp

    def of(*sides):
        return LAWFUL[name](given._replace(**{"kl" if name.startswith("kl") else "logp": sides}))

    if not name.startswith(("treg", "returns")):
        assert torch.autograd.gradcheck(of, moving)


LENGTHS, WEIGHTS = [(3, 2), (1, 4)], [1.0, 0.0, 0.5, 2.0, 1.0, 1.0, 1.5, 0.0, 1.0, 2.0]
BELOW_MEAN = [{"threshold": {"at": "mean", "keep": "below"}}]


def conf() -> Selected:
    return Selected(
        SimPO(beta=1.5, gamma=1.6),
        build("selection", "transform", {"steps": BELOW_MEAN}, SELECTORS),
        build("scorer", "probability", {"of": "policy"}, SCORERS),
    )


OBJECTIVES: dict[str, tuple[Any, Callable[[Given], Tensor]]] = {
    "dpo": (
        DPO(beta=0.3, label_smoothing=0.1),
        lambda g: losses.dpo(*ratio(g), beta=0.3, label_smoothing=0.1),
    ),
    "ipo": (IPO(beta=0.3), lambda g: losses.ipo(*ratio(g), beta=0.3)),
    "robust": (
        Pairwise(link="robust", label_smoothing=0.2, margin=0.3),
        lambda g: losses.pairwise(*ratio(g), link=partial(links.robust, label_smoothing=0.2), margin=0.3),
    ),
    "sepo": (SePO(gamma=1.5, margin=0.3), lambda g: losses.sepo(*g[:2], gamma=1.5, margin=0.3)),
    "simpo": (SimPO(beta=1.5, gamma=0.7), lambda g: losses.simpo(*g[:2], beta=1.5, gamma=0.7)),
    "confpo": (conf(), lambda g: losses.confpo(*g[:2])),
    "orpo": (ORPO(beta=0.3), lambda g: losses.orpo(*g[:2], beta=0.3)),
    "tdpo": (TDPO(beta=0.3, alpha=0.4), lambda g: losses.tdpo(*ratio(g), g.kl, beta=0.3, alpha=0.4)),
    "tdpo1": (
        TDPO(beta=0.2, version=1),
        lambda g: losses.tdpo(*ratio(g), g.kl, beta=0.2, alpha=1.0, stop_gradient=False),
    ),
    "sparsepo": (
        SparsePO(masks="weights", l1_ratio=0.125, l1_kl=0.25),
        lambda g: losses.sparsepo(*both_masks(g, (ones(g), ones(g))), l1_ratio=0.125, l1_kl=0.25),
    ),
    "tbpo": (TBPO(beta=0.3), lambda g: losses.tbpo(*ratio(g), g.kl, beta=0.3)),
    "treg": (TReg(beta=0.3), lambda g: losses.treg(*ratio(g), beta=0.3)),
    "kto": (
        KTO(anchor="zero", undesirable=0.5),
        lambda g: (of_good(g) + of_good(flip(g), False, undesirable_weight=0.5)) / 2,
    ),
    "likelihood": (SFT(), lambda g: losses.weighted_likelihood(g.logp[0], g.weights[0])),
    "kl": (TokenKL(), lambda g: sum(map(losses.token_kl, g.kl, g.weights))),
    "reinforce": (Reinforce(kl=0.3, baseline="mean"), lambda g: sampled(g, True, kl=0.3, baseline="mean")),
    "plackett_luce": (PlackettLuce(aggregate="softmin"), partial(ranked, aggregate="softmin")),
}


def ones(g: Given):
    return tuple(map(torch.ones_like, g.logp))


def flip(g: Given) -> Given:
    return Given(*(item[::-1] for item in g))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_equal_the_objectives_to_the_bit(name):
    objective, loss = OBJECTIVES[name]
    known = values(len(WEIGHTS))
    # Online selection reads tokens without weight too; their log-probability would be 0 here.
    batch = batch_of(known, LENGTHS, [1.0] * 10 if name == "confpo" else WEIGHTS)

    def sides(value):
        rows = losses.padded(value, batch.response, batch.responses)
        return rows[0::2], rows[1::2]

    flat = (known.logp, batch.weights, known.reference, known.kl, known.scores, known.entropy)
    assert torch.equal(loss(Given(*map(sides, flat))), objective(known.logp, batch).loss)


def test_half_precision_is_computed_in_float32():
    logp = tuple(side.bfloat16() for side in HAND.logp)
    assert losses.simpo(logp, HAND.weights).dtype == torch.float32


def test_lists_may_have_unequal_lengths():
    rewards = torch.tensor([[[1.0], [2.0], [0.5]], [[2.0], [1.0], [math.nan]]])
    weights, ranks = torch.tensor([[[1], [1], [1]], [[1], [1], [0]]]), torch.tensor([[1, 0, 2], [0, 1, 9]])
    found = losses.plackett_luce(rewards, weights, ranks)
    alone = losses.plackett_luce(rewards[1:, :2], weights[1:, :2], ranks[1:, :2])
    assert found[1:].tolist() == alone.tolist() == [pytest.approx(0.3132617, abs=1e-6)]


@pytest.mark.parametrize(("over", "expected"), [("token", 6.0 / 3), ("sequence", (1.0 + 4.0) / 2)])
def test_mean_over_sequences_weights_each_response_equally(over, expected):
    # -r log pi is 1 and 1 of two tokens, and 4 of one
    logp, rewards = torch.tensor([[[-1.0, -1.0], [-2.0, 0.0]]]), torch.tensor([[[1.0, 1.0], [2.0, 9.0]]])
    weights = torch.tensor([[[1, 1], [1, 0]]])
    assert losses.reinforce(logp, weights, rewards, mean_over=over).tolist() == [expected]


STOPPED: dict[str, tuple[Callable[[Given], Tensor], str, int]] = {
    "tdpo": (lambda g: losses.tdpo(*ratio(g), g.kl), "kl", 0),
    "tgdpo": (lambda g: losses.tgdpo(*ratio(g), g.rewards), "rewards", 0),
    "tis_dpo": (lambda g: losses.tis_dpo(*ratio(g), g.rewards, low=-1.0, high=1.0), "rewards", 1),
    "reinforce": (sampled, "rewards", 0),
    "kto": (lambda g: of_good(g, anchor=g.kl[0].sum(-1)), "kl", 0),
}


@pytest.mark.parametrize("name", STOPPED)
def test_detached_inputs_get_no_gradient(name):
    loss, value, side = STOPPED[name]
    given = drawn()
    loss(given).sum().backward()
    gradient = getattr(given, value)[side].grad
    assert gradient is None or not gradient.any()
    assert given.logp[0].grad.any()


def test_treg_pair_weight_is_differentiable_on_request():
    def gradient(stop):
        given = drawn()
        losses.treg(*ratio(given), stop_gradient=stop).sum().backward()
        return given.reference[0].grad

    assert gradient(True) is None or not gradient(True).any()
    assert gradient(False).any()


def test_confpo_loss_of_equally_probable_tokens_is_zero():
    logp = (torch.full((1, 2), -1.0, requires_grad=True), torch.tensor([[-1.0, -2.0]], requires_grad=True))
    loss = losses.confpo(logp, (torch.ones(1, 2), torch.ones(1, 2)))
    loss.sum().backward()
    assert loss.tolist() == [0.0]
    assert [side.grad.tolist() for side in logp] == [[[0.0, 0.0]]] * 2


def test_padded_accepts_unsorted_responses():
    found = losses.padded(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 0, 2]), 3)
    assert found.tolist() == [[2.0, 0.0], [0.0, 0.0], [1.0, 3.0]]


ROW, SIDE = torch.zeros(2, 3), (torch.zeros(2, 3), torch.zeros(2, 4))
LIST, LABELS = ROW[None], torch.tensor([True, False])
WRONG: dict[str, tuple[str, Callable[[], Any]]] = {
    r"x\.chunk\(2\)": ("wrong-shape", lambda: losses.simpo(torch.zeros(4, 3), SIDE)),  # type: ignore[arg-type]
    "per token": ("wrong-shape", lambda: losses.simpo((torch.zeros(2), torch.zeros(2)), SIDE)),
    r"reference\[1\].*\[2, 5\].*logp\[1\]: \[2, 4\]": (
        "wrong-shape", lambda: losses.dpo(SIDE, SIDE, (ROW, torch.zeros(2, 5)))
    ),
    "2 chosen and 3 rejected": ("wrong-shape", lambda: losses.simpo((ROW, torch.zeros(3, 3)), SIDE)),
    r"lengths\[0\]": ("wrong-shape", lambda: losses.sepo(SIDE, SIDE, lengths=SIDE)),
    "row per response": ("wrong-shape", lambda: losses.token_kl(SIDE, ROW)),  # type: ignore[arg-type]
    r"x.view\(b, k, -1\)": ("wrong-shape", lambda: losses.plackett_luce(ROW, ROW, ROW)),
    "ranks": ("wrong-shape", lambda: losses.plackett_luce(LIST, LIST, LIST)),
    "desirable": ("wrong-shape", lambda: losses.kto(ROW, ROW, ROW, ROW)),
    "values and response": ("wrong-shape", lambda: losses.padded(ROW, ROW, 2)),
    "beta .* -1": ("out-of-range", lambda: losses.ipo(SIDE, SIDE, SIDE, beta=-1.0)),
    "label_smoothing .* 0.5": ("out-of-range", lambda: losses.dpo(SIDE, SIDE, SIDE, label_smoothing=0.5)),
    "result of link": ("wrong-shape", lambda: losses.pairwise(SIDE, SIDE, link=lambda z: z.mean())),
    "per position": ("wrong-shape", lambda: losses.tbpo((ROW, ROW), (ROW + 1, ROW + 1), (ROW, ROW), link=lambda z: z.mean())),
    r"anchor .*\[2, 1\]": ("wrong-shape", lambda: losses.kto(ROW, ROW, ROW, LABELS, torch.zeros(2, 1))),
    "anchor": ("wrong-shape", lambda: losses.kto(ROW, ROW, ROW, LABELS, torch.zeros(1))),
    "labels > 0": ("wrong-labels", lambda: losses.kto(ROW, ROW, ROW, torch.tensor([1, -1]))),
    "desirable_weight": ("out-of-range", lambda: losses.kto(ROW, ROW, ROW, LABELS, desirable_weight=-1.0)),
    r"discount .* \[0, 1\], got 2": ("out-of-range", lambda: losses.reinforce(LIST, LIST, LIST, discount=2.0)),
    "alpha": ("out-of-range", lambda: losses.reinforce(LIST, LIST, LIST, alpha=-1.0)),
    "kl": ("out-of-range", lambda: losses.reinforce(LIST, LIST, LIST, LIST, LIST, kl=-1.0)),
    r"beta .*\[2, 1\]": ("wrong-shape", lambda: losses.dpo(SIDE, SIDE, SIDE, beta=torch.ones(2, 1))),  # type: ignore[arg-type]
    r"margin .*\[2, 1\]": ("wrong-shape", lambda: losses.sepo(SIDE, SIDE, margin=torch.ones(2, 1))),  # type: ignore[arg-type]
    "gamma .* nan": ("out-of-range", lambda: losses.simpo(SIDE, SIDE, gamma=float("nan"))),
    "beta .* 0": ("out-of-range", lambda: losses.simpo(SIDE, SIDE, beta=0.0)),
    "low .* at most high": ("out-of-range", lambda: losses.tis_dpo(SIDE, SIDE, SIDE, SIDE, low=1.0, high=-1.0)),
    "l1_kl": ("out-of-range", lambda: losses.sparsepo(SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, l1_kl=-1.0)),
    "integers from 0 to 1": ("out-of-range", lambda: losses.padded(torch.ones(2), torch.tensor([0, -1]), 2)),
    "none, mean, leave_one_out": ("unknown-value", lambda: losses.reinforce(LIST, LIST, LIST, baseline="loo")),  # type: ignore[arg-type]
    "average, sum, softmax": ("unknown-value", lambda: losses.plackett_luce(LIST, LIST, ROW[:1], aggregate="mean")),  # type: ignore[arg-type]
    "no reference": ("missing-reference", lambda: losses.reinforce(LIST, LIST, LIST, kl=0.1)),
    "tie of 13": ("too-many-ties", lambda: losses.plackett_luce(torch.ones(1, 13, 1), torch.ones(1, 13, 1), torch.zeros(1, 13))),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_refused(message):
    code, call = WRONG[message]
    with pytest.raises(UserError, match=message) as error:
        call()
    assert error.value.code == code


def test_kto_reads_zeros_and_ones_as_booleans():
    logp, ones, anchor = -torch.rand(3, 4), torch.ones(3, 4), torch.tensor([0.1, 0.2, 0.3])
    labels = torch.tensor([1, 0, 1])
    found = losses.kto(logp, ones, logp - 1, labels, anchor)
    assert found.shape == (3,)
    assert torch.equal(found, losses.kto(logp, ones, logp - 1, labels.bool(), anchor))
    expected = 1 - torch.sigmoid(0.1 * (4 - anchor) * torch.tensor([1.0, -1.0, 1.0]))
    torch.testing.assert_close(found, expected)
