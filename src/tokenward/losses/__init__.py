"""Preference losses on per-token log-probabilities, for a training loop of any kind.

Example::

    loss = losses.sepo((chosen, rejected), (chosen_mask, rejected_mask), gamma=2.0).mean()

These are the losses that the objectives of a recipe compute, on plain padded tensors. A loss over pairs takes
``(chosen [b t], rejected [b u])`` for each value, a loss of single responses ``[b t]``, and a loss of K responses to a
prompt ``[b k t]``. :func:`padded` makes such tensors from tokens that lie end to end.

These arguments are common to many functions:

* ``logp``: log-probability of each token under the policy, in nats.
* ``weights``: weight of each token, or a mask. A weight of 0 removes the token: a NaN or an infinity there has no
  effect, and all gradients there are 0. Give padding a weight of 0.
* ``reference``: log-probability of each token under the frozen reference, in nats.
* ``kl`` of a pair: KL(reference || policy) over the whole vocabulary at each token, in nats, with gradients.
* ``beta``: scale of the margin, > 0.

The result is ``[b]``, one loss per comparison without reduction, in float32 (float64 if ``logp`` is). A loss that takes a
mean is NaN for a response without any weight. A wrong shape or a setting out of range raises
:class:`tokenward.UserError`. :mod:`tokenward.ops.links` has links for :func:`pairwise` and :func:`tbpo`.
"""

from tokenward.losses.pairs import (
    confpo,
    dpo,
    ipo,
    orpo,
    pairwise,
    sepo,
    simpo,
    sparsepo,
    tbpo,
    tdpo,
    tgdpo,
    tis_dpo,
    treg,
)
from tokenward.losses.responses import kto, plackett_luce, reinforce, token_kl, weighted_likelihood
from tokenward.losses.tokens import Pair, padded

__all__ = [
    "Pair", "confpo", "dpo", "ipo", "kto", "orpo", "padded", "pairwise", "plackett_luce", "reinforce", "sepo",
    "simpo", "sparsepo", "tbpo", "tdpo", "tgdpo", "tis_dpo", "token_kl", "treg", "weighted_likelihood",
]  # fmt: skip
