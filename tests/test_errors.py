"""What a user is told when something cannot work: one file holds the wording, and every error carries its code."""

import re

from scripts.error_messages import GOLDEN, messages, wording

# Words with hyphens, one of two, or the code of the error that is passed on.
CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*(/[a-z0-9]+(-[a-z0-9]+)*)?|\{[^ ]*code\}")


def test_the_wording_of_every_error_is_the_one_on_file():
    """After a message was changed: ``python -m scripts.error_messages --write``, and read the difference."""
    assert wording(list(messages())) == GOLDEN.read_text(encoding="utf-8")


def test_every_error_has_a_code():
    assert not [one for one in messages() if not CODE.fullmatch(one.code)]


def test_messages_of_the_library_give_no_command():
    """The stages, tools and the command line may name commands; what a script imports may not."""
    shell = ("stages", "report", "tools", "cli", "plugins")
    commands = re.compile(
        r"tokenward (run|data|oracle|score|plan|compare|report|show|chat|export|evaluate|init|methods|config)\b"
    )
    assert not [one for one in messages() if not one.module.startswith(shell) and commands.search(one.text)]
