"""Work of a launch: in the first process alone, or in shares."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

from tokenward.distributed.join import gather, group, start, wait_for_all
from tokenward.distributed.launch import alone, independent, is_first, place
from tokenward.distributed.watch import ElsewhereError, announce, named
from tokenward.errors import UserError

S = TypeVar("S")
T = TypeVar("T")


def agree(value: T, what: str) -> T:
    """The value, which must be equal in all processes.

    Raises:
        UserError: it differs.
    """
    found = gather(value)
    if other := next((rank for rank, item in enumerate(found) if item != found[0]), 0):
        raise UserError(
            f"{what} differs between the processes: {found[0]} in process 0, {found[other]} in process {other}. Give every process "
            "the same command, files and versions.",
            code="processes-differ",
        )
    return value


def mean_over(value: float) -> float:
    """The mean of a number of each process: of a sum that transformers keeps of a process's own losses, for example."""
    return sum(gather(value)) / (1 if alone() else place().count)


class _Outcome(NamedTuple):
    """What some work led to in one process: a value, a mistake of the user, or the text of another error."""

    value: Any = None
    mistake: UserError | None = None
    error: str = ""


def _tried(work: Callable[[], Any]) -> tuple[_Outcome, Exception | None]:
    """The outcome of some work, and its error."""
    try:
        with independent():
            return _Outcome(work()), None
    except UserError as error:
        return _Outcome(mistake=error), error
    except Exception as error:  # told to all processes, and raised again
        return _Outcome(error=named(error)), error


def first_alone(work: Callable[[], T]) -> T:
    """Do some work in the first process only; its result, or its error, reaches all. The result is pickled.

    Raises:
        UserError: the work raised it.
        ElsewhereError: the work raised another error, in a process that is not this one.
    """
    if alone():
        return work()
    import torch.distributed as dist

    start()
    outcome, error = _tried(work) if is_first() else (_Outcome(), None)
    wait_for_all()
    box = [outcome]
    dist.broadcast_object_list(box, src=0, group=group())
    return _settled([outcome if is_first() else box[0]], error)[0]


@contextmanager
def first_enters(make: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
    """Enter a context in the first process only; its value reaches all.

    Raises:
        UserError: as :func:`first_alone`.
    """
    with ExitStack() as held:
        yield first_alone(lambda: held.enter_context(make()))


def together(work: Callable[[], T]) -> list[T]:
    """Do some work in every process, without messages between them; the results of all in the order of their ranks.

    Raises:
        UserError: the work raised it in a process; of several errors, that of the first process.
        ElsewhereError: the work raised another error, in a process that is not this one.
    """
    if alone():
        return [work()]
    start()
    outcome, error = _tried(work)
    if error is not None:  # the others may work for hours before they ask
        announce(error)
    try:
        outcomes = gather(outcome)
    except RuntimeError:  # the others have ended because of the error
        if error is not None:
            raise error from None
        raise
    return _settled(outcomes, error)


def split(items: Sequence[S], work: Callable[[S], T], *, at_once: int = 16) -> Iterator[T]:
    """The result of some work on each item, in the order of the items, which are split over the processes.

    An item must give the same result in every process. Results travel after ``at_once`` items of each process. A process
    that has fewer items than others does its last one again, because a model in parts needs all processes at each call.
    """
    if alone():
        yield from map(work, items)
        return
    here = place()
    for first in range(0, len(items), at_once * here.count):
        group = items[first : first + at_once * here.count]
        calls = -(-len(group) // here.count)
        numbers = [min(call * here.count + here.rank, len(group) - 1) for call in range(calls)]
        found = together(lambda: [work(group[number]) for number in numbers])  # noqa: B023  called at once
        yield from (found[number % here.count][number // here.count] for number in range(len(group)))


def _settled(outcomes: list[_Outcome], own: Exception | None) -> list[Any]:
    failed = next((item for item in outcomes if item.mistake is not None or item.error), None)
    if failed is None:
        return [item.value for item in outcomes]
    if own is not None:
        raise own
    raise failed.mistake if failed.mistake is not None else ElsewhereError(failed.error)
