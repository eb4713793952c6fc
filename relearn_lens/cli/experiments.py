"""Commands that compute: a run, many runs, a paper, a bench, an audit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from relearn_lens.cli import pages
from relearn_lens.cli.following import following, interruptible, sweeping
from relearn_lens.cli.printing import print_table

if TYPE_CHECKING:
    from relearn_lens.runs.settings import Experiment


def run(
    settings: Annotated[
        str, typer.Argument(metavar="[PRESET | FILE.toml]", help="See `relearn-lens presets`.")
    ] = "names",
    model: Annotated[str | None, typer.Option(help="A source (minilm), a local folder, or a name on the hub.")] = None,
    corpus: Annotated[str | None, typer.Option(help="bsb-names, conll:PATH, hf:NAME[:CONFIG] or toy.")] = None,
    concept: Annotated[str | None, typer.Option(metavar="LABEL", help="The label that carries the concept.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder; by default one below runs/.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Any setting; can be given again."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the run that the folder holds first.")] = False,
    shared: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where runs keep fine-tuned models for each other.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print every note and every phase of the work.")] = False,
) -> None:
    """Find the concept's neurons, prune them, retrain, and follow the concept, with controls.

    The same command continues a run that was interrupted.
    """
    from relearn_lens.runs.presets import settings_of

    experiment = settings_of(settings, {"model": model, "corpus": corpus, "concept": concept}, set_ or [])
    folder = out or _folder(settings, experiment)
    from relearn_lens.models import processes

    with processes.joined():
        _run(experiment, folder, fresh, shared, verbose)


def _run(experiment: Experiment, folder: Path, fresh: bool, shared: Path | None, verbose: bool) -> None:
    """Run, and print what happened; in one of the processes that share a run."""
    from relearn_lens.models import processes
    from relearn_lens.runs import store
    from relearn_lens.show import report

    if not processes.is_first():  # of those that torchrun or accelerate started, one prints and writes
        store.run(experiment, folder, fresh=fresh)
        return
    shown = not fresh and store.is_complete(folder)
    what = f"{experiment.model}, {experiment.corpus}, concept {'+'.join(experiment.labels)}, site {experiment.site}"
    print(f"{what}; folder {folder}")
    with interruptible(), following(experiment, verbose=verbose) as follow:
        result = store.run(
            experiment, folder, fresh=fresh, shared=shared, progress=follow.progress, on_event=follow.take
        )
        page = report.write_report(result, folder / "report.html")
    if shown:
        print("this run was complete already; --fresh runs it again")
    pages.print_brief(result, str(page))


def run_beside(
    folder: Annotated[Path, typer.Argument(help="The folder of the run under way.")],
    shared: Annotated[Path | None, typer.Argument(help="As of the run.")] = None,
) -> None:
    """Compute parts of a run that another process has begun."""
    from relearn_lens.runs import store

    store.work_beside(folder, shared)


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="A file of settings with a table [sweep] of axes.")],
    on: Annotated[str, typer.Option("--on", metavar="local|ray", help="What runs the cells.")] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time, with --on local; by default what fits this machine.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The sweep's folder; by default runs/ and the file's name.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove the runs of its cells first.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Check every cell's settings, list them and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print summary.json instead of the table.")] = False,
) -> None:
    """Run an experiment for every combination of settings, and gather one table.

    The same command continues a sweep that was interrupted, and tries again what failed. Exit code 1 if a cell failed.
    """
    from relearn_lens.bench import sweeps

    plan = sweeps.read(file)
    folder = out or sweeps.folder_of(plan)
    if dry:
        print(f"{len(plan.cells)} cells; folder {folder}", *(cell.name for cell in plan.cells), sep="\n")
        return
    say = sweeping(len(plan.cells), sys.stderr if json else sys.stdout)
    say(f"{len(plan.cells)} cells over {', '.join(plan.keys)}; folder {folder}")
    with interruptible():
        swept = sweeps.run(plan, out, on=on, workers=workers, fresh=fresh, tell=say)
    if json:
        print((swept.folder / sweeps.SUMMARY).read_text(encoding="utf-8"), end="")
    else:
        pages.print_swept(swept)
    raise typer.Exit(bool(swept.failed))


def reproduce(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME | all]", help="A paper; without one they are listed.")
    ] = None,
    scale: Annotated[
        Literal["toy", "real"], typer.Option(help="toy: minutes on two cores; real: a pretrained model.")
    ] = "toy",
    model: Annotated[
        str, typer.Option(metavar="NAME", help="With --scale real: a source, a folder, or a name on the hub.")
    ] = "smollm2",
    seeds: Annotated[int, typer.Option(min=1, help="How many; a verdict takes three.")] = 3,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder of seeds (runs/reproduce); with --table, a file.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Seeds that are measured at a time.")] = 1,
    table: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Print the table of a folder of seeds; measure nothing.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Put a paper's claims to the test, small, with controls, intervals and a verdict for each.

    The same command continues what was interrupted. With --table, print the claims of what a folder has, with verdicts
    and commands, and with --out as well write all that was measured to that file; in one with a line <!-- claims -->
    that table alone takes the place of the one there.
    """
    from relearn_lens import progress
    from relearn_lens.reproduce import protocol, tables

    if table is not None:
        _reproduced(table, scale, out)
        return
    if name is None:
        rows = [[p.name, p.title, p.source, ", ".join(p.scales)] for p in map(protocol.paper_of, protocol.PAPERS)]
        print_table("papers; relearn-lens reproduce NAME", ["name", "title", "source", "scales"], rows, piped=80)
        return
    folder = out or Path("runs/reproduce")
    names = protocol.PAPERS if name == "all" else (name,)
    if name == "all":
        without = [p for each in names if scale not in (p := protocol.paper_of(each)).scales]
        for paper in without:
            print(f"{paper.name} has no scale {scale!r}: {paper.toy_only}", file=sys.stderr)
        names = tuple(each for each in names if each not in {p.name for p in without})
    if processes > 1:
        for line in protocol.spread(
            names, processes=processes, scale=scale, model=model, seeds=range(seeds), out=folder
        ):
            print(line, file=sys.stderr)
    results = []
    for each in names:
        with following() as follow, progress.reported(follow.progress):
            result = protocol.reproduce(each, scale=scale, model=model, seeds=range(seeds), out=folder)
        results.append(result)
        if not json:
            pages.print_reproduction(result)
    if json:
        from json import dumps

        print(dumps([result.to_dict() for result in results], indent=1, ensure_ascii=False))
    elif name == "all":
        from relearn_lens.show import plots

        print(tables.busy(results))
        print(plots.save_html(plots.reproductions(results), folder / "claims.html"))


def _reproduced(folder: Path, scale: Literal["toy", "real"], out: Path | None) -> None:
    """The claims of a folder of seeds, printed, and written to a record or into a page that has a place for them."""
    from relearn_lens.reproduce import protocol, tables

    results, missing = protocol.gathered(folder, scale=scale)
    real = protocol.gathered(folder, scale="real")[0] if scale == "toy" and out else []
    before = out.read_text(encoding="utf-8") if out and out.exists() else ""
    page = tables.rewritten(before, results, missing, real) if out else ""  # says what is wrong before it prints
    print(tables.short_table(results), end="")
    if out:
        out.write_text(page, encoding="utf-8")
    for line in missing:
        print(f"not here: {line}", file=sys.stderr)


def bench(
    settings: Annotated[
        str, typer.Argument(metavar="[PRESET | FILE.toml]", help="facts-toy, facts-toy-slowed, facts-smollm2.")
    ] = "facts-toy",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The bench's folder; by default runs/ and the preset's name.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Any setting; can be given again."),
    ] = None,
    on: Annotated[str, typer.Option("--on", metavar="local|ray", help="What runs the jobs.")] = "local",
    processes: Annotated[
        int | None, typer.Option(help="Jobs at a time, with --on local; by default what fits this machine.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what the folder holds first.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Say what it would do, and what that takes.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print summary.json instead.")] = False,
) -> None:
    """Removers against ways back over one set of facts: what comes back of the half that the attacker never had.

    The same command continues a bench that was interrupted. Exit code 1 if a job failed.
    """
    from relearn_lens.bench import bench_page, benches
    from relearn_lens.bench.plan import bench_of

    plan = bench_of(settings, set_ or [])
    if dry:
        print(*benches.planned(plan), sep="\n")
        return
    folder = out or Path("runs") / Path(settings).stem
    to = sys.stderr if json else sys.stdout
    jobs = sum(1 for _ in plan.every_seed) * -(-(len(plan.rows) + benches.has_twin(plan)) // benches.ROWS_A_JOB)
    sizes = f"{len(plan.rows)} removers, {len(plan.columns)} ways back, {len(plan.every_seed)} seed(s)"
    print(f"{sizes}; folder {folder}", file=to)
    with interruptible():
        benched = benches.run(plan, folder, on=on, processes=processes, fresh=fresh, tell=sweeping(jobs, to))
    if json:
        print((benched.folder / benches.SUMMARY).read_text(encoding="utf-8"), end="")
    else:
        print(*bench_page.lines(benched), sep="\n")
        print(f"page: {folder / benches.PAGE}")
    raise typer.Exit(bool(benched.failed))


def audit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a source, or a name on the hub.")],
    facts: Annotated[
        str | None, typer.Option(help="people, countries, ontology; or give --forget and --retain.")
    ] = None,
    forget: Annotated[str | None, typer.Option(help="What is said to be gone: a JSONL file or hf:NAME.")] = None,
    retain: Annotated[str | None, typer.Option(help="What was to stay: a JSONL file or hf:NAME.")] = None,
    original: Annotated[str | None, typer.Option(metavar="BASE", help="The model that it was made from.")] = None,
    never: Annotated[str | None, typer.Option(metavar="TWIN", help="One that never knew what is to be gone.")] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The system prompt that it is served with.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where audit.json and the page go.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print audit.json instead.")] = False,
    fail_over: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with 1 if more of the facts than this can be reached.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of made facts, of what is drawn and of relearning.")] = 0,
) -> None:
    """Somebody else's unlearned model: what it answers, what can be read inside, and what comes back.

    It is asked in other wordings and forms, probed, quantised, pruned and relearned on half of the facts.
    """
    if (facts is None) == (forget is None):
        raise ValueError("give what is to be gone: --facts NAME, or --forget FILE with --retain FILE")
    from relearn_lens.bench import audit as audits
    from relearn_lens.bench import audit_page
    from relearn_lens.models.loading import load_language_model
    from relearn_lens.progress import reported
    from relearn_lens.runs import removals

    with following() as follow, reported(follow.progress if sys.stdout.isatty() else None):
        subject = removals.subject(model, str(facts or forget), retain=retain, seed=seed)
        base, twin = (None if name is None else load_language_model(name) for name in (original, never))
        done = audits.audit(subject.model, subject.facts, original=base, never=twin, system=system, seed=seed)
    page = audit_page.write(model, done, out) if out else None
    if json:
        from relearn_lens.files import as_json

        print(as_json({"model": model, **done.to_dict()}).decode(), end="")
    else:
        print(*audit_page.lines(Path(model).name, done)[: 24 if page else 25], sep="\n")
        if page:
            print(f"page: {page}")
    raise typer.Exit(fail_over is not None and done.evidence.reached > fail_over)


def bench_job(
    task: Annotated[Path, typer.Argument(help="What a bench wrote for one of its processes.")],
    out: Annotated[Path, typer.Option(help="The bench's folder.")],
) -> None:
    """Run some rows of one seed of a bench."""
    from relearn_lens.bench import benches

    benches.perform(task, out, say=lambda text: print(text, flush=True))


def _folder(settings: str, experiment: Experiment) -> Path:
    """The default run folder: the preset's or file's name, marked when settings were changed on the command line."""
    from relearn_lens.files import sha256_of
    from relearn_lens.runs.presets import settings_of

    name = Path(settings).stem
    if settings_of(settings) != experiment:
        name += "-" + sha256_of(experiment.model_dump_json())[:6]
    return Path("runs") / name
