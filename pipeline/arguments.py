"""The command line's grammar. Enters: words. Leaves: a namespace. Costs: argparse alone, so that `--help` is quick."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

EPILOG = """\
exit codes: 0 fine, 1 a problem was found, 2 bad usage or recipe, 130 interrupted
a recipe's values can be overridden:  stillroom run recipe.yaml signal.topk.k=32 students.0.seed=1"""

#: Commands that read a recipe and `key=value` words.
RECIPE_COMMANDS = {
    "run": "run a whole recipe; continues where it stopped",
    "plan": "read the corpus and plan the teacher's work, with its cost; teaches nothing",
    "generate": "have the teacher answer prompts, and judge what it wrote; continues where it stopped",
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
    more = arguments.command in RECIPE_COMMANDS or arguments.command == "transcode"
    stray = [word for word in rest if word.startswith("-") or not more]
    if stray:
        raise UsageMistake(f"unrecognized argument {stray[0]} (see stillroom {arguments.command} --help)")
    if arguments.command in RECIPE_COMMANDS:
        arguments.overrides = [*arguments.overrides, *rest]
    elif rest:
        stores = [*arguments.sources, arguments.destination, *rest]
        arguments.sources, arguments.destination = stores[:-1], stores[-1]
    if arguments.command == "inspect" and arguments.tokens and arguments.unit is None and arguments.texts is None:
        raise UsageMistake("--tokens needs --unit ID (`stillroom inspect STORE` shows some)")
    if arguments.command == "inspect" and arguments.html and (arguments.unit is not None or arguments.sql):
        raise UsageMistake("--html is of the whole store: leave out --unit and --sql")
    if arguments.command == "inspect" and arguments.sql and arguments.unit is not None:
        raise UsageMistake("--sql is of the whole store: leave out --unit")
    if arguments.command == "verify" and arguments.teacher and not arguments.rescore:
        raise UsageMistake("--teacher needs --rescore N")
    if arguments.command == "init" and not (arguments.reference or arguments.preset) and arguments.corpus is None:
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
    init.add_argument("--preset", metavar="NAME", help="print what a recipe's `preset: NAME` stands for instead")
    for name, summary in RECIPE_COMMANDS.items():
        command = add(name, summary)
        command.add_argument("recipe", metavar="RECIPE", help="a recipe file (YAML)")
        command.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="values to override")
        command.add_argument("--stage", metavar="NAME", help="of a recipe with stages, this one alone")
        if name == "run":
            command.add_argument("--dry-run", action="store_true", help="say what would run, and why; do nothing")
            command.add_argument("--redo", action="store_true",
                                 help="put aside what other settings have made, and make it anew")  # fmt: skip
    status = add("status", "say how far a run is, from another terminal or machine")
    status.add_argument("run", metavar="RUN", help="a run's folder")
    report = add("report", "write one page about runs: pipeline, students' curves, store, tokens")
    report.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, which the recipe's run_dir names")
    report.add_argument("--html", metavar="FILE", required=True, help="where to write the page")
    ls = add("ls", "list the stores under a folder")
    ls.add_argument("root", metavar="ROOT", nargs="?", default=".", help="a folder or s3://bucket/prefix (%(default)s)")
    inspect = add("inspect", "say what a store holds")
    inspect.add_argument("store", metavar="STORE", help="a store's folder")
    inspect.add_argument("--unit", metavar="ID", help="one unit of it")
    inspect.add_argument("--tokens", action="store_true", help="with --unit: its tokens, and what the teacher kept")
    inspect.add_argument(
        "--texts", type=_count, metavar="N", help="of generations: show N responses, with --tokens each one's tokens"
    )
    inspect.add_argument("--sql", action="store_true", help="print statements for DuckDB that make views of its shards")
    inspect.add_argument("--html", metavar="FILE", help="write a page about the store, to be opened by a browser")
    verify = add("verify", "read every shard and compare it with what was committed")
    _add_verify(verify)
    _add_gc(add("gc", "remove leftovers of stopped writers, and dropped shards that no pinned student needs"))
    _add_transcode(add("transcode", "make a smaller or merged store without the teacher"))
    return parser


def _add_verify(verify: argparse.ArgumentParser) -> None:
    verify.add_argument("store", metavar="STORE", help="a store's folder")
    verify.add_argument("--repair", action="store_true",
                        help="drop what is broken from the log: `stillroom teach` scores it again")  # fmt: skip
    verify.add_argument("--rescore", type=_count, metavar="N", help="also score N units again, and compare")
    verify.add_argument("--teacher", metavar="MODEL", help="with --rescore: where the teacher is now")


def _add_gc(gc: argparse.ArgumentParser) -> None:
    gc.add_argument("store", metavar="STORE", help="a store's folder")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    gc.add_argument("--older-than", type=_duration_s, default=3600.0, metavar="TIME",
                    help="spare what has changed since: 30s, 15m, 1h (the default), 2d")  # fmt: skip


def _count(word: str) -> int:
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of 1 and more")
    return int(word)


def _duration_s(word: str) -> float:
    seconds = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    if not word[:-1].isdigit() or word[-1] not in seconds:
        raise argparse.ArgumentTypeError(f"{word!r} is no time such as 30s, 15m, 1h or 2d")
    return float(word[:-1]) * seconds[word[-1]]


def _add_transcode(transcode: argparse.ArgumentParser) -> None:
    transcode.add_argument("sources", metavar="SRC", nargs="+", help="stores of one identity; they are only read")
    transcode.add_argument("destination", metavar="DST", help="the folder of the result; one that is there grows")
    transcode.add_argument("--k", type=int, metavar="N", help="kept ids per position, at most as many as now")
    transcode.add_argument("--gap-step", type=_nats, default="same", metavar="NATS",
                           help="rounding of the logits, 1/4 or 0.25; not finer than now; none: float32")  # fmt: skip
    transcode.add_argument("--layout", choices=("plain", "packed"), help="plain columns, or the smallest size")
    transcode.add_argument("--nucleus", type=_mass_at, metavar="MASS[@T]",
                           help="keep fewer ids where fewer hold this share of the probability at T (1)")  # fmt: skip
    parts = transcode.add_mutually_exclusive_group()
    parts.add_argument("--only", type=_names, metavar="PART,...",
                       help="parts to keep, of topk, sampled, hidden, layers and attention")  # fmt: skip
    parts.add_argument("--drop", type=_names, default=(), metavar="PART,...", help="parts to leave out")
    wanted = transcode.add_mutually_exclusive_group()
    wanted.add_argument("--sequences", metavar="FILE", help="digests, one a line, or a corpus manifest (.parquet)")
    wanted.add_argument("--limit-tokens", type=int, metavar="N", help="at most so many tokens, a fixed random part")
    transcode.add_argument("--unit-tokens", type=int, metavar="N", help="cut units anew, at this size")


def _nats(word: str) -> float | str | None:
    if word in ("same", "none"):
        return None if word == "none" else word
    above, slash, below = word.partition("/")
    try:
        return float(above) / float(below) if slash else float(word)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"{word!r} is no number of nats such as 1/4, and not none") from None


def _mass_at(word: str) -> tuple[float, float]:
    mass, _, temperature = word.partition("@")
    try:
        return float(mass), float(temperature or 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is not MASS or MASS@T, such as 0.9 or 0.9@2") from None


def _names(word: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in word.split(",") if name.strip())


def _common() -> _Parser:
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    common.add_argument("--quiet", action="store_true", help="no progress and notes on stderr; notices still come")
    common.add_argument("--debug", action="store_true", help="show where an error arose (also STILLROOM_DEBUG=1)")
    return common


class _Version(argparse.Action):
    """Looks the version up when asked, not at every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"stillroom {version('stillroom')}")
        parser.exit()


def _suggest_command(words: Sequence[str]) -> None:
    known = ["init", *RECIPE_COMMANDS, "status", "report", "ls", "inspect", "verify", "gc", "transcode"]
    first = next(iter(words), None)
    if first is None:
        raise UsageMistake(f"no command; expected one of {', '.join(known)} (see stillroom --help)")
    if not first.startswith("-") and first not in known:
        close = difflib.get_close_matches(first, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else f"; expected one of {', '.join(known)}"
        raise UsageMistake(f"unknown command {first}{hint}")
