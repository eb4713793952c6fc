"""The command line: a thin user of the library. What it prints, and how, is `cli`.

Imports stay inside the commands: `--help` must not wait for torch.
"""

from __future__ import annotations

import os
import re
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from relearn_lens.cli import pages
from relearn_lens.cli.following import following, sweeping
from relearn_lens.cli.printing import print_prose, print_table, short

if TYPE_CHECKING:
    from relearn_lens.runs.settings import Experiment

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


@app.command()
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
    try:
        with following(experiment, verbose=verbose) as follow:
            result = store.run(
                experiment, folder, fresh=fresh, shared=shared, progress=follow.progress, on_event=follow.take
            )
            page = report.write_report(result, folder / "report.html")
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        raise typer.Exit(130) from None
    if shown:
        print("this run was complete already; --fresh runs it again")
    pages.print_brief(result, str(page))


@app.command(hidden=True, name="run-beside")
def run_beside(
    folder: Annotated[Path, typer.Argument(help="The folder of the run under way.")],
    shared: Annotated[Path | None, typer.Argument(help="As of the run.")] = None,
) -> None:
    """Compute parts of a run that another process has begun."""
    from relearn_lens.runs import store

    store.work_beside(folder, shared)


@app.command()
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
    try:
        swept = sweeps.run(plan, out, on=on, workers=workers, fresh=fresh, tell=say)
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        raise typer.Exit(130) from None
    if json:
        print((swept.folder / sweeps.SUMMARY).read_text(encoding="utf-8"), end="")
    else:
        pages.print_swept(swept)
    raise typer.Exit(bool(swept.failed))


@app.command(name="reproduce")
def reproduce_(
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

    The same command continues what was interrupted. With --table, print claim, verdict and command of what a folder
    has, and with --out as well write all that was measured to that file.
    """
    from relearn_lens import progress
    from relearn_lens.reproduce import protocol, tables

    if table is not None:
        results, missing = protocol.gathered(table, scale=scale)
        print(tables.table(results, brief=True), end="")
        if out is not None:
            out.write_text(tables.record(results, missing), encoding="utf-8")
        for line in missing:
            print(f"not here: {line}", file=sys.stderr)
        return
    if name is None:
        papers = [protocol.paper_of(each) for each in protocol.PAPERS]
        rows = [[p.name, p.title, p.source, ", ".join(p.scales)] for p in papers]
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


@app.command()
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

    asked = bench_of(settings, set_ or [])
    if dry:
        print(*benches.planned(asked), sep="\n")
        return
    folder = out or Path("runs") / Path(settings).stem
    to = sys.stderr if json else sys.stdout
    jobs = sum(1 for _ in asked.every_seed) * -(-(len(asked.rows) + benches.has_twin(asked)) // benches.ROWS_A_JOB)
    sizes = f"{len(asked.rows)} removers, {len(asked.columns)} ways back, {len(asked.every_seed)} seed(s)"
    print(f"{sizes}; folder {folder}", file=to)
    try:
        benched = benches.run(asked, folder, on=on, processes=processes, fresh=fresh, tell=sweeping(jobs, to))
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        raise typer.Exit(130) from None
    if json:
        print((benched.folder / benches.SUMMARY).read_text(encoding="utf-8"), end="")
    else:
        print(*bench_page.lines(benched), sep="\n")
        print(f"page: {folder / benches.PAGE}")
    raise typer.Exit(bool(benched.failed))


@app.command()
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
    from relearn_lens.models.loading import load_language_model
    from relearn_lens.progress import reported
    from relearn_lens.runs import removals

    with following() as follow, reported(follow.progress if sys.stdout.isatty() else None):
        subject = removals.subject(model, str(facts or forget), retain=retain, seed=seed)
        base, twin = (None if name is None else load_language_model(name) for name in (original, never))
        done = audits.audit(subject.model, subject.facts, original=base, never=twin, system=system, seed=seed)
    page = audits.write(model, done, out) if out else None
    if json:
        from relearn_lens.files import as_json

        print(as_json({"model": model, **done.to_dict()}).decode(), end="")
    else:
        print(*audits.lines(Path(model).name, done)[: 24 if page else 25], sep="\n")
        if page:
            print(f"page: {page}")
    raise typer.Exit(fail_over is not None and done.evidence.reached > fail_over)


@app.command(hidden=True, name="bench-job")
def bench_job(
    task: Annotated[Path, typer.Argument(help="What a bench wrote for one of its processes.")],
    out: Annotated[Path, typer.Option(help="The bench's folder.")],
) -> None:
    """Run some rows of one seed of a bench."""
    from relearn_lens.bench import benches

    benches.perform(task, out, say=lambda text: print(text, flush=True))


@app.command()
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


@app.command()
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


@app.command(name="report")
def report_(
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


@app.command()
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


@app.command()
def verify(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Hash the files of a finished run, and its inputs where they are here, again; exit 1 if any is not what it was."""
    from relearn_lens.runs import verify

    checks = verify.verify(run)
    print("\n".join(verify.report_of(run, checks, verify.checked(run))))
    raise typer.Exit(any(finding.is_wrong for finding in checks))


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(metavar="[SOURCE ...]", help="By default all.")] = None,
) -> None:
    """Fetch models and texts from the package index into the cache, and verify them."""
    from relearn_lens import sources

    for name in names or sources.SOURCES:
        with following() as follow:
            folder = sources.fetch(name, progress=follow.progress)
        print(f"{name}: {folder}")


@app.command()
def presets(
    group: Annotated[
        str | None, typer.Argument(metavar="[GROUP]", help="Settings with their defaults: run, prune, measure, ...")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every setting with its default too.")] = False,
) -> None:
    """List the presets, or one group of settings with its defaults."""
    from relearn_lens.runs.presets import PRESETS
    from relearn_lens.runs.settings import fields

    groups: dict[str, list[list[str]]] = {}
    for key, default, says in fields():
        name = key.rpartition(".")[0] or "run"  # what the whole run has, such as its model
        groups.setdefault(name, []).append([key, short(default), says])
    if group is not None and group not in groups:
        raise ValueError(f"unknown group of settings {group!r}; known: {', '.join(groups)}")
    if group is None:
        print_table("presets", ["name", "what it is"], [[name, says] for name, (says, _) in PRESETS.items()])
    for name in groups if all_ else [group] if group else []:
        print_table(f"settings: {name}", ["key", "default", "what it is"], groups[name])
    if group is None and not all_:
        print_prose(f"settings: relearn-lens presets GROUP, one of {', '.join(groups)}; --all prints them all")


@app.command()
def remove(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="See `relearn-lens removers`; npo+sam is npo in the wrapper sam.")
    ],
    model: Annotated[
        str, typer.Option(help="taught (small, taught these facts), a source (smollm2), a folder, a name on the hub.")
    ] = "taught",
    facts: Annotated[
        str,
        typer.Option(
            "--facts",
            "--forget",
            metavar="F",
            help="people, countries, ontology; or what is to be forgotten: FILE.jsonl or hf:NAME, with --retain.",
        ),
    ] = "people",
    retain: Annotated[str | None, typer.Option(metavar="F", help="What is to stay, FILE.jsonl or hf:NAME.")] = None,
    general: Annotated[str | None, typer.Option(metavar="F", help="Other knowledge, or text, that is to stay.")] = None,
    held_out: Annotated[
        str | None, typer.Option(metavar="F", help="What is to be forgotten too, and no attack sees; else half is cut.")
    ] = None,
    where: Annotated[
        str | None, typer.Option(metavar="LOCALISER", help="What may change; see `relearn-lens localisers`.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A field of the method, of its training (lr, epochs, steps, ...) or, as where.KEY, of the localiser; "
            "fraction: the share of neurons. Can be given again.",
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="Values for a kind of model; published: as published.")
    ] = None,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", min=1, help="Train adapters of this rank in the place of weights.")
    ] = None,
    half: Annotated[
        bool, typer.Option("--half", help="Weights in bfloat16; what moves is stepped in float32.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of facts, localiser and training.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the model here, with a manifest.")] = None,
) -> None:
    """Remove facts from a model, and print what it knew before and knows after.

    The folder that --out names is a plain Hugging Face one, which from_pretrained loads.
    """
    from dataclasses import replace

    from relearn_lens.files import check_free
    from relearn_lens.find.localisers import localiser_of
    from relearn_lens.progress import reported
    from relearn_lens.runs import removals

    fields, of_where = removals.fields_from(set_ or [])
    removal = removals.recipe_for(model, method, fields, kind=recipe)
    removal = replace(removal, where=where or removal.where)
    if out is not None:
        check_free(out)
    if removal.where is None and removal.fraction is not None:
        raise ValueError(
            f"fraction = {removal.fraction} says how many neurons a localiser gives, and {method} is given none; add "
            "--where attribution_patching, or leave fraction out"
        )
    if removal.where is not None:
        localiser_of(removal.where, **of_where)
    elif of_where:
        raise ValueError(f"--set where.{next(iter(of_where))}: there is no localiser; name one as --where")
    says = {
        "lora": lora,
        "half": half,
        "model": model,
        "facts": facts,
        "retain": retain,
        "general": general,
        "held_out": held_out,
        "recipe": recipe,
    }
    with following() as follow, reported(follow.progress):
        subject = removals.subject(
            model, facts, retain=retain, general=general, held_out=held_out, seed=seed, half=half
        )
        memory = removals.memory_of(subject, removal, lora=lora)
        follow.say(f"memory: about {sum(memory.values()):,} MB ({', '.join(f'{k} {v:,}' for k, v in memory.items())})")
        done = removals.carry_out(
            subject,
            removal,
            out=out,
            where_fields=of_where,
            lora=lora,
            seed=seed,
            says={"asked": says, "where_fields": of_where},
        )  # fmt: skip
    pages.print_removed(method, subject, removal, done)


@app.command()
def removers(
    table: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Compare them on taught toys; the folder keeps every cell.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="With --table: the toys, such as 0,1,2.")] = "0,1,2,3,4",
    only: Annotated[str, typer.Option(metavar="NAME,...", help="With --table: some removers; by default all.")] = "",
    page: Annotated[Path | None, typer.Option(metavar="FILE", help="With --table: write it as Markdown too.")] = None,
    kept: Annotated[bool, typer.Option("--kept", help="With --table: what the folder has, nothing computed.")] = False,
) -> None:
    """List the ways to remove something by training or pruning, with their fields and where they are from.

    With --table, compare them instead, each at the same retained ability; the same command continues.
    """
    from relearn_lens.remove.removal import Removing
    from relearn_lens.remove.removers import REMOVERS, WRAPPERS

    if table is not None:
        _removers_table(table, seeds, only, page, kept)
        return
    if page is not None:
        raise ValueError("--page FILE is the table as a page; give the table's folder as --table DIR")
    print(f"removers ({len(REMOVERS)})\n")
    pages.print_methods(REMOVERS)
    print(f"wrappers around a remover's step, as in npo+sam ({len(WRAPPERS)})\n")
    pages.print_methods(WRAPPERS)
    usual = ", ".join(f"{name} {short(field.default)}" for name, field in Removing.model_fields.items())
    print_prose(f"training (all but prune, any of it by --set): {usual}")


def _removers_table(folder: Path, seeds: str, only: str, page: Path | None, kept: bool) -> None:
    from relearn_lens.bench import removals

    try:
        numbers = [int(each) for each in seeds.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {seeds!r}: write numbers, such as 0,1,2") from None
    cells = removals.cells(folder, numbers, [name.strip() for name in only.split(",") if name.strip()], kept=kept)
    every = []
    for cell in cells:
        every.append(cell)
        done = "kept" if cell.cached else "done" if cell.seconds is None else f"done in {cell.seconds:.0f} s"
        print(f"{cell.name}, seed {cell.seed}: {done}", flush=True)
    print()
    print_table("accuracy where retain near is 0.95 of base", *removals.table(every), piped=80)
    print_prose(
        f"works: seeds in which forget is below {removals.GONE} in both wordings. Intervals over "
        "seeds, of one seed over keys. share: of the way to the removed model. Recipes were chosen on seed 0."
    )
    print(f"folder {folder}")
    if page is not None:
        from relearn_lens.files import write_whole

        write_whole(page, removals.page(every).encode())
        print(f"page {page}")


@app.command()
def localisers() -> None:
    """List the ways to find where something is in a model, with their fields and where they are from."""
    from relearn_lens.find.localisers import LOCALISERS

    pages.print_methods(LOCALISERS)


@app.command(name="sources")
def sources_() -> None:
    """List the models and texts that can be fetched from the package index."""
    from relearn_lens import sources

    rows = [
        [
            s.name,
            s.kind,
            f"{s.size / 1e6:.0f} MB",
            "yes" if sources.is_cached(s.name) else "no",
            s.licence,
            s.summary,
        ]
        for s in sources.SOURCES.values()
    ]
    print_table("sources", ["name", "kind", "archive", "in cache", "licence", "what it is"], rows)
    print(f"cache: {sources.cache_dir()}")


@app.command()
def sites() -> None:
    """List what a neuron can be, and in which model families."""
    from relearn_lens.neurons.sites import FAMILIES, SITES

    forms = {"writes": "out", "reads": "both", "gains": "gain", "writers": "writes"}
    rows = []
    for site, says in SITES.items():
        by_forms: dict[str, list[str]] = {}
        for family, sites in FAMILIES.items():
            if site in sites:
                has = [sever for weights, sever in forms.items() if getattr(sites[site], weights)]
                by_forms.setdefault(", ".join(has) or "none", []).append(family)
        rows += [[site, says, has, ", ".join(families)] for has, families in by_forms.items()]
    print_table(
        "sites", ["name", "what a neuron is", "prune.sever (weights)", "families; all can be ablated by hooks"], rows
    )


@app.command()
def scores() -> None:
    """List the ways to rank neurons."""
    from relearn_lens.find.saliency import SCORES

    print_table("scores", ["name", "unit", "what it says"], [[s.name, s.unit, s.says] for s in SCORES.values()])


@app.command()
def doctor() -> None:
    """Say what this machine has and lacks, and which presets it can run."""
    import platform
    import shutil
    from importlib import metadata

    import torch

    from relearn_lens import sources
    from relearn_lens.runs import needs
    from relearn_lens.runs.store import PACKAGES

    rows = [["python", platform.python_version(), platform.platform()]]
    for name in PACKAGES:
        try:
            rows.append([name, metadata.version(name), ""])
        except metadata.PackageNotFoundError:
            rows.append([name, "missing", 'pip install -c constraints.txt -e ".[demo]"'])
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    rows.append(["devices", ", ".join(devices), ""])
    cache = sources.cache_dir()
    room = next(p for p in (cache, *cache.parents) if p.exists())
    rows.append(["cache", str(cache), ""])
    rows.append(["", f"{shutil.disk_usage(room).free / 1e9:.0f} GB free", "RELEARN_LENS_CACHE moves it"])
    for name in sources.SOURCES:
        there = sources.is_cached(name)
        rows.append(
            [
                f"source {name}",
                "in cache" if there else "not fetched",
                "" if there else f"relearn-lens fetch {name}",
            ]
        )
    print_table("doctor", ["what", "found", "note"], rows, piped=80)
    rows = needs.doctor_rows(has_gpu=torch.cuda.is_available() or torch.backends.mps.is_available())
    has, free = rows[0][2], rows[0][4]  # the same for each
    print_table(
        f"presets on this machine (free: {has} of memory, {free} of disk)",
        [needs.HEADER[k] for k in (0, 1, 3, 5)], [[row[k] for k in (0, 1, 3, 5)] for row in rows], piped=80,
    )  # fmt: skip


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


def _folder(settings: str, experiment: Experiment) -> Path:
    """The default run folder: the preset's or file's name, marked when settings were changed on the command line."""
    from relearn_lens.files import sha256_of
    from relearn_lens.runs.presets import settings_of

    name = Path(settings).stem
    if settings_of(settings) != experiment:
        name += "-" + sha256_of(experiment.model_dump_json())[:6]
    return Path("runs") / name


if __name__ == "__main__":
    main()
