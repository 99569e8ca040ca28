"""Planted truth: rank sequences by hidden token scores, and test which aggregate recovers the ranks.

    OMP_NUM_THREADS=1 python -m studies.planted --seeds 3 --output docs/pictures --page docs/results.md

Groups of K sequences over 50 token types are ranked by the mean, the sum, the strongest or the worst of hidden
score, or by whether one keyword occurs; lengths are drawn independently. A token reward model of two layers
learns only from the ranks, once with every aggregate of TLM (arXiv 2306.00398). ``--tune`` compares learning rates
and temperatures on a seed that the study does not use.
"""
