"""What the command shows: progress bars on a terminal, plain lines in a log, tables, never both of a thing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from training.loop import Observation
    from training.tune import Trial


def interactive() -> bool:
    return sys.stderr.isatty()


@contextmanager
def steps(verb: str) -> Iterator[Callable[[str], None]]:
    """Tell the stages of a job whose length is unknown: a spinner, or a line each."""
    if not interactive():
        yield lambda stage: print(f"{verb}: {stage}", file=sys.stderr)
        return
    from rich.console import Console

    with Console(stderr=True).status(verb) as status:
        yield lambda stage: status.update(f"{verb}: {stage}")


@contextmanager
def bar(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """Tell (what is done, done, of how many): a bar for each kind of work, or lines with speed and time left at every tenth."""
    if not interactive():
        told: dict[str, tuple[int, float, int]] = {}

        def line(what: str, done: int, of: int) -> None:
            tenth = 10 * done // max(of, 1)
            last, began, before = told.setdefault(what, (-1, time.monotonic(), done))
            if tenth > last:
                told[what] = tenth, began, before
                _print(f"{what}: {done:,} of {of:,} {unit}{_pace(done - before, of - done, time.monotonic() - began)}")

        yield line
        return
    with _rich_bar(unit) as progress:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=of)
            progress.update(tasks[what], completed=done, total=of)

        yield advance


def _pace(done: int, left: int, seconds: float) -> str:
    """How many a second, and the time left; nothing where too little is done to tell."""
    if not done or seconds < 1:
        return ""
    minutes, rest = divmod(round(left * seconds / done), 60)
    return f", {done / seconds:,.0f} a second" + (f", {minutes}:{rest:02} left" if left > 0 else "")


@contextmanager
def training_progress(
    quiet: bool = False,
) -> Iterator[tuple[Callable[[Observation], None], Callable[[int, int], None], Callable[[str], None]]]:
    """A bar over each epoch's steps on a terminal, a line for every validation everywhere; before, over texts encoded.

    The third of what it gives tells other lines. With `quiet` nothing is shown.
    """
    if quiet:
        yield lambda seen: None, lambda done, of: None, lambda line: None
        return
    with _rich_bar("steps") if interactive() else _nothing() as progress:
        task = progress.add_task("training", total=None) if progress else None

        def observe(seen: Observation) -> None:
            if seen.validation is not None:
                figures = (
                    " ".join(f"{name} {value:.4f}" for name, value in seen.validation.items() if name.endswith("@10")) or "none"
                )
                star = " *" if seen.best else ""
                what = "" if seen.part == "model" else f"{seen.part} "
                text = f"{what}epoch {seen.epoch}: loss {seen.loss:.4f}, validation {figures}, {seen.seconds:.1f} s{star}"
                (progress.console.print if progress else _print)(text)
            elif progress:
                text = f"{seen.part} epoch {seen.epoch} · loss {seen.loss:.4f}"
                progress.update(task, completed=seen.step, total=seen.steps, description=text)

        def read(done: int, of: int) -> None:
            if progress:
                progress.update(task, completed=done, total=of, description="texts read")
            elif done == of or done % 10_000 < 256:
                _print(f"texts read: {done:,} of {of:,}")

        def tell(line: str) -> None:
            progress.console.print(line, markup=False) if progress else _print(line)

        yield observe, read, tell


@contextmanager
def search_progress() -> Iterator[Callable[[Trial, int], None]]:
    """A bar over the trials of a search on a terminal; a line for every trial that ends everywhere."""
    with _rich_bar("trials") if interactive() else _nothing() as progress:
        task = progress.add_task("tune", total=None) if progress else None

        def observe(trial: Trial, of: int) -> None:
            ended = trial.state != "running"
            value = "" if trial.value is None else f" {trial.value:.4f}"
            if ended:
                tried = ", ".join(f"{name} {text}" for name, text in trial.texts().items())
                text = f"trial {trial.number}: {trial.state}{value}; {trial.reason or tried}"
                progress.console.print(text, markup=False) if progress else _print(text)
            if progress:
                text = f"trial {trial.number} · epoch {trial.epoch} · NDCG@10{value}"
                progress.update(task, completed=trial.number + ended, total=of, description=text)

        yield observe


def metrics_table(rows: Sequence[tuple[str, Mapping[str, float]]], title: str = "") -> None:
    """One line a model, one column a metric; the best of each column is bold."""
    from rich.table import Table

    names = list(rows[0][1])
    table = Table(title=title or None)
    table.add_column("")
    best = {name: max(figures.get(name, 0.0) for _, figures in rows) for name in names}
    for name in names:
        table.add_column(name, justify="right")
    for label, figures in rows:
        cells = []
        for name in names:
            text = f"{figures[name]:.4f}" if name in figures else "–"
            cells.append(f"[bold]{text}[/bold]" if figures.get(name) == best[name] else text)
        table.add_row(label, *cells)
    _show(table)


def report_table(report: Mapping[str, Any]) -> None:
    """What to think of it, then one line a lister with its interval, then slices of the model alone."""
    from rich.table import Table

    k = report["decisive"].partition("@")[2]
    print(report["verdict"])
    print(report["protocol"]["text"])
    if report["leaks"]["found"]:
        print(f"LEAKS were found ({', '.join(report['leaks']['found'])}); `recsys leaks` tells the rows")
    names = [report["decisive"], f"recall@{k}", f"mrr@{k}", f"recall@{max(report['ks'])}", f"coverage@{k}"]
    table = Table(title=f"{report['users']:,} users, 95 % intervals by bootstrap over users")
    for name in ("", *names):
        table.add_column(name, justify="right" if name else "left")
    for lister, figures in report["figures"].items():
        table.add_row(lister, *(_estimate(figures.get(name)) for name in names))
    _show(table)
    table = Table(title=f"{report['decisive']} of the model by slices")
    for name in ("", "", "users", "model", "the best baseline"):
        table.add_column(name, justify="right" if name else "left")
    for part in report["slices"]:
        beside = part.get("best_baseline", {}).get(report["decisive"])
        own = part["figures"][report["decisive"]]
        table.add_row(part["by"], part["slice"], f"{part['users']:,}", _estimate(own), _estimate(beside))
    _show(table)
    for slice_, by in report["cold"].items():
        metrics_table(list(by.items()), title=slice_)


def _estimate(figure: Mapping[str, float | None] | None) -> str:
    if figure is None or figure["mean"] is None:
        return "–"
    low, high = figure.get("low"), figure.get("high")
    return f"{figure['mean']:.4f}" + (f" [{low:.4f}, {high:.4f}]" if low is not None and high is not None else "")


def top_table(answer: Mapping[str, Any]) -> None:
    """The items of an answer, best first."""
    names = ("rank", "item_id", "title", "score", "probability")
    items = [{key: item[key] for key in names if key in item} for item in answer["items"]]
    records_table(items, title=f"bundle {answer['bundle']}, source: {answer['source']}")


def explanation_table(found: Mapping[str, Any]) -> None:
    """The events with what each carried, then the item, then how true that is."""
    events, item = [], found["item"]
    for event in found["events"]:
        record = {key: "–" if event[key] is None else event[key] for key in ("event", "title", "attention", "drop")}
        events.append(record | ({"words": _words(event["words"])} if "words" in event else {}))
    records_table(events, title=f"bundle {found['bundle']}")
    words = f"; its score drops without {_words(item['words'])}" if item.get("words") else ""
    print(f"{item['title']} (id {item['item_id']}): score {item['score']:.4f}{words}")
    print(found["verdict"])


def frontier_table(found: Mapping[str, Any]) -> None:
    """Profiles from the cheapest to the best, with the chosen one marked."""
    from rich.table import Table

    table = Table(title=f"{found['users']:,} users of the validation split")
    for name in ("", *found["frontier"][0]):
        table.add_column(name, justify="right")
    for record in found["frontier"]:
        cells = [
            "–" if value is None else f"{value:.4f}" if "@" in name else f"{value:.2f}" if name.endswith("_ms") else str(value)
            for name, value in record.items()
        ]
        chosen = record == found["chosen"]
        table.add_row("→" if chosen else "", *cells, style="bold" if chosen else None)
    _show(table)


def comparison_tables(found: Mapping[str, Any]) -> None:
    """What two reports say of each other: the verdict, the metrics at the deciding k, the slices, and what to mind.

    Tables and numbers are the page's, with the sides' names for A and B.
    """
    import re

    from rich.markup import escape
    from rich.table import Table

    from serving.evaluation.comparison_parts import ComparisonParts

    print(found["verdict"])
    parts = ComparisonParts(found)
    sides = dict(zip("AB", parts.names, strict=True))
    for part in (next(iter(parts.tables())), parts.slice_table()):
        table = Table(title=part.title)
        for place, name in enumerate(part.head):
            named = re.sub(r"\b[AB]\b", lambda side: sides[side[0]], name)
            table.add_column(escape(named), justify="right" if place else "left")
        for row in part.rows:
            table.add_row(*map(escape, row))
        if part.rows:
            _show(table)
    for note in (*found["notes"], f"{found['won']:,} users won, {found['lost']:,} lost, {found['equal']:,} equal"):
        print(note)


def _words(figures: Mapping[str, float]) -> str:
    """The first words, with their figures."""
    return " · ".join(f"{word} {figure:.2f}" for word, figure in list(figures.items())[:5])


def records_table(records: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """A table of records with equal keys; numbers stand on the right."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title or None)
    for key, value in (records[0] if records else {}).items():
        table.add_column(key, justify="right" if isinstance(value, int | float) else "left")
    for record in records:
        table.add_row(*(f"{value:.4f}" if isinstance(value, float) else escape(str(value)) for value in record.values()))
    _show(table)


def _show(table: Table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160).print(table)  # a log has no width of its own: cut nothing short


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def _rich_bar(unit: str) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:,.0f}/s" if task.speed else "")

    amount = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    columns = (*amount, Speed(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
