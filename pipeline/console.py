"""What a person sees: notes, tables and progress on stderr, so that stdout stays free for results.

Enters: text and numbers. Leaves: lines on a stream; bars where the stream is a terminal, else plain lines, at most one
in 5 s. Costs: nothing until the first line; rich (0.1 s) is imported only for tables and bars.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

#: Seconds between two plain lines of the same progress.
PLAIN_INTERVAL_S = 5.0
#: Width of a table where the stream is no terminal and has none of its own.
PLAIN_WIDTH = 160


class Progress(Protocol):
    """What `Console.progress` gives to the code that makes the progress."""

    def advance(self, steps: float = 1) -> None:
        """So many more are done."""

    def update(self, done: float, total: float | None = None) -> None:
        """So many are done altogether; `total` where the end becomes known on the way."""

    def note(self, text: str) -> None:
        """Set the words behind the numbers, such as a loss."""


class Console:
    """Writes for people. One object per process; its methods are called from one thread.

    quiet: keep notes, tables and progress to oneself; notices still come, as they ask for attention.
    stream: stderr unless told otherwise. clock: seconds, for the pace of plain lines.
    """

    def __init__(
        self, *, quiet: bool = False, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.quiet = quiet
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._rich: RichConsole | None = None

    @property
    def is_terminal(self) -> bool:
        return self._stream.isatty()

    def info(self, text: str) -> None:
        """A line about what is happening."""
        if not self.quiet:
            self._line(text)

    def notice(self, text: str) -> None:
        """A line about something that is allowed, and that one should know."""
        self._line(f"notice: {text}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
        """A table; columns in which every value starts with a digit or a sign are set flush right."""
        if not self.quiet:
            print_table(self.rich, columns, rows, title=title)

    @contextmanager
    def progress(self, total: float | None, unit: str, *, label: str = "") -> Iterator[Progress]:
        """Progress towards `total` units ("tokens", "steps"); None where the end is not known.

        A plain stream gets a line at most every 5 s, and one at the end.
        """
        if self.quiet:
            yield _Silent()
        elif self.is_terminal:
            with _bar(self.rich, total, unit, label) as bar:
                yield bar
        else:
            plain = _Plain(self._line, self._clock, total, unit, label)
            yield plain
            plain.close()

    @property
    def rich(self) -> "RichConsole":
        if self._rich is None:
            self._rich = rich_console(self._stream)
        return self._rich

    def _line(self, text: str) -> None:
        if self._rich is not None:  # a bar may be drawn below: rich moves it out of the way
            self._rich.print(text, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)


def rich_console(stream: IO[str], plain_width: int = PLAIN_WIDTH) -> "RichConsole":
    """A rich console that shows text as it is: brackets are no markup, and a plain stream is wide."""
    from rich.console import Console as RichConsole

    width = None if stream.isatty() else plain_width
    return RichConsole(file=stream, width=width, markup=False, highlight=False, emoji=False)


def print_table(
    rich: "RichConsole",
    columns: Sequence[str] | None,
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    whole: str | None = None,
) -> None:
    """columns: their headings, or None for a table without. whole: one whose values, such as paths, are not folded
    where the stream is no terminal; the table is as much wider then."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=columns is not None)
    for index, name in enumerate(columns or [""] * len(rows[0])):
        numbers = bool(rows) and all(row[index][:1] in "0123456789-+" for row in rows if row[index])
        kept = name == whole and not rich.is_terminal
        table.add_column(Text(name), justify="right" if numbers else "left", overflow="fold", no_wrap=kept)
        if kept:  # a console of its own, as no table is wider than its console
            rich = rich_console(rich.file, PLAIN_WIDTH + max((len(row[index]) for row in rows), default=0))
    for row in rows:
        table.add_row(*(Text(value) for value in row))
    if title:  # not the table's own title, which rich wraps to the table's width
        rich.print(Text(title), soft_wrap=True)
    rich.print(table)


class _Silent:
    def advance(self, steps: float = 1) -> None: ...

    def update(self, done: float, total: float | None = None) -> None: ...

    def note(self, text: str) -> None: ...


class _Plain:
    """Lines such as `teach: 40,960 of 113,108 tokens, 168 tokens/s, 7 min 09 s left`."""

    def __init__(
        self, write: Callable[[str], None], clock: Callable[[], float], total: float | None, unit: str, label: str
    ) -> None:
        self._write, self._clock, self._total, self._unit, self._label = write, clock, total, unit, label
        self._start = self._last = clock()
        self._done = 0.0
        self._text = ""

    def advance(self, steps: float = 1) -> None:
        self.update(self._done + steps)

    def update(self, done: float, total: float | None = None) -> None:
        self._done = done
        self._total = self._total if total is None else total
        if self._clock() - self._last >= PLAIN_INTERVAL_S:
            self._last = self._clock()
            self._write(self._state())

    def note(self, text: str) -> None:
        self._text = text

    def close(self) -> None:
        spent = self._clock() - self._start
        self._write(f"{self._state(left=False)}, in {format_duration(spent)}")

    def _state(self, *, left: bool = True) -> str:
        spent = self._clock() - self._start
        rate = self._done / spent if spent > 0 else 0.0
        amount = format_count(self._done)
        if self._total is not None:
            amount += f" of {format_count(self._total)}"
        parts = [f"{self._label}: {amount} {self._unit}" if self._label else f"{amount} {self._unit}"]
        if rate > 0:
            parts.append(f"{format_count(rate)} {self._unit}/s")
        if left and self._total is not None and rate > 0:
            parts.append(f"{format_duration(max(self._total - self._done, 0) / rate)} left")
        return ", ".join([*parts, *([self._text] if self._text else [])])


@contextmanager
def _bar(rich: "RichConsole", total: float | None, unit: str, label: str) -> Iterator[Progress]:
    from rich import progress as bars
    from rich.text import Text

    class Rate(bars.ProgressColumn):
        def render(self, task: bars.Task) -> Text:
            return Text(f"{format_count(task.speed)} {unit}/s" if task.speed else "")

    class Amount(bars.ProgressColumn):
        def render(self, task: bars.Task) -> Text:
            end = f" of {format_count(task.total)}" if task.total is not None else ""
            return Text(f"{format_count(task.completed)}{end} {unit}")

    columns = [bars.TextColumn("{task.description}", markup=False), bars.BarColumn(), Amount(), Rate(),
               bars.TimeRemainingColumn(), bars.TextColumn("{task.fields[words]}", markup=False)]  # fmt: skip
    with bars.Progress(*columns, console=rich) as live:
        task = live.add_task(label, total=total, words="")

        class Bar:
            def advance(self, steps: float = 1) -> None:
                live.advance(task, steps)

            def update(self, done: float, total: float | None = None) -> None:
                live.update(task, completed=done, total=total)  # rich: a total of None leaves it as it is

            def note(self, text: str) -> None:
                live.update(task, words=text)

        yield Bar()


def format_count(number: float) -> str:
    """113108 → "113,108"; 0.25 → "0.25"; 168.4 → "168"."""
    if number >= 100 or float(number).is_integer():
        return f"{number:,.0f}"
    return f"{number:.3g}"


def format_bytes(size_bytes: float) -> str:
    """1_300_000 → "1.3 MB": decimal units, as disks are sold."""
    size = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} PB"


def format_duration(seconds: float) -> str:
    """0.42 → "0.42 s"; 200 → "3 min 20 s"; 7500 → "2 h 05 min"; 273600 → "3 d 04 h"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes // 60 % 24:02d} h"


def format_number(value: float | None, digits: int) -> str:
    """Nothing for what was not measured.

    >>> format_number(12.345, 2), format_number(5.89e27, 2), format_number(None, 2)
    ('12.35', '5.89e+27', '')
    """
    if value is None:
        return ""
    return f"{value:.2e}" if abs(value) >= 1e6 else f"{value:,.{digits}f}"
