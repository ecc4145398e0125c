"""The `stillroom` command: words in, an exit code out. Results go to stdout, everything else to stderr.

Enters: argv. Leaves: 0 fine, 1 a problem was found, 2 bad usage or recipe, 130 interrupted. Costs: each command
imports what it needs when it runs; `--help` imports argparse and nothing of weight (0.1 s).
"""

import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stillroom.pipeline.arguments import RECIPE_COMMANDS, UsageMistake, parse
from stillroom.pipeline.console import Console

Result = dict[str, Any]
INTERRUPTED = 130
#: Removed files shown by name.
_SHOWN_REMOVED = 40
#: Characters shown of texts in a table.
_SHOWN_TEXT = {"prompt": 200, "response": 400}


def main(words: Sequence[str] | None = None) -> int:
    """Run one command. An error that stillroom raises on purpose, and one of the operating system, is one line."""
    words = sys.argv[1:] if words is None else words
    json_wanted, debug = "--json" in words, "--debug" in words or os.environ.get("STILLROOM_DEBUG") == "1"
    try:
        arguments = parse(words)
        result, code = _dispatch(arguments, Console(quiet=arguments.quiet))
        # These have shown their tables on stderr, as they went along.
        shown = arguments.command in ("run", "train", "evaluate") and not getattr(arguments, "dry_run", False)
        if json_wanted or not shown:
            _show(result if json_wanted else _for_people(arguments.command, result), json_wanted=json_wanted)
        return code
    except UsageMistake as mistake:
        return _fail(mistake, 2, json_wanted=json_wanted, debug=debug)
    except KeyboardInterrupt:
        line = "interrupted; the same command continues where it stopped"
        print(f"stillroom: {line}", file=sys.stderr)
        if json_wanted:
            _show({"error": line, "kind": "Interrupted", "exit_code": INTERRUPTED}, json_wanted=True)
        return INTERRUPTED
    except BrokenPipeError:  # `stillroom ls | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a folder that cannot be written, a full disk
        return _fail(error, 1, json_wanted=json_wanted, debug=debug)
    except Exception as error:
        from stillroom.storage.errors import StillroomError

        if not isinstance(error, StillroomError):  # a bug: its traceback is the report
            raise
        return _fail(error, error.exit_code, json_wanted=json_wanted, debug=debug)


def _dispatch(arguments: Namespace, console: Console) -> tuple[Result, int]:
    if arguments.command in RECIPE_COMMANDS:
        return _recipe_command(arguments, console)
    return _OTHERS[arguments.command](arguments, console)


def _recipe_command(arguments: Namespace, console: Console) -> tuple[Result, int]:
    from stillroom.pipeline.process import locks_of, only_one, terminable
    from stillroom.pipeline.recipe import load_chain, notices, save_resolved
    from stillroom.pipeline.run_status import RESOLVED

    # train and evaluate work from the store; corpus and teacher may be gone by then
    files = arguments.command in ("run", "plan", "generate", "teach")
    chain = load_chain(arguments.recipe, arguments.overrides, files=files)
    if arguments.stage is not None or arguments.command != "run":
        chain = chain.only(arguments.stage)
    for notice in dict.fromkeys(notice for stage in chain.stages for notice in notices(stage.recipe)):
        console.notice(notice)
    if arguments.command == "run" and arguments.dry_run:
        from stillroom.pipeline.stages.dry_run import dry_run

        return dry_run(chain), 0
    read_through = chain.stages[0].recipe.train.read_through
    with terminable(), only_one(chain.run_dir, locks_of(arguments.command, read_through=read_through)):
        if arguments.command == "run":
            from stillroom.pipeline.stages.run import run_whole

            result = run_whole(chain, console=console, redo=arguments.redo)
        else:
            recipe = chain.stages[0].recipe
            resolved = recipe.run_dir / RESOLVED
            if arguments.command != "plan" and not resolved.exists():  # `status` and `report` read the folder by it
                save_resolved(recipe, resolved)
            result = _stage(arguments.command)(recipe, console=console)
    if result.get("quarantined"):  # of `teach`: all that could be committed is
        from stillroom.pipeline.quarantine import left_out

        store = result.get("store", chain.stages[0].recipe.store.path)
        print(f"stillroom: error: {left_out(result['quarantined'], store)}", file=sys.stderr)
        return result, 1
    return result, 0


def _stage(command: str) -> Callable[..., Result]:
    """The function that does a recipe command. Imported here and not above: torch and ray take seconds."""
    match command:
        case "plan":
            from stillroom.pipeline.plan import plan_command

            return plan_command
        case "generate":
            from stillroom.pipeline.generate import generate_command

            return generate_command
        case "teach":
            from stillroom.pipeline.precompute import teach_command

            return teach_command
        case "train":
            from stillroom.pipeline.train import train_command

            return train_command
    from stillroom.pipeline.evaluate import evaluate_command

    return evaluate_command


def _for_people(command: str, result: Result) -> Result:
    """What a terminal has room for; `--json` has it all."""
    if command == "plan" and "estimate" in result:
        from stillroom.pipeline.options import brief

        return result | {"estimate": result["estimate"] | {"options": brief(result["estimate"]["options"])}}
    return result


def _init(arguments: Namespace, console: Console) -> tuple[Result, int]:
    from stillroom.pipeline.recipe import reference, starter

    if arguments.preset:
        from stillroom.pipeline.recipe.stages import preset_text

        text = preset_text(arguments.preset)
        if arguments.json:
            return {"preset": arguments.preset, "recipe": text}, 0
        print(text, end="")
        return {}, 0
    if arguments.reference:
        if arguments.json:
            return {"fields": reference.reference_rows()}, 0
        print(reference.reference_text())
        return {}, 0
    path = Path(arguments.output)
    starter.write_starter(path, arguments.model, arguments.corpus, force=arguments.force)
    console.info(f"wrote {path}; look it through, then: stillroom plan {path}")
    return {"recipe": str(path)} if arguments.json else {}, 0


def _ls(arguments: Namespace, console: Console) -> tuple[Result, int]:
    from stillroom.storage.catalog.generations import generation_rows
    from stillroom.storage.catalog.stores import list_stores, problem_rows, reuse_rows, table_rows

    stores = list_stores(arguments.root)
    if not stores:
        console.info(f"no store under {arguments.root}")
    if arguments.json:
        return {"stores": stores}, 0
    # what fits a terminal; --json has it all
    fold = sys.stdout.isatty()
    shown = {
        "stores": table_rows(stores, arguments.root, fold=fold),
        "generations": generation_rows(stores, arguments.root, fold=fold),
        "reuse": reuse_rows(stores, arguments.root, fold=fold),
        "problems": problem_rows(stores, arguments.root),
    }
    return {name: rows for name, rows in shown.items() if rows}, 0


def _inspect(arguments: Namespace, console: Console) -> tuple[Result, int]:
    from stillroom.storage.catalog.inspect import inspect_store
    from stillroom.storage.files import open_files
    from stillroom.storage.generations.store import holds_generations

    if arguments.sql:
        return _views(arguments), 0
    if arguments.html:
        from stillroom.pipeline.report.command import inspect_page

        return inspect_page(arguments.store, arguments.html, console), 0
    if holds_generations(open_files(arguments.store)):
        return _inspect_generations(arguments), 0
    if arguments.texts:
        raise UsageMistake(f"--texts is of generations, and {arguments.store} is no store of them")
    result = inspect_store(arguments.store, unit=arguments.unit)
    if not arguments.tokens:
        for sequence in result.get("sequences", []) if arguments.unit else []:
            sequence.pop("positions", None)
    return result, 0


def _inspect_generations(arguments: Namespace) -> Result:
    from stillroom.storage.catalog.generations import inspect_generations

    result = inspect_generations(arguments.store, arguments.unit, texts=arguments.texts or 0, tokens=arguments.tokens)
    if not arguments.json:  # what fits a terminal; --json has it all
        for row in result.get("responses_shown", []):
            del row["prompt_digest"]
            for name, length in _SHOWN_TEXT.items():
                row[name] = row[name] and _shortened(row[name], length)
    return result


def _shortened(text: str, length: int) -> str:
    """On one line, as line ends are not the table's."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length // 2]} … {line[len(line) - length // 2 :]}"


def _status(arguments: Namespace, console: Console) -> tuple[Result, int]:
    from stillroom.pipeline.run_status import status_command

    return status_command(arguments.run), 0


def _report(arguments: Namespace, console: Console) -> tuple[Result, int]:
    from stillroom.pipeline.process import terminable
    from stillroom.pipeline.report.command import report

    with terminable():
        return report(arguments.runs, arguments.html, console), 0


def _views(arguments: Namespace) -> Result:
    from stillroom.storage.catalog.views import views_sql
    from stillroom.storage.store import open_store

    statements = views_sql(open_store(arguments.store))
    if arguments.json:
        return {"sql": statements}
    print(statements, end="")
    return {}


def _verify(arguments: Namespace, console: Console) -> tuple[Result, int]:
    from stillroom.pipeline.process import terminable
    from stillroom.storage.care.repair import repair_store
    from stillroom.storage.care.verify import verify_store
    from stillroom.storage.files import open_files
    from stillroom.storage.generations.store import holds_generations

    if arguments.rescore and holds_generations(open_files(arguments.store)):
        raise UsageMistake("--rescore asks a teacher for its signal again: leave it out for a store of generations")
    check = repair_store if arguments.repair else verify_store
    with terminable(), console.progress(None, "shards", label="verify") as progress:
        result = check(arguments.store, progress.update)
    if arguments.rescore:
        _rescore(arguments, console, result)
    if arguments.repair and any(problem.get("repaired") for problem in result["problems"]):
        stage = "generate" if result["kind"] == "generations" else "teach"
        console.info(f"verify: what was dropped is to be made again: run `stillroom {stage}` on the store's recipe")
    return result, 1 if any(not problem.get("repaired") for problem in result["problems"]) else 0


def _rescore(arguments: Namespace, console: Console, result: Result) -> None:
    """Add to a report of `verify` what the teacher says; of shards that it found whole."""
    from stillroom.pipeline.process import terminable
    from stillroom.pipeline.rescore import rescore_store

    skip = {problem["shard"] for problem in result["problems"] if "shard" in problem}
    with terminable(), console.progress(None, "units", label="rescore") as progress:
        found = rescore_store(
            arguments.store,
            arguments.rescore,
            teacher=arguments.teacher,
            skip=skip,
            drop=arguments.repair,
            progress=progress.update,
        )
    result["problems"] += found["problems"]
    result["rescored"] = found["rescored"]


def _gc(arguments: Namespace, console: Console) -> tuple[Result, int]:
    from stillroom.pipeline.process import terminable
    from stillroom.storage.care.gc import collect_garbage

    with terminable():
        result = collect_garbage(arguments.store, older_than_s=arguments.older_than, dry_run=arguments.dry_run)
    if not arguments.json:  # what fits a terminal; --json has it all
        result["removed"] = result["removed"][:_SHOWN_REMOVED]
    return result, 0


def _transcode(arguments: Namespace, console: Console) -> tuple[Result, int]:
    from stillroom.pipeline.process import terminable
    from stillroom.storage.records import NucleusSpec
    from stillroom.storage.surgery.changes import Changes
    from stillroom.storage.surgery.plan import read_sequences
    from stillroom.storage.surgery.transcode import transcode

    nucleus = NucleusSpec(*arguments.nucleus) if arguments.nucleus else None
    changes = Changes(arguments.k, arguments.gap_step, arguments.layout, nucleus, arguments.only, arguments.drop)
    wanted = read_sequences(Path(arguments.sequences)) if arguments.sequences else None
    with terminable(), console.progress(None, "tokens", label="transcode") as progress:
        result = transcode(
            arguments.sources,
            arguments.destination,
            changes,
            sequences=wanted,
            limit_tokens=arguments.limit_tokens,
            unit_tokens=arguments.unit_tokens,
            progress=progress.update,
        )
    if result["sequences_missing"]:
        console.notice(
            f"{result['sequences_missing']:,} of the sequences named are in no source, and not in the result"
        )
    from stillroom.pipeline.fidelity import before_and_after

    result["fidelity"] = before_and_after(arguments.sources[0], arguments.destination, console)
    return result, 0


_OTHERS: dict[str, Callable[[Namespace, Console], tuple[Result, int]]] = {
    "init": _init, "status": _status, "report": _report, "ls": _ls, "inspect": _inspect, "verify": _verify, "gc": _gc,
    "transcode": _transcode,
}  # fmt: skip


def _show(result: Result, *, json_wanted: bool) -> None:
    from stillroom.pipeline import results

    if json_wanted:
        results.print_json(result, sys.stdout)
    else:
        results.print_tables(result, sys.stdout)
    sys.stdout.flush()


def _fail(error: BaseException, code: int, *, json_wanted: bool, debug: bool) -> int:
    """One line on stderr; with --json also one object on stdout, so that a program always finds one there."""
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    line = " ".join(str(error).split())
    print(f"stillroom: error: {line}", file=sys.stderr)
    if json_wanted:
        from stillroom.pipeline import results

        results.print_json({"error": line, "kind": type(error).__name__, "exit_code": code}, sys.stdout)
    return code
