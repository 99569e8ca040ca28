"""Every training collects garbage; most of what it would look through are the libraries' own objects."""

import gc

import tokenward.tools.run  # noqa: F401  (imports them)

gc.collect()
gc.freeze()
