"""Reward against KL: which method gets how much reward at which distance from the start?

Methods, learning rates and the recipe of our own are chosen on the seeds :data:`LOOKED_AT`. What is claimed is measured on the seeds
:data:`CONFIRMING`, which were named here before any of them was run, with the learning rates that the first seeds chose.
"""

LOOKED_AT = (0, 1, 2)
SEEDS = (0, 1, 2, 3, 4)
"""Of the main tables: the first, and two that were run when methods, learning rates and the recipe of our own were settled."""

CONFIRMING = (10, 11, 12, 13, 14)

CONFIRMED = ("dpo", "simpo", "rl_reward", "tdpo2", "sepo30", "dpo_b1")
"""Arms that are measured on :data:`CONFIRMING`. The recipe of our own is ``rl_reward``; all were named before any of them was run there."""
