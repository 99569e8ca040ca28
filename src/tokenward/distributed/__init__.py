"""The processes that torchrun, ``accelerate launch`` or ``srun`` started for one run, and what they tell one another.

accelerate's ``PartialState`` joins them. The shell's own messages go through a second group, on gloo and almost without a
limit of time: a process may wait for hours while the first one reads data, and no timeout of NCCL may end that. One
process alone never touches ``torch.distributed``. torch is imported by :func:`start`, so that help stays fast.

Every process must make the same calls in the same order, as everywhere under these launchers. Work that is given to
:func:`first_alone` or :func:`together` is done as if its process were alone, so what it calls need not know.
"""

from tokenward.distributed.join import any_of, end, end_with_others, gather, start, wait_for_all
from tokenward.distributed.launch import (
    Place,
    alone,
    independent,
    is_first,
    not_started,
    place,
    place_of,
    share_label,
    slurm_address,
    work_alone,
)
from tokenward.distributed.share import agree, first_alone, first_enters, mean_over, split, together
from tokenward.distributed.watch import ElsewhereError, announce, leave_for, tells, told

__all__ = [
    "ElsewhereError", "Place", "agree", "alone", "announce", "any_of", "end", "end_with_others", "first_alone", "first_enters",
    "gather", "independent", "is_first", "leave_for", "mean_over", "not_started", "place", "place_of", "share_label", "slurm_address", "split",
    "start", "tells", "together", "told", "wait_for_all", "work_alone",
]  # fmt: skip
