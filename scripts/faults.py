"""Break work and what it leaves behind on purpose, carry on, and count what becomes of it.

    python -m scripts.faults                                      # about an hour on two cores: make faults
    python -m scripts.faults --kills 4 --disks 2 --mutations 8    # a minute
    python -m scripts.faults --only mutations --mutations 500 --seed 3

Three kinds of fault, on tiny models, each in a process of its own:

- **kills**: a SIGKILL at a random moment, up to three times; then the same command runs to its end.
- **disks**: a file system with too little room; then there is room, and the same command runs to its end. Needs the right to mount.
- **mutations**: a file of a finished run is changed, cut, lost or replaced; then the run is checked and the same command runs again.

What comes back is *equal* (every file that repeats exactly has the bytes of undisturbed work), a *clear error* (one message that
says what to do), or a fault: *silent* (other bytes, and nobody says so), *traceback* or *stuck*. ``--output`` keeps each result.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import tokenward
from scripts.kill_processes import SAVES
from tests.stages.runs import EXAMPLES, PROMPTS, write_examples, write_labelled
from tests.tiny import TINY_RECIPE, planted_rows, save_tiny
from tokenward.artifacts import MANIFEST, of_system
from tokenward.errors import UserError
from tokenward.tools.check import check_run
from tokenward.tools.compare_models import compare_models
from tokenward.tools.export import export

EQUAL, ERROR, SAID = "equal", "clear error", "named by check"
SILENT, TRACEBACK, STUCK = "silent", "traceback", "stuck"
FAULTS = (SILENT, TRACEBACK, STUCK)

LIMIT = 300
"""Seconds that one command may take on a busy machine; they take a few."""

SEPO = TINY_RECIPE.replace("training: {{", f"training: {{{{{SAVES}") + "scores: {{shard_rows: 4}}\n"
TLM = EXAMPLES.replace("max_steps: 6", f"{SAVES}max_steps: 6") + "seed: 2\n"
TASK = PROMPTS.replace("max_steps: 6", f"{SAVES}max_steps: 6")
SHORT = f"training: {{learning_rate: 1.0e-3, per_device_train_batch_size: 4, {SAVES}max_steps: 4}}"
SHORT_REPLIES = ("evaluation.max_new_tokens=8",)
HEAD = f"reward={{head: {{hidden: 16, gain: 0.5}}, {SHORT}}}"


class Kind(NamedTuple):
    """A kind of work.

    Attributes:
        recipe: The recipe's text.
        changes: Changes of it.
        after: Work on the finished run that is disturbed in its place; it writes into a folder.
    """

    recipe: str
    changes: Sequence[str] = ()
    after: Callable[[Path, Path], object] | None = None


def exported(run: Path, folder: Path) -> None:
    """Export the run's model."""
    export(str(run), folder)


def judged(run: Path, folder: Path) -> None:
    """Compare the run's model with its start by a judge."""
    compare_models(
        "model",
        str(run),
        "pairs.jsonl",
        judge=Path("endpoint.yaml"),
        output=str(folder),
        overrides=SHORT_REPLIES,
    )


KINDS: dict[str, Kind] = {
    "sepo": Kind(SEPO),
    "lora": Kind(SEPO, ["model.adapter={r: 4, target_modules: all-linear}"]),
    "sft and referee": Kind(SEPO, [f"sft={{{SHORT}}}", f"eval_reward={{fraction: 0.4, {SHORT}}}"]),
    "experts": Kind(
        SEPO,
        [
            f'auxiliary_models={{better: {{prompt: "Be good. {{prompt}}", {SHORT}}}, worse: {{swap_labels: true, {SHORT}}}}}',
            "scores.scorer={name: log_ratio, numerator: better, denominator: worse}",
        ],
    ),
    "reward": Kind(SEPO, ["scores.scorer={name: reward}", HEAD]),
    "sampled": Kind(TLM),
    "prompt task": Kind(TASK),
    "export": Kind(SEPO, after=exported),
    "judge": Kind(SEPO, after=judged),
}


class Work(NamedTuple):
    """Work of a kind in a folder, which may be done again and again.

    Attributes:
        folder: The current folder of its processes.
        kind: Its name.
        name: Its folder in ``runs``.
    """

    folder: Path
    kind: str
    name: str

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "runs" / self.name

    @property
    def home(self) -> Path:
        """What is disturbed: the run's folder, or what is made of it."""
        return self.folder / "made" / self.name if KINDS[self.kind].after else self.run

    def carry_out(self) -> None:
        """Do the work, in the current process."""
        os.chdir(self.folder)
        kind = KINDS[self.kind]
        changes = [f"run=runs/{self.name}", "evaluation.bootstrap=20", *kind.changes]
        run = self.run
        if kind.after is None or not (run / "evaluation" / "metrics.json").is_file():
            tokenward.run(f"{self.kind}.yaml", changes, quiet=True)
        if kind.after is not None:
            kind.after(run, Path("made") / self.name)


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        how: ``""`` if the work was done; else a clear error, a traceback, stuck or killed.
        said: What it said.
        seconds: How long it took.
    """

    how: str
    said: str
    seconds: float


KILLED = "killed"


def in_child(work: Callable[[], object], log: Path, *, kill_after: float | None = None) -> Ended:
    """Do some work in a process of its own, which a SIGKILL may end.

    The process is a fork of this one, so that it need not import everything again.
    """
    begun = time.monotonic()
    child = os.fork()
    if not child:
        status = 3
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            status = _status_of(work)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    killed = False
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - begun
        if found:
            break
        if seconds > (LIMIT if kill_after is None else kill_after):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            killed = True
            break
        time.sleep(0.01)
    said = log.read_text(errors="replace") if log.is_file() else ""
    if killed:
        return Ended(STUCK if kill_after is None else KILLED, said, seconds)
    how = {0: "", 2: ERROR}.get(os.waitstatus_to_exitcode(status), TRACEBACK)
    return Ended(how, said, seconds)


def _status_of(work: Callable[[], object]) -> int:
    try:
        work()
    except BaseException as raised:
        error = raised if isinstance(raised, UserError) else of_system(raised)  # as the command line does
        if error is not None:
            print(f"error: {error}", file=sys.stderr)
            return 2
        traceback.print_exc()
        return 3
    return 0


def make_folder(folder: Path, address: str) -> None:
    """Write the model, the data, the judge and the recipes."""
    folder.mkdir(parents=True, exist_ok=True)
    model = save_tiny(folder / "model")
    rows = planted_rows(24)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_examples(folder / "examples.jsonl")
    write_labelled(folder)
    (folder / "endpoint.yaml").write_text(f"url: {address}/v1\nmodel: tiny\nparallel: 2\n")
    for name, kind in KINDS.items():
        (folder / f"{name}.yaml").write_text(kind.recipe.format(model=model))


UNEQUAL = {"checkpoints", "judge.json", "events.jsonl"}
"""Names of what depends on time, on stops or on what a judge was asked before."""


def contents(home: Path) -> dict[str, str]:
    """A hash of every file of a run or of what was made of it, without hidden ones and :data:`UNEQUAL`."""
    found = {}
    for path in sorted(home.rglob("*")):
        parts = path.relative_to(home).parts
        if path.is_file() and not UNEQUAL & {*parts} and not any(part.startswith(".") for part in parts):
            found["/".join(parts)] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def differing(whole: Mapping[str, str], home: Path) -> list[str]:
    """Files of undisturbed work that are not there or have other bytes."""
    now = contents(home)
    return sorted(name for name, digest in whole.items() if now.get(name) != digest)


class Undisturbed(NamedTuple):
    """Work of a kind that nobody disturbed.

    Attributes:
        work: The work; its folder stays.
        repeats: A hash of each file that came out equal twice.
        seconds: How long it took.
    """

    work: Work
    repeats: dict[str, str]
    seconds: float


def undisturbed(folder: Path, kind: str) -> Undisturbed:
    """Do the work of a kind twice.

    Raises:
        RuntimeError: it fails.
    """
    made, seconds = [], 0.0
    works = [Work(folder, kind, f"{kind} whole {number}".replace(" ", "-")) for number in range(2)]
    for work in works:
        if KINDS[kind].after is not None:  # only what is made of the run is disturbed
            _finish(Work(folder, "sepo", work.name))
        seconds = _finish(work)
        made.append(contents(work.home))
    shutil.rmtree(works[1].home)
    repeats = {name: digest for name, digest in made[0].items() if made[1].get(name) == digest}
    return Undisturbed(works[0], repeats, seconds)


def _finish(work: Work) -> float:
    ended = in_child(work.carry_out, work.folder / f"{work.name}.txt")
    if ended.how:
        raise RuntimeError(f"{work.name}: {ended.how}\n{ended.said[-4000:]}")
    return ended.seconds


def try_kills(whole: Undisturbed, number: int, draw: random.Random) -> tuple[str, str]:
    """Kill work at random moments, let it end, and compare; returns the outcome and where it was killed."""
    kind = whole.work.kind
    work = Work(whole.work.folder, kind, f"{kind} killed {number}".replace(" ", "-"))
    if KINDS[kind].after is not None:
        shutil.copytree(whole.work.run, work.run)
    ended, places = _killed(work, whole.seconds, draw)
    outcome = ended.how
    if not outcome:
        outcome = SILENT if differing(whole.repeats, work.home) else EQUAL
    where = ", ".join(places) or "not killed"
    if outcome not in (EQUAL, ERROR):
        where += f" | {differing(whole.repeats, work.home)[:3]} {ended.said[-1500:]}"
    elif outcome == ERROR:  # the same command must go on after a kill
        outcome, where = SILENT, f"{where} | refused to go on: {ended.said[-500:]}"
    for place in (work.run, work.home):
        shutil.rmtree(place, ignore_errors=True)
    return outcome, where


def _killed(work: Work, seconds: float, draw: random.Random) -> tuple[Ended, list[str]]:
    """Kill work up to three times, then let it end; returns how it ended, and where it was killed."""
    places, log = list[str](), work.folder / "killed.txt"
    for _ in range(draw.randint(1, 3)):
        ended = in_child(work.carry_out, log, kill_after=draw.uniform(0, seconds))
        if ended.how != KILLED:
            return ended, places
        places.append(work.kind if KINDS[work.kind].after else stage_of(work.run))
    return in_child(work.carry_out, log), places


def stage_of(run: Path) -> str:
    """The stage that was at work when a run was killed."""
    folders = (path for path in run.glob("[!.]*") if path.is_dir())
    begun = [path for path in folders if path.name != "report"]  # the page grows during every stage
    open_ones = [path for path in begun if not _complete(path / MANIFEST)]
    return max(open_ones, key=lambda path: path.stat().st_mtime).name if open_ones else "between stages"


def _complete(manifest: Path) -> bool:
    try:
        return bool(json.loads(manifest.read_text()).get("complete"))
    except (OSError, ValueError):
        return False


def try_disk(whole: Undisturbed, number: int, draw: random.Random) -> tuple[str, str]:
    """Work on a file system with too little room, then with enough."""
    kind, room = whole.work.kind, _size(whole.work.folder / "runs" / whole.work.name)
    size = 4096 * max(1, int(draw.uniform(0.01, 1.0) ** 2 * room * 1.5) // 4096)
    disk = whole.work.folder / f"disk{number}"
    disk.mkdir()
    _mount(disk, f"size={size}")
    try:
        for name in ("runs", "made"):
            (disk / name).mkdir()
        for path in whole.work.folder.iterdir():
            if path.is_file() or path.name == "model":
                (disk / path.name).symlink_to(path)
        work = Work(disk, kind, "full")
        if KINDS[kind].after is not None:
            (disk / "runs" / "full").symlink_to(whole.work.run)
        log = whole.work.folder / "disk.txt"
        first = in_child(work.carry_out, log)
        where = f"{size} bytes, {stage_of(work.run) if first.how else 'enough'}"
        if first.how not in ("", ERROR) or (first.how == ERROR and "disk" not in first.said):
            return first.how if first.how != ERROR else SILENT, f"{where} | {first.said[-1500:]}"
        if first.how:
            _mount(disk, "remount,size=4g")
            second = in_child(work.carry_out, log)
            if second.how:
                return second.how if second.how != ERROR else SILENT, f"{where} | {second.said[-1500:]}"
        wrong = differing(whole.repeats, work.home)
        return (SILENT, f"{where} | {wrong[:3]}") if wrong else (ERROR if first.how else EQUAL, where)
    finally:
        subprocess.run(["umount", str(disk)], check=False)
        disk.rmdir()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _mount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a file system in memory."""
    place = folder / "trial"
    place.mkdir()
    try:
        _mount(place, "size=4096")
    except (OSError, subprocess.CalledProcessError):
        return False
    subprocess.run(["umount", str(place)], check=True)
    place.rmdir()
    return True


def mutated(path: Path, others: Sequence[Path], draw: random.Random) -> str:
    """Change, cut, lose or replace a file; returns what was done."""
    data, status = path.read_bytes(), path.stat()
    place = draw.randrange(max(1, len(data)))
    flipped = bytes([data[place] ^ 1 << draw.randrange(8)]) if data else b""
    other = draw.choice([other for other in others if other != path])
    changes: dict[str, bytes | None] = {
        "longer": data + draw.choice([b"\n", b"{}", b"\0" * 8, data[:40] or b"x"]),
        "replaced": other.read_bytes(),
        "lost": None,
        "a folder": None,
    }
    if data:
        bit = data[:place] + flipped + data[place + 1 :]
        zeros = data[:place] + bytes(len(data) - place)  # as after a crash of the machine
        changes |= {
            "one bit": bit,
            "one bit, same time": bit,
            "cut": data[:place],
            "zeros": zeros,
            "emptied": b"",
        }
    what = draw.choice(sorted(changes))
    if (changed := changes[what]) is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    if what == "a folder":
        path.mkdir()
    if what == "one bit, same time":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return what


def try_mutation(whole: Undisturbed, number: int, draw: random.Random) -> tuple[str, str]:
    """Change a file of a finished run, check the run, and carry it out again."""
    work = Work(whole.work.folder, whole.work.kind, f"{whole.work.kind} changed {number}".replace(" ", "-"))
    # Copied with its name: a run knows the folders of its own models.
    shutil.move(whole.work.run, work.folder / "kept")
    shutil.copytree(work.folder / "kept", whole.work.run, symlinks=True)
    try:
        files = sorted(path for path in whole.work.run.rglob("*") if path.is_file())
        by_kind: dict[str, list[Path]] = {}
        for path in files:
            by_kind.setdefault(f"{path.parent.name}/{path.suffix}", []).append(path)
        path = draw.choice(by_kind[draw.choice(sorted(by_kind))])
        name = str(path.relative_to(whole.work.run))
        before = path.read_bytes()
        what = f"{name}: {mutated(path, files, draw)}"
        if path.is_file() and path.read_bytes() == before:
            return EQUAL, what
        return _after(whole, name, what)
    finally:
        shutil.rmtree(whole.work.run)
        shutil.move(work.folder / "kept", whole.work.run)


def _after(whole: Undisturbed, name: str, what: str) -> tuple[str, str]:
    """What becomes of a changed file: the check must name it, or the next start must make it good or refuse."""
    log = whole.work.folder / "changed.txt"
    checked = in_child(
        lambda: print(*(p for item in check_run(whole.work.run) for p in item.problems), sep="\n"), log
    )
    if checked.how not in ("", ERROR):
        return checked.how, f"{what} | check: {checked.said[-1500:]}"
    named = name in checked.said or checked.how == ERROR
    again = in_child(whole.work.carry_out, log)
    if again.how in (TRACEBACK, STUCK):
        return again.how, f"{what} | {again.said[-1500:]}"
    if again.how == ERROR:
        return ERROR, what
    wrong = differing(whole.repeats, whole.work.run)
    if not wrong:
        return EQUAL, what
    # Nothing that this command computes reads the file, so it stays as it is; but it must not pass for sound.
    return (SAID, what) if named else (SILENT, f"{what} | {wrong[:3]}")


class _Judge(BaseHTTPRequestHandler):
    """A judge that prefers the longer answer's letter by the length of the question, always the same for one request."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        letter = "AB"[hashlib.sha256(body).digest()[0] % 2]
        answer = {
            "choices": [{"message": {"content": f"[[{letter}]]"}, "finish_reason": "stop"}],
            "usage": {},
        }
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def a_judge() -> Iterator[str]:
    """The address of a judge, which answers in a process of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    child = os.fork()
    if not child:
        server.serve_forever()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        server.server_close()


TRIALS: dict[str, Callable[[Undisturbed, int, random.Random], tuple[str, str]]] = {
    "kills": try_kills,
    "disks": try_disk,
    "mutations": try_mutation,
}
MUTATED = ("sepo", "lora", "reward", "sampled")
"""Kinds of runs whose files are changed: together they have every kind of file."""


def tried(
    counts: Mapping[str, int], kinds: Sequence[str], seed: int, output: Path | None
) -> Counter[tuple[str, str]]:
    """Do all trials; a line for each fault, and a table at the end."""
    found = Counter[tuple[str, str]]()
    with a_judge() as address, tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        make_folder(folder, address)
        wholes: dict[str, Undisturbed] = {}
        for trial, count in counts.items():
            if trial == "disks" and count and not can_mount(folder):
                print("disks: this user may not mount a file system, so none was tried", flush=True)
                continue
            possible = [kind for kind in kinds if trial != "mutations" or kind in MUTATED]
            for number in range(count):
                kind = possible[number % len(possible)]
                whole = wholes.get(kind) or wholes.setdefault(kind, undisturbed(folder, kind))
                outcome, where = TRIALS[trial](whole, number, random.Random(f"{trial} {seed} {number}"))
                found[trial, outcome] += 1
                line = {"trial": trial, "number": number, "kind": kind, "outcome": outcome, "where": where}
                if output is not None:
                    with output.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                if outcome in FAULTS:
                    print(json.dumps(line), flush=True)
    return found


def main() -> int:
    """Do the trials that were asked for; the exit status is 1 if there was a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for trial, count in (("kills", 150), ("disks", 60), ("mutations", 500)):
        parser.add_argument(f"--{trial}", type=int, default=count)
    parser.add_argument("--only", choices=list(TRIALS))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    counts = {trial: getattr(given, trial) for trial in TRIALS if given.only in (None, trial)}
    begun = time.monotonic()
    found = tried(counts, given.kinds, given.seed, given.output and given.output.absolute())
    for trial in counts:
        outcomes = {outcome: number for (name, outcome), number in sorted(found.items()) if name == trial}
        print(
            f"{trial}: {sum(outcomes.values())} tried, {', '.join(f'{n} {o}' for o, n in outcomes.items())}"
        )
    faults = sum(number for (_, outcome), number in found.items() if outcome in FAULTS)
    print(f"{faults} faults, in {time.monotonic() - begun:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
