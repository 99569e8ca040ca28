"""Preference losses on per-token log-probabilities, for a training loop of any kind.

Example::

    loss = losses.sepo((chosen, rejected), (chosen_mask, rejected_mask), gamma=2.0).mean()

They compute what the objectives of a recipe compute, on plain tensors. Values are padded, as trainers have them.
A loss over pairs takes ``(chosen [b t], rejected [b u])`` of each value, a loss of single responses ``[b t]``, and one of
K responses to a prompt ``[b k t]``. :func:`padded` makes such tensors of tokens that lie end to end.

Three arguments come back in every function:

* ``logp``: log-probability of each token under the policy, in nats.
* ``weights``: what each token counts, or a mask. A weight of 0 removes the token: a NaN or an infinity there changes
  nothing, and every gradient there is 0. So padding has weight 0.
* ``reference``: log-probability of each token under the frozen reference, in nats.

The result is ``[b]``, one loss per comparison, not reduced, in float32 (float64 if ``logp`` is). Where a loss takes a mean,
a response without any weight makes it NaN. A wrong shape or a scale of 0 or less raises
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
