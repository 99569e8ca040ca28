"""Measurements for the claims of docs/performance.md, one script per claim.

Run ``python -m benchmarks.NAME`` in the repository's root. ``--quick`` tries a script on a tiny model.
"""
