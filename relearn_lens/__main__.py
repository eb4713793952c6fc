"""The command line: a thin user of the library. What it prints, and how, is `cli`.

Imports stay inside the commands: `--help` must not wait for torch.
"""

from __future__ import annotations

import os
import re
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from relearn_lens.cli import about, experiments, removing, results

app = typer.Typer(
    name="relearn-lens",
    help="Prune a concept out of a transformer, retrain, and see where it comes back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("relearn-lens"))
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for command in (
    experiments.run, experiments.sweep, experiments.reproduce, experiments.bench, experiments.audit,
    results.show, results.compare, results.report, results.film, results.verify, about.fetch, about.presets,
    removing.remove, removing.removers, removing.localisers, about.sources, about.sites, about.scores, about.doctor,
):  # fmt: skip
    app.command()(command)
for command in (experiments.run_beside, experiments.bench_job):
    app.command(hidden=True)(command)


def main() -> None:
    """The entry point: our own errors become one message and exit code 1, without a traceback."""
    _print_anywhere()
    try:
        app()
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("RELEARN_LENS_TRACEBACK"):
            raise
        text = re.sub(r"^\[Errno \d+\] ", "", str(error))
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        if "torch" in sys.modules and "LOCAL_RANK" in os.environ:
            from relearn_lens.models import processes

            processes.leave()


def _print_anywhere() -> None:
    """Where output is not UTF-8 (a pipe on Windows, LANG=C), print our own signs in plain ones (-> for an arrow), and
    else what its encoding lacks as JSON would: \\u5730."""
    import codecs
    from json import dumps

    plain = {"→": "->", "·": "|", "…": "...", "≤": "<=", **dict(zip("▁▂▃▄▅▆▇█", "_.-:=+*#", strict=True))}

    def escaped(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        lacking = error.object[error.start : error.end]
        return "".join(plain.get(sign) or dumps(sign)[1:-1] for sign in lacking), error.end

    codecs.register_error("as_json", escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="as_json")


if __name__ == "__main__":
    main()
