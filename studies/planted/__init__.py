"""Planted truth: rank sequences by a hidden token score, and see which aggregate finds it again.

    OMP_NUM_THREADS=1 python -m studies.planted --seeds 3 --output docs/pictures --page docs/results.md

Groups of K sequences over 50 token types are ranked by the mean, the sum, the strongest or the worst of hidden
scores, or by whether one keyword is there; lengths are drawn on their own. A token reward model of two layers
learns from the ranks alone, once with every aggregate of TLM (arXiv 2306.00398). ``--tune`` prints what learning
rates and temperatures do on a seed that the study never uses.
"""
