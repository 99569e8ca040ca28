"""Token-level preference alignment of language models.

People compare whole answers; a model learns one token at a time. tokenward finds which tokens carry
a preference and trains with them.

    import tokenward

    run = tokenward.run("recipes/quickstart.yaml")      # every stage; finished ones are skipped
    figures = tokenward.read_figures(run)

"""

import importlib
from typing import TYPE_CHECKING, Any

from tokenward.errors import UserError
from tokenward.types import Comparison, Message, Span

if TYPE_CHECKING:
    from tokenward import losses
    from tokenward.models.logprobs import token_logprobs
    from tokenward.report.page import make_report
    from tokenward.scoring.export import TokenRewards
    from tokenward.scoring.texts import TokenScorer
    from tokenward.stages.figures import read_figures
    from tokenward.stages.run import Run
    from tokenward.tools.run import open_run
    from tokenward.tools.run import run_recipe as run

__version__ = "0.1.0"

_LAZY = {
    "Run": "stages.run:Run",
    "TokenRewards": "scoring.export:TokenRewards",
    "TokenScorer": "scoring.texts:TokenScorer",
    "losses": "losses:",
    "make_report": "report.page:make_report",
    "open_run": "tools.run:open_run",
    "read_figures": "stages.figures:read_figures",
    "run": "tools.run:run_recipe",
    "token_logprobs": "models.logprobs:token_logprobs",
}

__all__ = [
    "Comparison",
    "Message",
    "Run",
    "Span",
    "TokenRewards",
    "TokenScorer",
    "UserError",
    "losses",
    "make_report",
    "open_run",
    "read_figures",
    "run",
    "token_logprobs",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; the command line's help must not wait for it.
    if name not in _LAZY:
        raise AttributeError(f"module 'tokenward' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    found = importlib.import_module(f"tokenward.{module}")
    return getattr(found, attribute) if attribute else found
