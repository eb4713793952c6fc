"""Commands that read what a run left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relearn_lens.cli import pages
from relearn_lens.cli.printing import print_table


def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    all_: Annotated[bool, typer.Option("--all", help="Print every table, and every answer in full.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Print the numbers of every layer.")] = False,
    claims: Annotated[bool, typer.Option("--claims", help="Print the paper's claims, beside their controls.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print summary.json as it is.")] = False,
) -> None:
    """Print what a finished run found; more of it with --all, --layers, --claims or --json."""
    from relearn_lens.runs import store
    from relearn_lens.runs.folder import SUMMARY

    result = store.load_run(run)  # says what is wrong with a folder that is no finished run
    if json:
        print((run / SUMMARY).read_text(encoding="utf-8"), end="")
        return
    if all_ or not (layers or claims):
        pages.print_brief(result, str(run / "report.html"))
    if all_:
        pages.print_answers(result)
        pages.print_scores(result)
    if all_ or layers:
        pages.print_layers(result)
    if all_:
        pages.print_findings(result)
    if all_ or claims:
        pages.print_claims(result)
    if all_:
        pages.print_story(result)


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN ...]", help="One run folder, or several.")],
    json: Annotated[bool, typer.Option("--json", help="Of one run: print it as JSON.")] = False,
) -> None:
    """Print a finished run beside the numbers of the paper's release, with differences; or several runs side by side.

    `relearn-lens report RUN RUN` writes a page of the same.
    """
    from relearn_lens.runs import published, store

    if len(runs) > 1:
        if json:
            raise ValueError("--json is of one run, beside the release; of several, read their summary.json")
        pages.print_compared([store.load_run(run) for run in runs])
        return
    comparison = published.compare(store.load_run(runs[0]))
    if json:
        from json import dumps

        print(dumps(comparison.to_dict(), indent=1, ensure_ascii=False))
        return
    print(comparison)
    print()
    for title, header, rows in published.comparison_tables(comparison):
        print_table(title, header, rows)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN ...]", help="One run folder, or several.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the page goes.")] = None,
) -> None:
    """Write report.html of a finished run again; of several runs, a page that compares them."""
    from relearn_lens.runs import store
    from relearn_lens.show import report

    loaded = [store.load_run(run) for run in runs]
    if len(loaded) == 1:
        print(report.write_report(loaded[0], out or runs[0] / "report.html"))
    else:
        print(report.write_comparison(loaded, out or Path("comparison.html")))


def film(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .gif, or an .html with a slider; by default RUN/film.gif.")
    ] = None,
) -> None:
    """Draw a finished run as a moving picture: the curves, and where the score is, beside the control."""
    from relearn_lens.runs import store
    from relearn_lens.show import plots

    path = out or run / "film.gif"
    if path.suffix not in (".gif", ".html"):
        raise ValueError(f"--out {str(path)!r}: a film is a .gif or an .html file")
    figure = plots.film(store.load_run(run))
    print(plots.save_gif(figure, path) if path.suffix == ".gif" else plots.save_html(figure, path))


def verify(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Hash the files of a finished run, and its inputs where they are here, again; exit 1 if any is not what it was."""
    from relearn_lens.runs import verify

    checks = verify.verify(run)
    print("\n".join(verify.report_of(run, checks, verify.checked(run))))
    raise typer.Exit(any(finding.is_wrong for finding in checks))
