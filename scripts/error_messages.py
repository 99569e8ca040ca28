"""List the messages of all errors in one file, which a test compares with the source.

    python -m scripts.error_messages            # print it
    python -m scripts.error_messages --write    # write tests/errors.txt after changing a message

Each entry is the code of an error, its recipe key if it has one, and its message with placeholders ``{...}``.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "errors.txt"


class Message(NamedTuple):
    """An error raised in the source."""

    module: str
    code: str
    key: str
    text: str


def template(node: ast.expr) -> str:
    """A message as it is written, with ``{expression}`` for placeholders."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "{" + ast.unparse(part.value) + "}"
            for part in node.values
            if isinstance(part, ast.Constant | ast.FormattedValue)
        )
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "{" + ast.unparse(node) + "}"


def messages(root: Path = ROOT) -> Iterator[Message]:
    """Every ``UserError(...)`` of the source, in the order of the files."""
    source = root / "src" / "tokenward"
    for path in sorted(source.rglob("*.py")):
        module = ".".join(path.relative_to(source).with_suffix("").parts)
        if module == "errors":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
                given = {word.arg: template(word.value) for word in node.keywords}
                yield Message(module, given.get("code", ""), given.get("key", ""), template(node.args[0]))


def wording(found: list[Message]) -> str:
    """The messages as text, by code."""
    entries = sorted({(one.code, one.key, one.text) for one in found})
    return "".join(
        f"{code}{f'  [{key}]' if key else ''}\n    {text}\n\n".replace("\n    \n", "\n")
        for code, key, text in ((code, key, text.replace("\n", "\n    ")) for code, key, text in entries)
    )


def main() -> None:
    """Print the messages, or write them."""
    text = wording(list(messages()))
    if "--write" in sys.argv[1:]:
        GOLDEN.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
