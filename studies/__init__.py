"""Studies of token-level training. Each is a recipe in ``recipes/studies``, a list of arms and a script.

    python -m studies.selection --seeds 0 1 2

Measurements are stored in ``studies/values``, so a stopped study resumes, and its table can be made again from the values
of each reply. Models are stored in ``runs/studies``. The table is written into a page of ``docs``, the picture into
``docs/pictures``. If a recipe or an arm changes, it is measured again.
"""
