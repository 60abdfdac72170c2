"""The command line: parse, call, print. Exit codes: 0 done, 1 the work failed (one line on stderr), 2 wrong usage.

Heavy modules are imported inside the commands, so that help and usage errors come at once.
"""

import errno
import importlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mcdrop.console import check_output, checked, load, note, note_not_finite, progress, terminable, waiting
from mcdrop.errors import InputError, MCDropError, MissingExtra
from mcdrop.streams import STANDARD_STREAM, check_place, check_stays

if TYPE_CHECKING:
    from mcdrop.model import Model
    from mcdrop.screening import Screen
    from mcdrop.table import Table

__all__ = ["app", "calibrate", "convert", "export", "inspect", "main", "predict", "predicted", "screen", "serve"]

_CSV = (".csv", ".txt")
_TABLES = (*_CSV, ".parquet", ".pq")
_MODEL = "Model folder, STORE/NAME for the newest version, or an ONNX file."

_Devices = Annotated[
    list[str] | None,
    typer.Option("--device", help="Of torch, such as cuda; several share the rows out.", show_default="cpu"),
]


class _Commands(TyperGroup):
    """Turns the errors that we raise on purpose into one line and exit code 1."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except MCDropError as error:
            said = str(error)
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read our output has left: typer ends quietly
                raise
            said = str(error)
        typer.echo(f"error: {' '.join(said.split())}", err=True)
        raise typer.Exit(1)


app = typer.Typer(
    cls=_Commands,
    help="How sure is a trained network? Stochastic passes as means, intervals and flags.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain lines can be read by people and by scripts
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Runs the command line."""
    app(prog_name="mcdrop")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mcdrop {importlib.import_module('mcdrop').__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand != "serve":  # which finishes what runs, and then ends by the signal
        context.with_resource(terminable())


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help=_MODEL)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: _Devices = None,
) -> None:
    """Show which random draws a model has, and which of them are live."""
    found = load(model, device)
    if as_json:
        head = {"name": found.name, "version": found.version, "task": found.task}
        typer.echo(json.dumps({**head, "audit": found.audit.to_dict()}, indent=2))
        return
    inputs = ", ".join(f"{spec.name} {spec.dtype} ({', '.join(map(str, spec.shape))})" for spec in found.inputs)
    screen = "none" if found.screen is None else f"{found.screen.score} at a false-alarm rate of {found.screen.fpr:g}"
    named = f"{found.name} {found.version}".strip()  # a bare file has no version
    typer.echo(f"{named}, {found.task}\ninputs: {inputs}\nscreen: {screen}\n{found.audit}")


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help=_MODEL)],
    rows: Annotated[str, typer.Argument(help="CSV file with the rows; - is standard input.")],
    output: Annotated[str, typer.Option("--output", "-o", help="CSV file to write; - is standard output.")] = "-",
    passes: Annotated[int | None, checked("passes", "Stochastic passes.")] = None,
    level: Annotated[float | None, checked("level", "Such as 0.95.")] = None,
    interval: Annotated[str | None, checked("interval", "Kind of interval.")] = None,
    seed: Annotated[int | None, checked("seed", "Same seed, same answer.")] = None,
    prefix: Annotated[str, typer.Option(help="Put before the name of every new column.")] = "",
    device: _Devices = None,
) -> None:
    """Predict the rows of a table: its columns followed by mean, variance, interval and flags."""
    from mcdrop.table import write_rows

    check_output(output, suffixes=_CSV, inputs=[rows, model])
    options = {"passes": passes, "level": level, "interval": interval, "seed": seed}
    loaded = load(model, device)
    with progress(rows, output) as advance:
        count = write_rows(output, predicted(loaded, rows, options, prefix, advance))
    if output != STANDARD_STREAM:
        typer.echo(f"{count} rows written to {output}", err=True)


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(help="Model folder, or STORE/NAME for the newest version.")],
    rows: Annotated[Path, typer.Argument(help="CSV or Parquet file of rows not used in training; it is read twice.")],
    target: Annotated[list[str], typer.Option(help="Column with the true value; once for each output.")],
    method: Annotated[str | None, checked("method", "Such as standardised, absolute, cqr; lac, aps, raps.")] = None,
    passes: Annotated[int | None, checked("passes", "Stochastic passes.")] = None,
    seed: Annotated[int | None, checked("seed", "Same seed, same answer.")] = None,
    device: _Devices = None,
) -> None:
    """Fit intervals for future values on held-out rows, and keep them in the model's folder."""
    from mcdrop.artifact import CALIBRATION
    from mcdrop.files import read_pairs
    from mcdrop.fitting import calibrate as fit
    from mcdrop.placing import check_writable, put_file
    from mcdrop.store import read_manifest, resolve

    check_stays(rows)
    folder = resolve(model)  # once: a version that is added meanwhile is another model
    check_writable(folder)
    manifest, loaded = read_manifest(folder), load(folder, device)
    if loaded.task == "classification" and len(target) > 1:
        raise typer.BadParameter("a classifier has one column of labels, so give it once", param_hint="--target")
    if twice := [name for name in target if target.count(name) > 1]:
        raise typer.BadParameter(f"{twice[0]!r} is given twice; give each output its own", param_hint="--target")
    with progress(str(rows), "", "reading") as advance:
        x, y = read_pairs(loaded, rows, target, advance=advance)
    labels = y[:, 0] if loaded.task == "classification" else y
    with waiting("calibrating"):
        fitted = fit(loaded, {loaded.inputs[0].name: x}, labels, method=method, passes=passes, seed=seed)
    put_file(folder, CALIBRATION, json.dumps(fitted.to_dict(), allow_nan=False).encode(), made_for=manifest)
    known = f"passes={fitted.plan.passes} seed={fitted.plan.seed}"
    known += "" if loaded.task == "classification" else "; ask with --interval conformal"  # sets come of themselves
    typer.echo(f"{fitted.method} calibration of {fitted.rows} rows kept in {folder}; it holds for {known}")


@app.command()
def screen(
    model: Annotated[Path, typer.Argument(help=_MODEL)],
    rows: Annotated[Path, typer.Argument(help="CSV or Parquet file with the rows; it is read twice.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, of the same format.")],
    fdr: Annotated[float | None, checked("fdr", "Share of false flags among all flags, such as 0.05.")] = None,
    fpr: Annotated[float | None, checked("fpr", "Share of flagged inliers; by default the screen's own.")] = None,
    reference: Annotated[Path | None, typer.Option(help="File of inliers; by default the model's own screen.")] = None,
    score: Annotated[str | None, checked("score", "Of --reference: what is compared.", show_default="variance")] = None,
    prefix: Annotated[str, typer.Option(help="Put before the name of every new column.")] = "",
    device: _Devices = None,
) -> None:
    """Flag the anomalies of a table: its columns followed by score, p_value and is_anomaly."""
    import numpy as np

    from mcdrop.detect import screen as find
    from mcdrop.files import append_columns, check_target, read_inputs, state_of

    if fdr is not None and fpr is not None:
        raise typer.BadParameter("give --fdr or --fpr, not both", param_hint="--fdr")
    if score is not None and reference is None:
        raise typer.BadParameter("it is used with --reference; the model's screen has its own", param_hint="--score")
    check_output(output, suffixes=_TABLES, inputs=[rows, model, *([reference] if reference else [])])
    check_stays(rows)
    columns = {prefix + column: column for column in ("score", "p_value", "is_anomaly")}
    check_target(rows, output, [*columns])
    loaded, since = load(model, device), state_of(rows)
    if reference is None and loaded.screen is None:
        raise InputError("the model has no screen of its own; give rows without anomalies as --reference FILE")
    # a screen that is fitted for a false-discovery rate alone flags no single rows: any rate of theirs will do
    rate = fpr if fpr is not None else 0.01 if fdr is None else 0.5
    fitted = None if reference is None else _fitted_screen(loaded, reference, score or "variance", rate)
    name = loaded.inputs[0].name
    with progress(str(rows), str(output), "screening") as advance:
        blocks = read_inputs(loaded, rows, advance=advance, note=note)
        found = find(loaded, ({name: block} for block in blocks), screen=fitted, fdr=fdr, fpr=fpr)
    append_columns(loaded, rows, output, {new: getattr(found, name) for new, name in columns.items()}, since=since)
    note_not_finite(int((~np.isfinite(found.score)).sum()), len(found.score), "scores")
    typer.echo(str(found), err=True)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Model folder, or an ONNX file.")],
    output: Annotated[Path, typer.Argument(help="File to write, .onnx or .pt2: gives mean, variance and bounds.")],
    passes: Annotated[int, checked("passes", "Stochastic passes baked in.")] = 50,
    level: Annotated[float, checked("level", "Such as 0.95.")] = 0.95,
    interval: Annotated[str, checked("interval", "Kind of interval.")] = "student_t",
    seed: Annotated[int | None, checked("seed", "Same seed, same answer.")] = None,
) -> None:
    """Write the posterior as one plain graph that needs no mcdrop to run."""
    from mcdrop.posterior import export_onnx, export_torch

    check_output(output, suffixes=(".onnx", ".pt2"), inputs=[model], hint="OUTPUT")
    check_place(output)
    loaded = load(model)
    write = export_torch if output.suffix.lower() == ".pt2" else export_onnx
    with waiting("exporting"):
        write(loaded, output, passes=passes, level=level, interval=interval, seed=seed)
    if loaded.calibration is not None:
        note("the model's calibration is not in it: variance and bounds are those of the passes alone")
    typer.echo(f"{passes} passes written to {output}", err=True)


@app.command()
def convert(
    weights: Annotated[Path, typer.Argument(help="State dict that torch.save wrote.")],
    output: Annotated[Path, typer.Argument(help="safetensors file to write.")],
) -> None:
    """Turn pickled weights into safetensors, without running what a pickle may hold."""
    from mcdrop.convert import convert as convert_weights

    check_output(output, suffixes=(".safetensors",), inputs=[weights], hint="OUTPUT")
    check_place(output)
    typer.echo(f"{convert_weights(weights, output)} tensors written to {output}", err=True)


@app.command()
def serve(
    store: Annotated[Path | None, typer.Argument(help="Folder of models.", show_default="models/store")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="0 is any free.", show_default="8000")] = None,
    device: _Devices = None,
) -> None:
    """Serve the models of a store over HTTP. MCDROP_... variables set what is not given here."""
    try:  # by name: the service knows mcdrop, never the reverse
        settings = importlib.import_module("service.settings")
        server = importlib.import_module("service.server")
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or str(error), "serve") from None
    given = {"store": store, "host": host, "port": port, "devices": device}
    # as of a variable: one that is empty says nothing
    server.serve(settings.read_settings(**{name: value for name, value in given.items() if value not in (None, "")}))


def predicted(
    model: "Model", source: str, options: dict[str, Any], prefix: str, advance: Callable[[int], None]
) -> Iterator["Table"]:
    """Predicts a table block by block; tells ``advance`` how many bytes of it are done."""
    import numpy as np

    from mcdrop.files import only_input, rows_at_once
    from mcdrop.predict import in_words
    from mcdrop.predict import predict as predict_block
    from mcdrop.table import read_rows, with_prediction

    spec, kept, rows, lost = only_input(model), model.calibration, 0, 0
    width, chunk = math.prod(spec.shape[1:]), rows_at_once(model, options)
    for block in read_rows(source, width=width, features=model.features, dtype=spec.dtype, chunk=chunk, note=note):
        inputs = {spec.name: block.values.reshape(-1, *spec.shape[1:])}
        found = predict_block(model, inputs, **options)
        if kept is not None and not rows and not found.audit.calibrated:
            note(
                f"the model's calibration was fitted with {in_words(kept.plan)} and does not hold for what was asked: "
                "it is left out, and its noise or sets with it"
            )
        yield with_prediction(block, found, prefix=prefix, calibrated=kept is not None)
        rows += len(block.cells)
        lost += int((~np.isfinite(found.mean) | ~np.isfinite(found.variance)).any(axis=1).sum())
        advance(block.position)
    note_not_finite(lost, rows, "outputs")


def _fitted_screen(model: "Model", reference: Path, score: str, fpr: float) -> "Screen":
    import numpy as np

    from mcdrop.files import read_inputs
    from mcdrop.fitting import fit_screen

    rows = np.concatenate([*read_inputs(model, reference, note=note)])
    with waiting("fitting the screen"):
        return fit_screen(model, {model.inputs[0].name: rows}, score=score, fpr=fpr)
