"""The command line's grammar. Enters: words. Leaves: a namespace. Costs: argparse alone, so that `--help` is quick."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

EPILOG = """\
exit codes: 0 fine, 1 a problem was found, 2 bad usage or recipe, 130 interrupted
a recipe's values can be overridden:  stillroom run recipe.yaml signal.k=32 students.0.seed=1"""

#: Commands that read a recipe and `key=value` words.
RECIPE_COMMANDS = {
    "run": "run a whole recipe; continues where it stopped",
    "plan": "read the corpus and plan the teacher's work, with its cost; teaches nothing",
    "teach": "plan, then run the teacher on what the store does not hold yet",
    "train": "train the students from the store; needs no teacher",
    "evaluate": "measure teacher and students on the held-out documents",
}


class UsageMistake(Exception):
    """Words that are no command; the message is one line."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of printing the usage and leaving; abbreviated options are refused."""

    def error(self, message: str) -> NoReturn:
        raise UsageMistake(f"{message} (see {self.prog} --help)")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Raises UsageMistake; SystemExit(0) after `--help` and `--version`.

    Options may stand between overrides: argparse alone would refuse what follows them.
    """
    parser = _build()
    _suggest_command(words)
    arguments, rest = parser.parse_known_args(words)
    stray = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if stray:
        raise UsageMistake(f"unrecognized argument {stray[0]} (see stillroom {arguments.command} --help)")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    if arguments.command == "inspect" and arguments.tokens and arguments.unit is None:
        raise UsageMistake("--tokens needs --unit ID (`stillroom inspect STORE` shows some)")
    if arguments.command == "init" and not arguments.reference and arguments.corpus is None:
        raise UsageMistake("init needs MODEL and CORPUS (see stillroom init --help)")
    return arguments


def _build() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stillroom", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        description="Keeps a teacher's logits, made once, and trains any number of students from them.",
    )  # fmt: skip
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    common = _common()

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", parents=[common], allow_abbrev=False
        )

    init = add("init", "write a starter recipe, with comments")
    init.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="the teacher: a folder, a Hugging Face id, a .gguf file or package:NAME",
    )
    init.add_argument("corpus", metavar="CORPUS", nargs="?", help="the text: a file, a folder or a glob")
    init.add_argument("-o", "--output", metavar="FILE", default="recipe.yaml", help="where to write it (%(default)s)")
    init.add_argument("--force", action="store_true", help="overwrite a recipe that is there")
    init.add_argument("--reference", action="store_true", help="print every field of a recipe instead")
    for name, summary in RECIPE_COMMANDS.items():
        command = add(name, summary)
        command.add_argument("recipe", metavar="RECIPE", help="a recipe file (YAML)")
        command.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="values to override")
    ls = add("ls", "list the stores under a folder")
    ls.add_argument("root", metavar="ROOT", nargs="?", default=".", help="where to look (the current folder)")
    inspect = add("inspect", "say what a store holds")
    inspect.add_argument("store", metavar="STORE", help="a store's folder")
    inspect.add_argument("--unit", metavar="ID", help="one unit of it")
    inspect.add_argument("--tokens", action="store_true", help="with --unit: its tokens, and what the teacher kept")
    verify = add("verify", "read every shard and compare it with what was committed")
    verify.add_argument("store", metavar="STORE", help="a store's folder")
    return parser


def _common() -> _Parser:
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    common.add_argument("--quiet", action="store_true", help="no progress and notes on stderr")
    common.add_argument("--debug", action="store_true", help="show where an error arose (also STILLROOM_DEBUG=1)")
    return common


class _Version(argparse.Action):
    """Looks the version up when asked, not at every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"stillroom {version('stillroom')}")
        parser.exit()


def _suggest_command(words: Sequence[str]) -> None:
    known = ["init", *RECIPE_COMMANDS, "ls", "inspect", "verify"]
    first = next(iter(words), None)
    if first is None:
        raise UsageMistake(f"no command; expected one of {', '.join(known)} (see stillroom --help)")
    if not first.startswith("-") and first not in known:
        close = difflib.get_close_matches(first, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else f"; expected one of {', '.join(known)}"
        raise UsageMistake(f"unknown command {first}{hint}")
