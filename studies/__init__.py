"""Studies: questions about token-level training, each a recipe of ``recipes/studies``, a list of arms and a script.

    python -m studies.selection --seeds 0 1 2

What was measured is kept in ``studies/values``, so that a study goes on where it was stopped and its table can be made
again from the values of each reply; models lie in ``runs/studies``. The table is written into ``docs/results.md``, the
picture into ``docs/pictures``. A changed recipe or arm is measured anew.
"""
