"""Studies: questions about token-level training, each a recipe of ``recipes/studies``, a list of arms and a script.

    python -m studies.selection --seeds 0 1 2

What was measured is kept in ``runs/studies``, so that a study goes on where it was stopped; its table is written into
``docs/results.md``, its picture into ``docs/pictures``.
"""
