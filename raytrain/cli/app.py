"""The `raytrain` command: parse, call, print, exit. Everything heavy is imported inside a command."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from raytrain.cli.completion import run_completions
from raytrain.core.signals import EXIT_STATUS, Interrupted, exit_with, handled, interrupted

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Adversarial training: distributed by Ray Train, tuned by Ray Tune and Optuna, recorded "
    "in MLflow.",
)

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE] [KEY=VALUE]...",
        help="a YAML file, then fields by dotted path: see raytrain config",
    ),
]
RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_CHECKPOINT",
        help="name of a run or sweep (its best trial), the beginning of an id, last, or a path",
        autocompletion=run_completions,
    ),
]
Which = Annotated[str | None, typer.Option(help="best or last: which checkpoint (default: best)")]
Storage = Annotated[str, typer.Option(help="where runs keep their checkpoints: a folder or a URL")]
Uri = Annotated[
    str | None, typer.Option(help="default: $MLFLOW_TRACKING_URI, else sqlite:///mlflow.db")
]
RUNS = "runs"  # the default of Storage
Json = Annotated[bool, typer.Option("--json", help="print one JSON object last on stdout")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def _version(wanted: bool) -> None:
    if wanted:
        from raytrain.cli.version import versions

        typer.echo(versions())
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="versions, and exit"),
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def train(
    words: Words = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="continue a run: its name, the beginning of its id, last, or its folder",
            autocompletion=run_completions,
        ),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="show where the time of ten steps goes")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="show the configuration and its cost; train nothing"),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train one network: `raytrain train algorithm=dynamic data=cifar10 workers=2 epochs=30`."""
    with outcome(debug):
        from raytrain.cli.train import Epochs, check_dry, preview, train_summary
        from raytrain.commands import train as api

        file, overrides = split(words)
        if dry_run:
            check_dry(profile)
            previewed = api.preview(file, overrides, resume=resume)
            say(preview(previewed), previewed.json(), as_json)
            return
        with Epochs() as epochs:
            result = api.train(
                file,
                overrides,
                resume=resume,
                watch=epochs,
                on_start=epochs.start,
                on_step=epochs.step,
                profile=profile,
            )
        say(train_summary(result), result.json(), as_json)


@app.command()
def tune(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SPACE.yaml [KEY=VALUE]...",
            help="a search space, then fields of its base run (raytrain config), search or budget",
        ),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="NAME", help="continue the sweep of this name")
    ] = None,
    name: Annotated[str | None, typer.Option(help="name of the sweep")] = None,
    load_if_exists: Annotated[
        bool,
        typer.Option("--load-if-exists", help="continue the sweep of --name if there is one"),
    ] = False,
    trials: Annotated[
        int | None, typer.Option(min=1, help="trials in all, instead of the file's")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the space, samples and the cost; train nothing")
    ] = False,
    final: Annotated[
        int,
        typer.Option(min=0, help="train the best so many again and evaluate them on test data"),
    ] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="seeds of each of those")] = 3,
    fanova: Annotated[
        bool, typer.Option("--fanova", help="importances by fANOVA (slow), not PED-ANOVA")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Search: `raytrain tune search_spaces/quickstart.yaml budget.fe_per_image=5000`."""
    with outcome(debug):
        from raytrain.cli import tune as sweeps

        space, overrides = split(words)
        if dry_run:
            from raytrain.tuning.preview import preview_space
            from raytrain.tuning.requested_space import wanted_space

            preview = preview_space(wanted_space(space, overrides, resume, trials))
            say(sweeps.preview(preview), preview.json(), as_json)
            return
        from raytrain.commands import tune as engine

        with sweeps.Trials() as watch:
            result = engine.tune(
                space,
                overrides,
                resume=resume,
                name=name,
                load_if_exists=load_if_exists,
                trials=trials,
                final=final,
                seeds=seeds,
                importance="fanova" if fanova else "ped-anova",
                watch=watch,
            )
        say(sweeps.tune_summary(result), result.json(), as_json)
        if result.failed:
            raise typer.Exit(1)


@app.command()
def status(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            help="a sweep or a training: its name, its folder, the beginning of its id, or last",
            autocompletion=run_completions,
        ),
    ] = "last",
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="where to look: storage=, experiment=, tracking_uri="
        ),
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="the same as storage=: a folder or a URL (default: runs)")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """How a sweep or a training is doing, also from another machine: `raytrain status SWEEP`."""
    with outcome(debug):
        from raytrain.cli.status import places, status_report
        from raytrain.commands import status as api

        name, fields = places(name, words or [], storage)
        found = api.status(name, **fields)
        say(status_report(found), found.json(), as_json)


@app.command()
def evaluate(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="such as attacks=fgsm,pgd,cw,aa steps=50 restarts=5 images=1000; fields of the run, "
            "such as workers=4: see raytrain config. In place of a run robustbench:FILE, with data=",
        ),
    ] = None,
    which: Which = None,
    another_contract: Annotated[
        bool,
        typer.Option(
            "--another-contract",
            help="allow threat.* to differ from training; the numbers are labelled",
        ),
    ] = False,
    storage: Storage = RUNS,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Clean, PGD and AutoAttack accuracy on the test set: `raytrain evaluate RUN attacks=pgd,aa`."""
    with outcome(debug):
        from raytrain.cli.evaluate import Stages, evaluate_summary
        from raytrain.commands.evaluate import evaluate

        with Stages() as stages:
            result = evaluate(
                run,
                overrides or (),
                which=which,
                another_contract=another_contract,
                storage=storage,
                watch=stages,
            )
        say(evaluate_summary(result), result.json(), as_json)


@app.command()
def export(
    run: RunArgument,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="new or empty; default: exports/NAME"),
    ] = None,
    which: Which = None,
    formats: Annotated[
        str | None,
        typer.Option(
            "--format", help="safetensors,robustbench,onnx (default: all that are possible)"
        ),
    ] = None,
    licence: Annotated[
        str, typer.Option("--license", help="of the weights, as the Hugging Face hub names it")
    ] = "unknown",
    storage: Storage = RUNS,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Weights for others, with a model card: `raytrain export RUN --to FOLDER`."""
    with outcome(debug):
        from raytrain.cli.export import export_summary
        from raytrain.commands import export as exporting

        result = exporting.export(
            run, to, which=which, formats=formats, storage=storage, licence=licence
        )
        say(export_summary(result), result.json(), as_json)


@app.command()
def compare(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN|SWEEP|EXPERIMENT]...",
            help="names of experiments, sweeps or runs, ids, last; default: experiment raytrain",
            autocompletion=run_completions,
        ),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="default: comparisons/ and the words")
    ] = None,
    uri: Uri = None,
    open_it: Annotated[bool, typer.Option("--open", help="open the report in a browser")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Runs beside one another, at their cost: `raytrain compare SWEEP_A SWEEP_B --open`."""
    with outcome(debug):
        from raytrain.cli.compare import compare_summary
        from raytrain.commands.compare import compare as compared

        result = compared(words or (), to=to, uri=uri)
        say(compare_summary(result), result.json(), as_json)
        if open_it:
            typer.launch(result.report.as_uri())


@app.command()
def ui(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="an experiment, a sweep or a run, an id or last; default: the newest experiment",
            autocompletion=run_completions,
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="port on loopback")] = 5000,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="open the page, or print its link only")
    ] = True,
    uri: Uri = None,
    debug: Debug = False,
) -> None:
    """Runs in the MLflow UI, on loopback only: `raytrain ui SWEEP`."""
    with outcome(debug):
        from raytrain.cli.ui import show_ui

        show_ui(uri, name, port, browser)


@app.command()
def algorithms(
    name: Annotated[
        str | None, typer.Argument(help="show the details of this algorithm or outer update")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The catalogue: hyperparameters, ranges, cost, paper."""
    with outcome(debug):
        from raytrain.cli import algorithms as catalogue

        if name is None:
            say(catalogue.catalogue(), catalogue.catalogue_json(), as_json)
        else:
            say(catalogue.algorithm(name), catalogue.algorithm_json(name), as_json)


@app.command()
def config(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH] [KEY=VALUE]...",
            help="a field or group, such as data or optimizer.lr; then fields, which choose the parts",
        ),
    ] = None,
    as_yaml: Annotated[
        bool,
        typer.Option(
            "--yaml", help="print a complete run file; a run file may be given in place of PATH"
        ),
    ] = False,
    schema: Annotated[
        str | None,
        typer.Option(metavar="run|space", help="print the JSON Schema of run files, or of spaces"),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The fields of a run, with ranges and defaults: `raytrain config algorithm algorithm=dynamic`."""
    with outcome(debug):
        from raytrain.cli import config as shown

        if schema is not None:
            shown.check_alone("--schema", words=words, yaml=as_yaml)
            indent = None if as_json else 2
            shown.write(json.dumps(shown.schema(schema), indent=indent) + "\n")
        elif as_yaml:
            shown.check_alone("--yaml", json=as_json)
            shown.write(shown.run_file(*split(words)))
        else:
            listed = shown.fields(words or ())
            say(shown.listing(listed), shown.fields_json(listed), as_json)


def split(words: list[str] | None) -> tuple[Path | None, list[str]]:
    """The file, if the first word is one, and the `key=value` words: a file may have = in its name."""
    first, *rest = words or [""]
    if first and ("=" not in first or os.path.isfile(first)):
        return Path(first), rest
    return None, [word for word in (first, *rest) if word]


def say(text: Callable[[], None], values: dict[str, Any], as_json: bool) -> None:
    """The result for a reader, or for a script."""
    if as_json:
        sys.stdout.write(json.dumps(values, default=str) + "\n")
    else:
        text()


@contextmanager
def outcome(debug: bool) -> Iterator[None]:
    """Exit status 2 for a wrong request, 1 for failed work, 130 for a signal; one sentence on stderr."""
    try:
        yield
    except (typer.Exit, SystemExit):
        raise
    except KeyboardInterrupt as error:
        _exit(EXIT_STATUS, _interruption(error), debug)
    except Exception as error:
        from raytrain.core.errors import RequestError

        if interrupted():  # the error is a consequence
            _exit(EXIT_STATUS, _interruption(error), debug)
        _exit(2 if isinstance(error, RequestError) else 1, _sentence(error), debug)


def _interruption(error: BaseException) -> str:
    """What a signal has ended, and the command that continues it on a line of its own."""
    said = "interrupted; what had finished is recorded"
    return f"{said}; to continue:\n{error.command}" if isinstance(error, Interrupted) else said


def _sentence(error: Exception) -> str:
    from raytrain.core.errors import ModelFailed, RequestError, TrainingFailed

    if isinstance(error, RequestError | TrainingFailed | ModelFailed):
        return str(error)
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} (--debug shows where)"


def _exit(status: int, sentence: str, debug: bool) -> None:
    sys.stderr.write(f"raytrain: {sentence}\n")
    if debug:
        traceback.print_exc()
    raise typer.Exit(status)


def main() -> None:
    """Run the command line and exit."""
    sys.path.insert(0, os.getcwd())  # for model=module:function; Ray hands the path to its workers
    status: Any = 0
    with handled():
        try:
            app()
        except SystemExit as ended:
            status = ended.code
        exit_with(status if isinstance(status, int) else int(status is not None))
