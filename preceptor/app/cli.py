"""The command. What it shows at once is light; what a verb needs is loaded when the verb is used."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.exceptions import TyperException

from preceptor.app.stages import STAGES
from preceptor.core.errors import UserError, WorkError

app = typer.Typer(
    help="Unlabelled clinical cases become a small open model that names diseases and shows the evidence.",
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, such as recipes/quickstart.yaml.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION]... [KEY=VALUE]...", help="Sections to run; overrides such as label.limit=10."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as label.limit=10.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over; the old folder is kept under a number.")]
Retry = Annotated[
    bool, typer.Option("--retry", help="Try again what failed, and that alone (label, calibrate, predict).")
]
Runs = Annotated[Path, typer.Option("--runs", help="The folder of all runs.")]
RUNS = Path("runs")
INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended."""


@app.command()
def run(recipe: RecipePath, words: Words = None, fresh: Fresh = False, retry: Retry = False, runs: Runs = RUNS) -> None:
    """Run a recipe: all its sections, or those named, in the file's order."""
    named = [word for word in words or () if "=" not in word]
    _run(recipe, [word for word in words or () if "=" in word], runs, fresh=fresh, retry=retry, named=named)


def _run(
    path: str,
    overrides: list[str],
    runs: Path,
    *,
    fresh: bool,
    retry: bool,
    named: list[str] | None = None,
    stage: str = "",
) -> None:
    from preceptor.app.console import Show
    from preceptor.app.recipe import load
    from preceptor.app.run import run as run_recipe

    recipe = load(path, overrides)
    names = recipe.of_stage(stage) if stage else named or []
    run_recipe(recipe, names, runs, Show(), fresh=fresh, retry=retry)


def _verb(stage: str) -> Callable[..., None]:
    def verb(
        recipe: RecipePath, overrides: Overrides = None, fresh: Fresh = False, retry: Retry = False, runs: Runs = RUNS
    ) -> None:
        wrong = next((word for word in overrides or () if "=" not in word), None)
        if wrong:
            raise UserError(f"override {wrong!r}: write it as key=value; to run sections by name: preceptor run")
        _run(recipe, overrides or [], runs, fresh=fresh, retry=retry, stage=stage)

    return verb


for _stage, _what in STAGES.items():
    app.command(_stage, help=f"The sections of one stage. {_what}", short_help=_what)(_verb(_stage))


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    card: Annotated[
        float | None,
        typer.Option("--card", min=0.1, help="GiB of the GPU to train on; by default this machine's device."),
    ] = None,
    runs: Runs = RUNS,
) -> None:
    """Tokens, money, memory, time and disk before any is spent: what teachers are asked, and what training takes."""
    from preceptor.app.console import Show
    from preceptor.app.plan import plan as plan_recipe
    from preceptor.app.recipe import load

    plan_recipe(load(recipe, overrides or ()), runs, Show(), card)


@app.command()
def status(
    names: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Runs; by default all.")] = None,
    runs: Runs = RUNS,
) -> None:
    """What is done, owed, failed and spent."""
    from preceptor.app.console import Show
    from preceptor.app.status import tables

    for table in tables(names or [], runs):
        Show().result(table)


@app.command()
def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN[:MODEL] RUN[:MODEL]...", help="Runs; by default their student; RUN:* for all its models."
        ),
    ],
    runs: Runs = RUNS,
) -> None:
    """Evaluations side by side, on the cases that all measured, and what changed case by case.

    More than four, or of different test sets, stand in one table of lines.
    """
    from preceptor.app.compare import sides
    from preceptor.app.console import Show
    from preceptor.report.compare import are_few, lines, table, told

    if len(names) == 1 and not names[0].endswith(":*"):
        raise UserError("compare: name two runs or more, or two models of one: RUN:student RUN:base")
    found = [side for name in names for side in sides(name, runs)]
    show = Show()
    if are_few(found):
        show.result(table(found))
        show.result(told(found))
    else:
        show.result(lines(found, "en", show.width))


history = typer.Typer(help="The table of versions and scores.", rich_markup_mode=None)
app.add_typer(history, name="history", invoke_without_command=True)


@history.callback()
def _history(context: typer.Context, runs: Runs = RUNS) -> None:
    """The table of versions: how each was trained, how it scored here and elsewhere."""
    if context.invoked_subcommand is None:
        from preceptor.app.console import Show
        from preceptor.app.history import table

        show = Show()
        shown, ranks = table(runs)
        for thing in (shown, *ranks):
            show.result(thing)


@history.command("add")
def _history_add(
    version: Annotated[str, typer.Argument(help="A run's name, or any other.")],
    score: Annotated[float | None, typer.Option("--score", help="What it scored elsewhere.")] = None,
    scheme: Annotated[str, typer.Option("--scheme", help="How it was made, in a few words.")] = "",
    answers: Annotated[Path | None, typer.Option("--answers", help="The file that was scored: it is counted.")] = None,
    runs: Runs = RUNS,
) -> None:
    """Keep a score from elsewhere, such as a competition's."""
    from preceptor.app.history import add

    add(runs, version, score, scheme, answers)


ledger = typer.Typer(help="What was paid for: check it, read it out, make it smaller.", rich_markup_mode=None)
app.add_typer(ledger, name="ledger", no_args_is_help=True)


@ledger.command("verify")
def _ledger_verify(runs: Runs = RUNS) -> None:
    """Read every row and say whether all is whole; exit code 1 if not."""
    from preceptor.app.console import Show
    from preceptor.app.ledger import verify

    verify(runs, Show())


@ledger.command("mend")
def _ledger_mend(runs: Runs = RUNS) -> None:
    """Save what can be read of a damaged ledger; the damaged file is kept beside."""
    from preceptor.app.console import Show
    from preceptor.app.ledger import mend

    mend(runs, Show())


@ledger.command("export")
def _ledger_export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL: a line a send, and what came of it.")],
    run: Annotated[str | None, typer.Option("--run", help="RECIPE or RECIPE/SECTION; by default all.")] = None,
    runs: Runs = RUNS,
) -> None:
    """Write every send with its reply or failure, tokens and money, and who was allowed to see text."""
    from preceptor.app.console import Show
    from preceptor.app.ledger import export

    export(file, run, runs, Show())


@ledger.command("prune")
def _ledger_prune(
    days: Annotated[float, typer.Option("--days", min=0, help="Failures and lost sends older than this.")] = 30,
    gone: Annotated[bool, typer.Option("--gone", help="All of runs whose folders are gone, replies too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without, it is only said what would go.")] = False,
    runs: Runs = RUNS,
) -> None:
    """Take away what brought no reply, and give the disk its space back."""
    from preceptor.app.console import Show
    from preceptor.app.ledger import prune

    prune(days, runs, Show(), gone=gone, yes=yes)


@app.command()
def stats(files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Cases, answers, rows.")]) -> None:
    """Cases: their length. Answers: reasons, characters, diseases per case."""
    from preceptor.app.console import Show
    from preceptor.report.stats import tables

    show = Show()
    for thing in tables(files, show.width):
        show.result(thing)


@app.command()
def diagnose(
    record: Annotated[str, typer.Argument(help="A patient's record; - reads stdin, @FILE a file.")],
    model: Annotated[str, typer.Option("--model", help="A run's section, an adapter, a model.")],
) -> None:
    """Name the diseases of one record, with confidence and the words that speak for them."""
    from preceptor.app.console import Show
    from preceptor.app.diagnose import answer, shown

    text = record
    try:
        if record == "-":
            text = sys.stdin.read()
        elif record.startswith("@"):
            text = Path(record[1:]).read_text("utf-8-sig")
        text.encode()  # an argument that is not UTF-8 comes as halves of characters
    except UnicodeError as error:
        what = record if record.startswith("@") else "the record"
        raise UserError(f"{what}: not UTF-8 text; convert it first") from error
    show = Show()
    with show.progress("thinking", None):
        found = answer(text, model)
    show.result(shown(found))
    if found.prediction.output is None:
        raise WorkError(f"{model} gave no answer that can be read")


@app.command()
def teacher(
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Where it listens.")] = 8100,
    host: Annotated[str, typer.Option("--host", help="The address it binds.")] = "127.0.0.1",
    confidence: Annotated[
        Literal["honest", "over", "under"],
        typer.Option(
            "--confidence", help="A reader who is right about his doubts, or has too few of them, or too many."
        ),
    ] = "honest",
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="Whose tokens it counts: `mini`, a folder, a tokenizer.json, a hub name.")
    ] = "mini",
) -> None:
    """Serve the textbook as a teacher over an OpenAI-compatible API. Illustrative, not for care."""
    from preceptor.app.teacher import serve

    serve(host, port, confidence, tokenizer)


@app.command()
def doctor(runs: Runs = RUNS) -> None:
    """What is installed, what is missing for which stage, GPU, disk, hub."""
    from preceptor.app.console import Show
    from preceptor.app.doctor import table

    Show().result(table(runs))


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from preceptor import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """The command's entry. Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 130 stopped."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _end(str(error), 2)
    except WorkError as error:
        _end(str(error), 1)
    except TyperException as error:
        _end(f"{error.format_message()} (see preceptor --help)", error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # nobody listens any more
        sys.exit(1)
    except OSError as error:
        _end(f"{error.filename}: {error.strerror}; check the path", 2)
    if code == INTERRUPTED:
        _end("stopped; the same command goes on from here", INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _end(message: str, code: int) -> None:
    from preceptor.train import world  # pydantic takes a while to load

    if world.fails_first():
        print(f"preceptor: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201  one line, with no library's help
    sys.exit(code)
