"""What the command shows: progress bars on a terminal, plain lines in a log, tables, never both of a thing."""

from __future__ import annotations

import json as json_module
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from recsys.progress import Progress

if TYPE_CHECKING:
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
def bar(unit: str) -> Iterator[Progress]:
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
def training_progress(quiet: bool = False) -> Iterator[dict[str, Any]]:
    """What `training.run.train` tells: a bar over each epoch's steps on a terminal, a line for every validation everywhere,
    and after the first one that cores are short, if so; before, over texts encoded. With `quiet` nothing is shown.
    """
    if quiet:
        yield {}
        return
    others = others_cores()
    asked = False
    with _one_bar("steps", "training") as (tell, move):

        def observe(seen: Observation) -> None:
            if seen.validation is None:
                text = f"{seen.part} epoch {seen.epoch} · loss {seen.loss:.4f}"
                move(completed=seen.step, total=seen.steps, description=text)
                return
            figures = [f"{name} {value:.4f}" for name, value in seen.validation.items() if name.endswith("@10")]
            what = "" if seen.part == "model" else f"{seen.part} "
            judged = f"validation {' '.join(figures) or 'none'}, {seen.seconds:.1f} s{' *' if seen.best else ''}"
            tell(f"{what}epoch {seen.epoch}: loss {seen.loss:.4f}, {judged}")
            nonlocal asked
            if not asked and (problem := crowded(others())):
                tell(problem)
            asked = True

        def read(done: int, of: int) -> None:
            move(completed=done, total=of, description="texts read")
            if not interactive() and (done == of or done % 10_000 < 256):
                tell(f"texts read: {done:,} of {of:,}")

        yield {"observe": observe, "progress": read, "tell": tell}


def others_cores() -> Callable[[], float]:
    """Asked later, it says how many cores of this machine other work has kept busy since now, in the mean."""
    import psutil

    psutil.cpu_percent()
    began, ours = time.monotonic(), time.process_time()

    def others() -> float:
        seconds = max(time.monotonic() - began, 1e-9)
        return float(psutil.cpu_percent() / 100 * psutil.cpu_count() - (time.process_time() - ours) / seconds)

    return others


def crowded(others: float) -> str:
    """What to do where `others` cores are kept busy by other work, so that the threads of a training wait for each other."""
    import psutil
    import torch

    threads, cores = torch.get_num_threads(), psutil.cpu_count()
    if threads == 1 or others < 0.5 or threads + others < cores + 0.5 or torch.cuda.is_available():
        return ""
    wait = f"other work keeps {others:.1f} of {cores} cores busy, and {threads} threads wait for each other"
    return f"{wait}: export OMP_NUM_THREADS=1 is many times faster for a small model"


@contextmanager
def search_progress() -> Iterator[Callable[[Trial, int], None]]:
    """A bar over the trials of a search on a terminal; a line for every trial that ends everywhere."""
    with _one_bar("trials", "tune") as (tell, move):

        def observe(trial: Trial, of: int) -> None:
            ended = trial.state != "running"
            value = "" if trial.value is None else f" {trial.value:.4f}"
            if ended:
                tried = ", ".join(f"{name} {text}" for name, text in trial.texts().items())
                tell(f"trial {trial.number}: {trial.state}{value}; {trial.reason or tried}")
            text = f"trial {trial.number} · epoch {trial.epoch} · NDCG@10{value}"
            move(completed=trial.number + ended, total=of, description=text)

        yield observe


@contextmanager
def _one_bar(unit: str, work: str) -> Iterator[tuple[Callable[[str], None], Callable[..., None]]]:
    """What prints a line, and what moves a bar below it, which is on a terminal alone."""
    if not interactive():
        yield _print, lambda **state: None
        return
    with _rich_bar(unit) as progress:
        task = progress.add_task(work, total=None)
        yield partial(progress.console.print, markup=False), partial(progress.update, task)


def metrics_table(rows: Sequence[tuple[str, Mapping[str, float]]], title: str = "") -> None:
    """One line a model, one column a metric; the best of each column is bold."""
    best = {name: max(figures.get(name, 0.0) for _, figures in rows) for name in rows[0][1]}

    def cell(name: str, figures: Mapping[str, float]) -> str:
        text = f"{figures[name]:.4f}" if name in figures else "–"
        return f"[bold]{text}[/bold]" if figures.get(name) == best[name] else text

    lines = ([label, *(cell(name, figures) for name in best)] for label, figures in rows)
    _table(title, [("", False), *((name, True) for name in best)], lines)


def report_table(report: Mapping[str, Any]) -> None:
    """What to think of it, then one line a lister with its interval, then slices of the model alone."""
    decisive, k = report["decisive"], report["decisive"].partition("@")[2]
    print(report["verdict"])
    print(report["protocol"]["text"])
    if report["leaks"]["found"]:
        print(f"LEAKS were found ({', '.join(report['leaks']['found'])}); `recsys leaks` tells the rows")
    names = [decisive, f"recall@{k}", f"mrr@{k}", f"recall@{max(report['ks'])}", f"coverage@{k}"]
    title = f"{report['users']:,} users, 95 % intervals by bootstrap over users"
    lines = ([lister, *(_estimate(figures.get(name)) for name in names)] for lister, figures in report["figures"].items())
    _table(title, [(name, bool(name)) for name in ("", *names)], lines)
    names = ["", "", "users", "model", "the best baseline"]
    lines = (
        [part["by"], part["slice"], f"{part['users']:,}"]
        + [_estimate(figures.get(decisive)) for figures in (part["figures"], part.get("best_baseline", {}))]
        for part in report["slices"]
    )
    _table(f"{decisive} of the model by slices", [(name, bool(name)) for name in names], lines)
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

    def cells(record: Mapping[str, Any]) -> Iterator[str]:
        for name, value in {"": "→" if record == found["chosen"] else "", **record}.items():
            number = ".4f" if "@" in name else ".2f" if name.endswith("_ms") else ""
            text = "–" if value is None else f"{value:{number}}"
            yield f"[bold]{text}[/bold]" if record == found["chosen"] else text

    columns = [(name, True) for name in ("", *found["frontier"][0])]
    _table(f"{found['users']:,} users of the validation split", columns, map(cells, found["frontier"]))


def comparison_tables(found: Mapping[str, Any]) -> None:
    """What two reports say of each other: the verdict, the metrics at the deciding k, the slices, and what to mind.

    Tables and numbers are the page's, with the sides' names for A and B.
    """
    import re

    from rich.markup import escape

    from serving.evaluation.comparison_parts import ComparisonParts

    print(found["verdict"])
    parts = ComparisonParts(found)
    sides = dict(zip("AB", parts.names, strict=True))
    for part in (next(iter(parts.tables())), parts.slice_table()):
        head = [escape(re.sub(r"\b[AB]\b", lambda side: sides[side[0]], name)) for name in part.head]
        if part.rows:
            columns = [(name, place > 0) for place, name in enumerate(head)]
            _table(part.title, columns, (map(escape, row) for row in part.rows))
    for note in (*found["notes"], f"{found['won']:,} users won, {found['lost']:,} lost, {found['equal']:,} equal"):
        print(note)


def _words(figures: Mapping[str, float]) -> str:
    """The first words, with their figures."""
    return " · ".join(f"{word} {figure:.2f}" for word, figure in list(figures.items())[:5])


def records_table(records: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """A table of records with equal keys; numbers stand on the right."""
    from rich.markup import escape

    columns = [(key, isinstance(value, int | float)) for key, value in (records[0] if records else {}).items()]
    lines = (
        [f"{value:.4f}" if isinstance(value, float) else escape(str(value)) for value in record.values()] for record in records
    )
    _table(title, columns, lines)


def show(found: Any, json: bool, told: str | Callable[[Any], None]) -> None:
    """What a verb found: as one JSON object, or for people, as a line or by what shows it."""
    if json or isinstance(told, str):
        typer.echo(json_module.dumps(found) if json else told)
    else:
        told(found)


def _table(title: str, columns: Iterable[tuple[str, bool]], rows: Iterable[Iterable[str]]) -> None:
    """Columns are names, each with whether it holds numbers, which stand on the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None)
    for name, number in columns:
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)  # a log has no width of its own: cut nothing short


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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


def warn(message: str) -> None:
    _print(f"recsys: warning: {message}")


def warn_of_later(counts: Mapping[str, int]) -> None:
    """Say how many events of a data set are in no history of it, if there are any."""
    if counts.get("after"):
        warn(f"{counts['after']:,} events are after the test, and so in no history; without split.test_days they are")


def complain(message: str) -> int:
    """Say what the user is to mend; the exit code for it."""
    _print(f"recsys: {message}")
    return 2
