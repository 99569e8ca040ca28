"""The best weights so far, in memory, and when to stop waiting for better ones."""

import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

RELATIVE_GAIN = 1e-4
"""What counts as better, as a share of the best so far (the published code's value)."""


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights of a module that training changes, each once."""
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


def save_trained(module: nn.Module, path: Path) -> None:
    """Write the weights that training changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.detach().cpu().contiguous() for name, weight in trained(module)}, path)


class KeepBest:
    """Remembers a module's trained weights at the best value of a figure.

    Args:
        module: What is trained.
        larger_is_better: Which way the figure improves.
        patience: Looks in a row without a gain after which :attr:`exhausted` is true; None never is.
    """

    def __init__(self, module: nn.Module, *, larger_is_better: bool, patience: int | None) -> None:
        self._module, self._sign, self._patience = module, 1.0 if larger_is_better else -1.0, patience
        self._weights: dict[str, Tensor] = {}
        self.value: float | None = None
        self.step = 0
        self.waited = 0

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end."""
        return self._patience is not None and self.waited >= self._patience

    def look(self, value: float, step: int) -> bool:
        """Whether this is the best value so far; if so, the weights of now are kept."""
        if not self._gains(value):
            self.waited += 1
            return False
        self.value, self.step, self.waited = value, step, 0
        self._weights = {name: weight.detach().cpu().clone() for name, weight in trained(self._module)}
        return True

    def _gains(self, value: float) -> bool:
        """Whether a value is better than the best so far; one that is not finite never is."""
        if self.value is None or not math.isfinite(value):
            return math.isfinite(value)
        return self._sign * (value - self.value) > RELATIVE_GAIN * abs(self.value)

    def restore(self) -> None:
        """Put the best weights back; nothing if there was never a look."""
        for name, weight in trained(self._module):
            if name in self._weights:
                weight.data.copy_(self._weights[name])

    def state(self) -> dict[str, Any]:
        """What :meth:`load` needs beside the weights."""
        return {"value": self.value, "step": self.step, "waited": self.waited}

    def save(self, path: Path) -> None:
        """Write the kept weights."""
        save_file(self._weights, path)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Go on from what :meth:`save` and :meth:`state` gave."""
        self._weights = load_file(path)
        self.value, self.step, self.waited = state["value"], state["step"], state["waited"]


class EarlyStop(TrainerCallback):
    """Keeps the best weights by the evaluation loss, and stops when patience is at its end."""

    def __init__(self, best: KeepBest) -> None:
        self.best = best

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the loss of an evaluation."""
        self.best.look((metrics or {})["eval_loss"], state.global_step)
        if self.best.exhausted:
            control.should_training_stop = True
