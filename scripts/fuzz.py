"""Feed damaged and hostile inputs to everything that reads a file, and count what comes back.

    python -m scripts.fuzz                                   # 2,000 inputs of each kind
    python -m scripts.fuzz --kind readers --count 40000 --seed 7
    python -m scripts.fuzz --kind recipes --only 1234        # one input again, with its traceback
    python -m scripts.fuzz --into counts.json                # count into a file; the same command goes on where it was stopped

An input is a sound file with a few changes: bits, pieces, values of other types, texts that some library is known to stumble
over. It may be read, or refused with a UserError. Anything else is a fault: another exception, more than ``LIMIT`` seconds, or
rows that were neither kept nor counted as dropped. Input ``n`` of a seed is the same on every machine.
"""

import argparse
import contextlib
import csv
import gzip
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny import CHATML, TINY_RECIPE, planted_rows, save_tiny, tiny_tokenizer
from tokenward.artifacts import MANIFEST, Manifest, atomic_write, read_manifest
from tokenward.config import parse_recipe
from tokenward.config.judge import load_judge
from tokenward.data.prepare import load
from tokenward.errors import UserError
from tokenward.evaluation.judge import AnswerCache, read_answer
from tokenward.evaluation.judge import _is_completion as is_completion
from tokenward.methods import all_methods
from tokenward.models.loading import load_model
from tokenward.plugins import without_plugins
from tokenward.report.collect import RunFolder
from tokenward.report.given import read_spans
from tokenward.sampling import SamplingSettings
from tokenward.sampling.dialects import Completions, LlamaCpp, Odd
from tokenward.sampling.endpoint import _accepts as accepts
from tokenward.sampling.endpoint import _text as text_of
from tokenward.sampling.engines import Order
from tokenward.scoring.store import TokenRecord, TokenStore, write_shards
from tokenward.stages.lists import check_recipe
from tokenward.tokens.rows import response_key
from tokenward.tokens.template import Template
from tokenward.training.checkpoints import checkpoint_damage, record_files

LIMIT = 30
"""Seconds that one input may take on a busy machine."""

READ, REFUSED, FAULT, STUCK, LOST = "read", "refused", "other exception", "stuck", "rows lost"

JUNK: list[Any] = [
    None, True, -1, 0, 1e308, float("nan"), 10**400, "", " ", "\0", "\ud800", "\u202e", "x" * 140_000, [], {}, [[]], [None], {"": ""},
    [{"role": "user"}], [{"role": "assistant", "content": None}], {"role": "user", "content": "x"}, "~nobody/x", "../..", "os:system",
    "module:Name", "\x1b[2J", "{{", "{{ 1/0 }}", "9" * 400, -(2**63), [1, 2, 3], "NaN", "1e999", "2024-01-01", ["a"] * 50,
]  # fmt: skip
PIECES = [
    b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"\r", b"\r\n", b'"', b"\\", b"{", b"}", b"[" * 3000, b"]", b",", b":", b": ", b"- ", b"&a ", b"*a",
    b"!!python/object:os.system ", b"NaN", b"Infinity", b"-", b"9" * 5000, b"\xef\xbb\xbf", b"\x1b[31m", b"\\ud800", b"null", b"{}", b"#", b"%",
]  # fmt: skip


def damaged(data: bytes, chance: random.Random) -> bytes:
    """A file with one to four changes of its bytes."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(found) + 1)
        match chance.randrange(6):
            case 0 if found:
                found[place % len(found)] ^= 1 << chance.randrange(8)
            case 1:
                found[place:place] = chance.choice(PIECES)
            case 2:
                del found[place : place + chance.choice((1, 8, 200, len(found)))]
            case 3:
                piece = found[place : place + chance.choice((1, 40, 400))]
                found[place:place] = piece * chance.choice((1, 2, 5))
            case 4:
                del found[place:]
            case _:
                found[place : place + 1] = chance.choice(PIECES)
    return bytes(found)


def changed(value: Any, chance: random.Random) -> Any:
    """A value of JSON with a part of it replaced, removed, renamed or repeated."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(sorted(value, key=str))
        match chance.randrange(6):
            case 0:
                return {name: inner for name, inner in value.items() if name != key}
            case 1:
                return {**value, str(chance.choice(JUNK))[:40]: chance.choice(JUNK)}
            case _:
                return {**value, key: changed(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        place = chance.randrange(len(value))
        match chance.randrange(4):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return value + value[place:]
            case _:
                return [*value[:place], changed(value[place], chance), *value[place + 1 :]]
    return chance.choice(JUNK)


class Kind(NamedTuple):
    """A kind of input.

    Attributes:
        make: Prepares what all inputs share in a folder.
        try_one: Reads one input, made with a random generator; returns what came of it.
    """

    make: Callable[[Path], Any]
    try_one: Callable[[Path, Any, random.Random], str]


def _rows() -> list[list[dict[str, Any]]]:
    """Rows of every shape that the readers know."""
    ranked = planted_rows(6)
    pairs = [
        {"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][-1]}
        for row in ranked
    ]
    turns = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in pairs
    ]
    human = [
        {name: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[name]}" for name in ("chosen", "rejected")}
        for row in pairs
    ]
    alpaca = [
        {"instruction": row["prompt"], "input": "", "output": [row["chosen"], row["rejected"]]}
        for row in pairs
    ]
    unpaired = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in pairs]
    feedback = [
        {
            "instruction": row["prompt"],
            "completions": [
                {"response": text, "overall_score": score}
                for text, score in zip(row["responses"], row["scores"], strict=True)
            ],
        }
        for row in ranked
    ]
    return [ranked, pairs, turns, human, alpaca, unpaired, feedback]


def _table(rows: list[dict[str, Any]], separator: str) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
        for row in rows
    )
    return out.getvalue()


def _written(rows: list[Any], kind: str) -> bytes:
    """The rows as a file of a kind."""
    tables = [row for row in rows if isinstance(row, dict)]
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(tables), sink)
        return sink.getvalue()
    if kind in ("csv", "tsv"):
        return _table(tables, "," if kind == "csv" else "\t").encode("utf-8", "surrogatepass")
    if kind == "json":
        return json.dumps(rows).encode()
    return "".join(json.dumps(row, default=str) + "\n" for row in rows).encode()


def _try_reader(folder: Path, shapes: list[list[dict[str, Any]]], chance: random.Random) -> str:
    rows: list[Any] = chance.choice(shapes)
    if chance.random() < 0.5:
        rows = [changed(row, chance) if chance.random() < 0.4 else row for row in rows]
    kind = chance.choice(("jsonl", "jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz"))
    try:
        data = _written(rows, kind)
    except (pa.ArrowException, ValueError, TypeError, IndexError, OverflowError, UnicodeError):
        kind = "jsonl"
        data = _written(rows, kind)
    if chance.random() < 0.7:
        data = damaged(data, chance)
    if kind == "jsonl.gz":
        data = gzip.compress(data, mtime=0)
        data = damaged(data, chance) if chance.random() < 0.5 else data
    path = folder / f"rows.{kind}"
    path.write_bytes(data)
    found = load(path)
    counts = dict(found.counts)
    read, kept = counts.pop("read"), counts.pop("kept")
    expected = len([line for line in data.split(b"\n") if line.strip()]) if kind == "jsonl" else read
    whole = read == kept + sum(counts.values()) == expected and kept == len(found.comparisons)
    return READ if whole or b"\r" in data else LOST


def _recipes(folder: Path) -> list[str]:
    save_tiny(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows()[1]))
    return [TINY_RECIPE, *(method.recipe for method in all_methods().values())]


def _try_recipe(folder: Path, recipes: list[str], chance: random.Random) -> str:
    text = damaged(chance.choice(recipes).encode(), chance).decode("utf-8", "replace")
    overrides = [
        f"{chance.choice(('seed', 'data.source', 'policy.selection', 'scores.scorer', 'run', 'model'))}={chance.choice(JUNK)}"[
            :300
        ]
    ]
    loaded = parse_recipe(text, "recipe.yaml", overrides if chance.random() < 0.3 else ())
    check_recipe(loaded)
    return READ


def _manifest(folder: Path) -> bytes:
    made = Manifest.begin("oracle", {"oracle": {"beta": 0.1}, "data": {"source": "x"}}, {"data": "d"}, 1)
    made.finished({"rows": 3}, {"model/model.safetensors": (10, "ab")}).write(folder)
    return (folder / MANIFEST).read_bytes()


def _try_manifest(folder: Path, sound: bytes, chance: random.Random) -> str:
    place = folder / "run" / "oracle"
    place.mkdir(parents=True, exist_ok=True)
    if chance.random() < 0.5:
        data = damaged(sound, chance)
    else:
        data = json.dumps(changed(json.loads(sound), chance)).encode()
    (place / MANIFEST).write_bytes(data)
    RunFolder.read(folder / "run")
    found = read_manifest(place)
    return READ if found.intact() or json.loads(data) == json.loads(sound) else FAULT


def _store(folder: Path) -> tuple[bytes, Any]:
    place = folder / "store"
    keys = [f"k{number}" for number in range(40)]
    values = {"oracle_logp": [-0.5, -1.0, -1.5]}
    write_shards(
        place,
        keys,
        lambda some: (TokenRecord(key, [1, 2, 3], [0, 1, 2], [1, 2, 3], values) for key in some),
        rows_per_shard=40,
    )
    path = place / "tokens-00000.parquet"
    return path.read_bytes(), _content(place)


def _content(place: Path) -> Any:
    store = TokenStore(place)
    return [store[key] for key in store]


def _try_store(folder: Path, sound: tuple[bytes, Any], chance: random.Random) -> str:
    place = folder / "store"
    (place / "tokens-00000.parquet").write_bytes(damaged(sound[0], chance))
    return READ if _content(place) == sound[1] else FAULT


def _model(folder: Path) -> dict[str, bytes]:
    save_tiny(folder / "sound")
    return {path.name: path.read_bytes() for path in (folder / "sound").iterdir()}


def _try_model(folder: Path, sound: dict[str, bytes], chance: random.Random) -> str:
    place = folder / f"model-{chance.randrange(10**9)}"  # nothing is known of a new folder
    place.mkdir()
    name = chance.choice(sorted(sound))
    try:
        for other, data in sound.items():
            if other == name and name.endswith(".json") and chance.random() < 0.6:
                data = json.dumps(changed(json.loads(data), chance)).encode()
            elif other == name:
                data = damaged(data, chance)
            (place / other).write_bytes(data)
        model = load_model(str(place))
        model.template("chat").prompt_ids([{"role": "user", "content": "x"}])
    finally:
        for path in place.iterdir():
            path.unlink()
        place.rmdir()
    return READ


def _adapter(folder: Path) -> dict[str, bytes]:
    base = save_tiny(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        str(folder / "adapter")
    )
    return {
        path.name: path.read_bytes() for path in (folder / "adapter").iterdir() if path.name != "README.md"
    }


def _checkpoint(folder: Path) -> Path:
    place = folder / "sound" / "checkpoint-4"
    save_tiny(place)
    (place / "trainer_state.json").write_text('{"global_step": 4, "log_history": []}')
    (place / "optimizer.pt").write_bytes(bytes(range(256)) * 8)
    record_files(place)
    return place


def _try_checkpoint(folder: Path, sound: Path, chance: random.Random) -> str:
    place = folder / "checkpoint-4"
    shutil.copytree(sound, place)
    try:
        path = chance.choice(sorted(place.iterdir()))
        before = path.read_bytes()
        after = damaged(before, chance)
        path.write_bytes(after)
        found = checkpoint_damage(place)
        # Of the list itself, only a change of what it says is damage.
        if path.name == "files.json":
            return REFUSED if found else READ
        return FAULT if bool(found) != (after != before) else REFUSED if found else READ
    finally:
        shutil.rmtree(place)


ORDER = Order([1, 2, 3], SamplingSettings(max_new_tokens=4), [0], 7, logprobs=True)
ANSWERS: list[dict[str, Any]] = [
    {"choices": [{"message": {"role": "assistant", "content": "[[A]]"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    {"choices": [{"token_ids": [4, 5], "prompt_token_ids": [1, 2, 3], "finish_reason": "stop", "logprobs": {"token_logprobs": [-0.5, -1.0]}}]},
    {"tokens": [4, 5], "tokens_evaluated": 3, "truncated": False, "stop_type": "eos", "generation_settings": {"temperature": 1.0, "top_k": 0},
     "completion_probabilities": [{"id": 4, "logprob": -0.5}, {"id": 5, "logprob": -1.0}]},
]  # fmt: skip


def _try_answer(folder: Path, cache: AnswerCache, chance: random.Random) -> str:
    sound = chance.choice(ANSWERS)
    data = (
        json.dumps(changed(sound, chance)).encode() if chance.random() < 0.6 else json.dumps(sound).encode()
    )
    text = text_of(damaged(data, chance) if chance.random() < 0.5 else data)
    if accepts(is_completion, text):
        answer = read_answer(json.loads(text))
        cache.put("k", answer)
        return READ if cache.get("k") == answer else FAULT
    if accepts(lambda body: isinstance(body, dict), text):
        for dialect in (Completions(), LlamaCpp("/completion")):
            # What a server of this kind is refused for; see OpenServer.
            with contextlib.suppress(
                Odd, LookupError, TypeError, AttributeError, ValueError, ArithmeticError
            ):
                dialect.read(ORDER, json.loads(text))
                return READ
    return REFUSED


def _try_judge(folder: Path, shared: Any, chance: random.Random) -> str:
    path = folder / "judge.yaml"
    sound = "url: http://localhost:8000/v1\nmodel: m\nkey_variable: KEY\nrequest: {temperature: 0, top_p: 0.5}\nparallel: 3\nprice_in: 0.5\n"
    path.write_bytes(damaged(sound.encode(), chance))
    load_judge(path)
    return READ


def _try_spans(folder: Path, rows: list[dict[str, Any]], chance: random.Random) -> str:
    texts = {response_key((), row["responses"][0], ()): str(row["responses"][0]) for row in rows}
    keys = list(texts)
    lines = [{"key": key, "spans": [[0, 2, 1], [3, 4, -1.5]]} for key in keys[:3]]
    lines += [
        {
            "prompt": row["prompt"],
            "response": row["responses"][0],
            "spans": [{"begin_offset": 0, "end_offset": 2, "train": True}],
        }
        for row in rows[3:5]
    ]
    data = _written([changed(line, chance) if chance.random() < 0.2 else line for line in lines], "jsonl")
    path = folder / "spans.jsonl"
    path.write_bytes(damaged(data, chance) if chance.random() < 0.5 else data)
    reader = SimpleNamespace(
        run=SimpleNamespace(path=folder),
        texts=lambda wanted: {key: texts.get(key, "a reply") for key in wanted},
        store=_Texts({key: SimpleNamespace(text=texts[key]) for key in keys}),
    )
    read_spans(path, cast(Any, reader))
    return READ


class _Texts(dict[str, Any]):
    """A store that has every key; those it does not know have no text of their own."""

    def __missing__(self, key: str) -> Any:
        return SimpleNamespace(text=None)


PARTS = [
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ messages|tojson }}", "{% set s = s ~ s %}", "{{ 'x' * 10**9 }}", "{% macro f(n) %}",
    "{% endmacro %}", "{{ f(f) }}", "{% if add_generation_prompt %}", "{% endif %}", "{{ messages[0]['content'][::-1] }}", "{% set x = [x, x] %}",
    "{{ x|string|length }}", "{{ '%9999999d' % 1 }}", "{{ range(99999)|list|tojson(indent=9) }}", "{% for a in range(99999) %}", "{{ raise_exception('no') }}",
    "{{ 1 // 0 }}", "{{ messages.0.__class__ }}", "{% break %}", "{% set ns = namespace(a=1) %}", "{{ ns.a ** 9999 }}", "{{ strftime_now('%Y') }}",
    "{{ loop.index }}", "{% generation %}", "{% endgeneration %}", "{{ messages|map('upper')|join('x' * 9999) }}", "{{ '{:9999999}'.format(s) }}",
]  # fmt: skip


def _try_template(folder: Path, tokenizer: Any, chance: random.Random) -> str:
    source = CHATML if chance.random() < 0.5 else "".join(chance.choices(PARTS, k=chance.randint(1, 12)))
    for _ in range(chance.randint(0, 3)):
        place = chance.randrange(len(source) + 1)
        source = source[:place] + chance.choice(PARTS) + source[place:]
    if chance.random() < 0.4:
        source = damaged(source.encode(), chance).decode("utf-8", "replace")
    tokenizer.chat_template = source
    template = Template(tokenizer=tokenizer)
    template.conversation(
        cast(Any, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    )
    return READ


KINDS = {
    "readers": Kind(lambda folder: _rows(), _try_reader),
    "recipes": Kind(_recipes, _try_recipe),
    "manifests": Kind(_manifest, _try_manifest),
    "stores": Kind(_store, _try_store),
    "checkpoints": Kind(_checkpoint, _try_checkpoint),
    "answers": Kind(lambda folder: AnswerCache(folder / "judge.sqlite"), _try_answer),
    "judges": Kind(lambda folder: None, _try_judge),
    "spans": Kind(lambda folder: planted_rows(6), _try_spans),
    "templates": Kind(lambda folder: tiny_tokenizer(), _try_template),
    "models": Kind(_model, _try_model),
    "adapters": Kind(_adapter, _try_model),
}


class StuckError(BaseException):
    """An input took too long."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise after ``LIMIT`` seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StuckError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(kind: Kind, folder: Path, shared: Any, seed: str, *, show: bool) -> str:
    """What came of one input; with ``show``, the traceback of a fault."""
    try:
        with limited(), without_plugins("this is a test"):
            return kind.try_one(folder, shared, random.Random(seed))
    except UserError as error:
        return REFUSED if str(error).strip() else FAULT
    except StuckError:
        return STUCK
    except BaseException:
        if show:
            traceback.print_exc()
        last = traceback.extract_tb(sys.exc_info()[2])[-1]
        name = getattr(sys.exc_info()[0], "__name__", "?")
        return f"{FAULT}: {name} in {Path(last.filename).name}:{last.lineno}"


class Counts:
    """Outcomes of every kind and seed, kept in a file so that a run can go on; without a file, in memory.

    Args:
        path: The file, or None.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        known = path is not None and path.is_file()
        self._found: dict[str, dict[str, int]] = (
            json.loads(path.read_bytes()) if path is not None and known else {}
        )

    def of(self, name: str, seed: int) -> Counter[str]:
        """The outcomes so far."""
        return Counter(self._found.get(f"{name} {seed}", {}))

    def keep(self, name: str, seed: int, found: Counter[str]) -> None:
        """Write the outcomes of a kind."""
        self._found[f"{name} {seed}"] = dict(found)
        if self._path is not None:
            atomic_write(self._path, json.dumps(self._found, indent=1) + "\n")


KEPT_EVERY = 100
"""Inputs between two writes of the counts."""


def run(
    name: str, count: int, seed: int, only: int | None = None, counts: Counts | None = None
) -> Counter[str]:
    """The outcomes of some inputs of a kind; faults are printed with the number that gives them again."""
    counts = counts or Counts(None)
    kind, found = KINDS[name], counts.of(name, seed) if only is None else Counter[str]()
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        folder = Path(scratch)
        shared = kind.make(folder)
        for number in range(found.total(), count) if only is None else [only]:
            came = outcome(kind, folder, shared, f"{name} {seed} {number}", show=only is not None)
            if came not in (READ, REFUSED) and found[came] < 3:
                print(f"{name} {number}: {came}", flush=True)
            found[came] += 1
            if only is None and (found.total() % KEPT_EVERY == 0 or found.total() == count):
                counts.keep(name, seed, found)
    return found


def main() -> int:
    """Run the kinds that were asked for; the exit status is 1 if there was a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--into", type=lambda text: Path(text).absolute())
    given = parser.parse_args()
    faults, counts = 0, Counts(given.into)
    for name in given.kind or KINDS:
        begun = time.perf_counter()
        found = run(name, given.count, given.seed, given.only, counts)
        good = found.pop(READ, 0), found.pop(REFUSED, 0)
        faults += found.total()
        seconds = time.perf_counter() - begun
        print(
            f"{name}: {good[0]} read, {good[1]} refused, {found.total()} faults {dict(found) or ''} in {seconds:.0f} s",
            flush=True,
        )
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
