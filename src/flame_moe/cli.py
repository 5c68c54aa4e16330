"""The command `flame`: parse, call, print. Everything it does can be done in Python with the same names.

Exit codes: 0 fine; 2 a mistake in what was given, told in one sentence on stderr; 130 stopped with Ctrl-C; 1 from
`flame verify`: the model is not what was certified; 1 from any other command is a bug. Results go to stdout; progress
goes to stderr and only to a terminal.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from flame_moe.cli_mllm import mllm
from flame_moe.errors import FlameError

if TYPE_CHECKING:
    from flame_moe.runs import Run

DIFFERENCE, MISTAKE, STOPPED = 1, 2, 130


class Guarded(TyperGroup):
    """Turns a mistake of the user into one sentence and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FlameError as error:
            typer.echo(f"flame: {error}", err=True)
            raise typer.Exit(MISTAKE) from None
        except KeyboardInterrupt:
            typer.echo("flame: stopped", err=True)
            raise typer.Exit(STOPPED) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            place = f" [{error.filename}]" if error.filename else ""
            typer.echo(f"flame: {error.strerror or error}{place}", err=True)
            raise typer.Exit(MISTAKE) from None


app = typer.Typer(
    name="flame",
    cls=Guarded,
    help="Learn many prediction tasks with one model, and more of them later without forgetting.",
    epilog="A first look: flame demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(mllm, name="mllm")

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, as `flame run` makes it.")]
StoreOption = Annotated[Path | None, typer.Option("--store", help="Sample store; default the recipe's own.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed; default the recipe's.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe, e.g. train.epochs=3. Repeatable."),
]
TaskOption = Annotated[list[str] | None, typer.Option("--task", help="Only this task. Repeatable.")]


def main() -> None:
    """Entry point of the command `flame`."""
    app()


def _say_version(wanted: bool) -> None:
    if wanted:
        from flame_moe import __version__

        typer.echo(f"flame-moe {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version and stop.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """Options of the command itself; its help is that of the application."""


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(help="Folder for the demo's store and run.")] = Path("runs/demo"),
    seed: SeedOption = None,
    changes: SetOption = None,
) -> None:
    """Learn five tasks of real handwriting in three stages, beside plain fine-tuning, in about half a minute.

    \b
    Examples:
      flame demo
      flame demo runs/other --seed 1

    Makes OUT/store and OUT/run; a run of an earlier demo there is replaced.
    """
    _run("digits", out / "run", out / "store", seed, changes, overwrite=True)


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="Name of a source, e.g. physionet2012.")],
    places: Annotated[list[Path], typer.Argument(metavar="[RAW_DIR] STORE_DIR", help="Raw data; the new store.")],
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Option of the source. Repeatable.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option("--task", help="Keep only this task. Repeatable.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that is there.")] = False,
) -> None:
    """Read raw data into a sample store, and show what was kept, how it is labelled and what is missing.

    \b
    Examples:
      flame prepare physionet2012 raw/physionet2012 stores/physionet2012
      flame prepare digits stores/digits --option missing=0.3
      flame prepare eicu raw/eicu stores/eicu --task mortality --task los

    RAW_DIR is left out (or "-") for sources that need none.
    """
    from flame_moe.cli_progress import errors, waiting
    from flame_moe.cli_show import output, show_store
    from flame_moe.data.prepare import prepare as prepare_store
    from flame_moe.recipes import parse_assignment

    if len(places) > 2:
        raise typer.BadParameter("give at most two folders: the raw data and the new store")
    raw = places[0] if len(places) == 2 and str(places[0]) != "-" else None
    options = dict(parse_assignment(text) for text in option or ())
    with waiting(errors(), f"reading {source}") as say:
        store = prepare_store(source, raw, places[-1], options=options, tasks=task, overwrite=overwrite, say=say)
    show_store(output(), store)
    typer.echo(f"Store: {places[-1]}")


@app.command()
def init(
    raw: Annotated[Path, typer.Argument(metavar="RAW_DIR", help="A folder of your own tables, arrays and files.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write; default RAW_DIR/flame.toml.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Look at a folder of your own and draft its description, to be corrected and read by `flame prepare folder`.

    \b
    Examples:
      flame init mydata
      flame prepare folder mydata stores/mine
    """
    from flame_moe.data.sources.folder import write_draft

    typer.echo(f"Draft: {write_draft(raw, out, overwrite=overwrite)}. Read and correct it before use.")


@app.command()
def describe(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a sample store.")],
    report: Annotated[Path | None, typer.Option("--report", help="An .html file to write, with pictures.")] = None,
) -> None:
    """Show what a sample store holds: cohort, splits, labels, missing modalities; with pictures in a page.

    \b
    Examples:
      flame describe stores/digits
      flame describe stores/digits --report digits.html
    """
    from flame_moe.cli_show import output, show_store
    from flame_moe.data.store import Store

    opened = Store.open(store)
    show_store(output(), opened)
    if report is not None:
        from flame_moe.data.profile import profile
        from flame_moe.report import write_store_report

        typer.echo(f"Report: {write_store_report(profile(opened), report)}")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe that comes with the package, or a TOML file.")],
    out: Annotated[Path, typer.Argument(help="Folder of the new run.")],
    store: StoreOption = None,
    seed: SeedOption = None,
    changes: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")] = False,
) -> None:
    """Learn every stage of a recipe, measure after each, and write results.json and report.html.

    \b
    Examples:
      flame run digits runs/digits
      flame run my-recipe.toml runs/mine --store stores/mine --seed 1
      flame run digits runs/short --set train.epochs=3 --set model.gate=softmax
      flame run digits runs/digits --resume
    """
    _run(recipe, out, store, seed, changes, resume=resume, overwrite=overwrite)


@app.command()
def extend(
    path: RunFolder,
    task: Annotated[list[str], typer.Option("--task", help="Task of the new stage. Repeatable: learned jointly.")],
    store: StoreOption = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Epochs of the stage; default the recipe's.")] = None,
) -> None:
    """Teach a saved run more tasks; what it predicts for the others stays the same, bit for bit.

    \b
    Examples:
      flame extend runs/digits --task large
      flame extend runs/digits --task large --task ink --epochs 5
    """
    from flame_moe.cli_progress import Bar, errors
    from flame_moe.runs import extend as extend_run

    with Bar(errors()) as bar:
        done = extend_run(path, task, store=store, epochs=epochs, monitor=bar)
    _finish(done)


@app.command()
def certify(
    path: RunFolder,
    probes: Annotated[
        str, typer.Option("--probes", help="synthetic, or train or val: real samples, stored in the certificate.")
    ] = "synthetic",
    store: StoreOption = None,
) -> None:
    """Write down what decides every task's predictions, so that it can be proven later that nothing changed.

    \b
    Examples:
      flame certify runs/digits
      flame certify runs/digits --probes val

    Tasks that have a certificate keep it. Real probes are patient data: keep the certificate like the store.
    """
    from flame_moe.certification import certify as certify_run

    done = certify_run(path, probes=probes, store=store)
    for row in done.tasks:
        typer.echo(f"{row.task}: {row.tensors} tensors, {row.probes} probes, since {row.issued}")
    typer.echo(f"Certificate: {done.digest}")


@app.command()
def verify(
    path: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of sentences.")] = False,
) -> None:
    """Compute again everything that the certificate of a run states; exit code 1 if anything differs.

    \b
    Examples:
      flame verify runs/digits
      flame verify runs/digits --json
    """
    import json

    from flame_moe.certification import verify as verify_run
    from flame_moe.cli_show import verification_lines

    found = verify_run(path)
    if as_json:
        typer.echo(json.dumps(found.plain(), indent=1))
    else:
        typer.echo("\n".join(verification_lines(found)))
    if not found.holds:
        raise typer.Exit(DIFFERENCE)


@app.command()
def evaluate(
    path: RunFolder,
    store: StoreOption = None,
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "test",
    task: TaskOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Score a saved run on labelled samples, with 95 % intervals.

    \b
    Examples:
      flame evaluate runs/digits
      flame evaluate runs/digits --store stores/new --task digit --json
      flame evaluate runs/digits --task auto

    With --task auto: how well the model finds the task by itself, and what that costs against being told.
    """
    from flame_moe.cli_progress import errors, waiting
    from flame_moe.cli_show import as_json_text, output, show_evaluations, show_identity
    from flame_moe.scoring import AUTO, identity
    from flame_moe.scoring import evaluate as evaluate_run

    if task == [AUTO]:
        with waiting(errors(), "scoring"):
            found = identity(path, store=store, split=split)
        show_identity(output(), found)
        return
    with waiting(errors(), "scoring"):
        rows = evaluate_run(path, store=store, split=split, tasks=task or ())
    if as_json:
        typer.echo(as_json_text(rows))
    else:
        show_evaluations(output(), rows)


@app.command()
def predict(
    path: RunFolder,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A store, or raw records as the run's source reads.")],
    out: Annotated[Path | None, typer.Option("--out", help="A .csv or .parquet file to write.")] = None,
    task: TaskOption = None,
    split: Annotated[str | None, typer.Option("--split", help="Of a store; default all samples.")] = None,
) -> None:
    """Score new records, which need no labels: one row per sample and output.

    \b
    Examples:
      flame predict runs/icu new-records --out risk.csv
      flame predict runs/digits stores/digits --task digit --split test
      flame predict runs/icu new-records --task auto

    With --task auto the model chooses for each sample which of its stages it belongs to.
    """
    from flame_moe.cli_progress import errors, waiting
    from flame_moe.cli_show import output, show_predictions
    from flame_moe.scoring import predict as predict_run

    left_out: list[str] = []
    with waiting(errors(), "scoring"):
        table = predict_run(path, data, tasks=task or (), split=split, out=out, say=left_out.append)
    for sentence in left_out:
        typer.echo(sentence, err=True)
    if out is None:
        show_predictions(output(), table)
    else:
        typer.echo(f"{len(table):,} rows: {out}")


@app.command()
def report(path: RunFolder) -> None:
    """Make report.html of a run again, from its results.json.

    \b
    Example:
      flame report runs/digits
    """
    from flame_moe.report import write_report
    from flame_moe.results import Results
    from flame_moe.runs import REPORT, RESULTS

    typer.echo(f"Report: {write_report(Results.load(path / RESULTS), path / REPORT)}")


def _run(
    name: str,
    out: Path,
    store: Path | None,
    seed: int | None,
    changes: list[str] | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    from flame_moe.cli_progress import Bar, errors
    from flame_moe.recipes import load_recipe
    from flame_moe.runs import run as run_recipe

    seeded = [] if seed is None else [f"seed={seed}"]
    recipe = load_recipe(name, [*(changes or ()), *seeded])
    with Bar(errors()) as bar:
        done = run_recipe(recipe, out, store=store, monitor=bar, resume=resume, overwrite=overwrite)
    _finish(done)


def _finish(done: Run) -> None:
    """What was found and where it is."""
    from flame_moe.cli_show import output, show_results
    from flame_moe.runs import REPORT

    show_results(output(), done.results)
    typer.echo(f"Report: {done.path / REPORT}")
