"""Measurements behind the claims of docs/performance.md, one script a claim.

``python -m benchmarks.NAME`` from the repository's root; ``--quick`` tries a script out on a tiny model.
"""
