"""What a run, a sweep, a reproduction or a removal came to, printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from relearn_lens.cli.printing import columns, print_prose, print_table, short

if TYPE_CHECKING:
    from relearn_lens.bench.sweeps import Swept
    from relearn_lens.remove.recipes import Recipe
    from relearn_lens.reproduce.protocol import Reproduction
    from relearn_lens.runs.removals import Removed, Subject
    from relearn_lens.runs.results import Run


def print_brief(result: Run, report: str) -> None:
    """The run in ten seconds."""
    from rich.console import Console

    from relearn_lens.show import brief

    console = Console(width=columns(), highlight=False)
    for line in brief.brief(result, report):
        console.print(line, soft_wrap=True)


def print_answers(result: Run) -> None:
    """Every question in full: its verdict, what it rests on, what was measured, and what would decide it."""
    from relearn_lens.show import brief

    print()
    for answer in brief.answered(result):
        question = answer.question
        decide = f" To decide it: {question.decide}." if question.decide else ""
        holm = f" p (Holm) {question.p_holm:.2g}." if question.p_holm is not None else ""
        measured = "" if answer.number or answer.says in question.says else f" Measured: {answer.says}."
        print_prose(
            f"{question.asks} {question.verdict}. {question.says}{measured} Bar {question.bar:g}.{holm}{decide}"
        )


def print_scores(result: Run) -> None:
    """Every label's score in every arm, and what cutting alone does."""
    from relearn_lens.show import tables

    print()
    print_table(tables.score_title(result), *tables.score_rows(result), piped=80)
    if result.damage:
        print_prose(tables.draws_row(result))


def print_layers(result: Run) -> None:
    """The numbers of every layer."""
    from relearn_lens.show import tables

    print()
    print_table("by layer: pruned share; mean rank saliency (1 highest)", *tables.layer_rows(result), piped=80)


def print_story(result: Run) -> None:
    """What happened by the rankings, and what the run took."""
    numbers, seconds = result.numbers, result.manifest.get("seconds") or {}
    if numbers.overlap is not None:
        print_prose(f"The random arm shares {100 * numbers.overlap:.0f} % of its neurons with the concept arm.")
    print()
    print_prose(numbers.what_happened)
    memory = result.manifest.get("peak_rss_mb")
    print(f"\n{sum(seconds.values()):.0f} s, peak memory {memory} MB; folder {result.folder}")


def print_findings(result: Run) -> None:
    """What was measured besides F1 and saliency."""
    from relearn_lens.show import tables

    print()
    for title, (header, rows) in (
        ("how fast it came back", tables.speed_rows(result)),
        ("attribution: share by layer", tables.attribution_rows(result)),
        ("scores at base", tables.agreement_rows(result)),
        ("activations, base against the last stage", tables.similarity_rows(result)),
    ):
        if rows:
            print_table(title, header, rows, piped=80)
    for name, lines in result.numbers.heirs.items():
        if lines:
            print_prose(
                f"top words at base → at the end, of neurons new in the top tenth ({name} arm, gained most first)"
            )
            for line in lines:
                print_prose(str(line), indent=2)
            print()


def print_claims(result: Run) -> None:
    """The paper's claims, beside their controls."""
    from relearn_lens.show import tables

    if claims := result.numbers.claims:
        print()
        header, rows = tables.claims_rows(claims)
        shown = [k for k, name in enumerate(header) if name not in ("claim", "concept", "control")]
        print_table(
            "claims of the paper, against the controls", [header[k] for k in shown],
            [[row[k] for k in shown] for row in rows], piped=80,
        )  # fmt: skip
        for claim in claims:
            print_prose(f"{claim.id}. {claim.says}: {claim.verdict}. {claim.why}")
        print_prose(tables.CORRECTED)


def print_compared(runs: list[Run]) -> None:
    """Runs side by side."""
    from relearn_lens.show import report

    beside = report.compared(runs)
    for line in beside.warnings:
        print_prose(f"note: {line}")
    print_table("settings that differ", *beside.differ, piped=80) if beside.differ[1] else print("no setting differs\n")
    print_table("scores, means with 95 % intervals over seeds, else over sentences", *beside.scores, piped=80)
    if beside.claims:
        header, rows = beside.claims
        # A run's verdict and effect in one cell, as a table that is cut into pieces would part them.
        cells = [[row[0], *map(" ".join, zip(row[2::2], row[3::2], strict=True))] for row in rows]
        print_table("claims of the paper: verdict, effect", [header[0], *header[2::2]], cells, piped=80)


def print_swept(swept: Swept) -> None:
    """The table of a sweep, what to know of it, and what failed."""
    from relearn_lens.bench import sweep_tables, sweeps

    print()
    if swept.rows:
        keys = [key for key in swept.summary["swept"] if key not in sweep_tables.SPREAD]
        unit = " or ".join(sorted({row["unit"] for row in swept.rows}))
        print_table(f"{unit}; every stage is in {sweeps.SUMMARY}", *sweep_tables.printed(swept.rows, keys))
    for note in swept.summary["notes"]:
        print(f"note: {note}")
    if swept.rows:
        print(sweep_tables.intervals(swept.rows, len(swept.summary["settings"])))
    if swept.failed:
        rows = [[name, why, swept.summary["cells"][name]["log"]] for name, why in swept.failed.items()]
        print_table("failed; the same command tries again", ["cell", "error", "log"], rows)
    print(f"folder {swept.folder}")


def print_reproduction(result: Reproduction) -> None:
    """A paper's claims, verdict first."""
    print_prose(f"{result.paper.name}: {result.paper.title} ({result.paper.source})")
    for row in result.rows:
        beside = "" if row.control is None else f"; control {row.control:.2f}"
        published = f"; published {row.claim.published}" if row.claim.published else ""
        value = "not measured" if row.effect is None else f"{row.effect} {row.claim.unit}"
        bar = f"within {row.claim.bar:g}" if row.claim.rule == "within" else f"bar {row.claim.bar:g}"
        print_prose(f"{row.verdict}: {row.claim.says}. {value} ({bar}{beside}{published})", indent=2)
        for note in row.notes:
            print_prose(note, indent=4)
    print_prose(f"{result.took}, seeds {', '.join(map(str, result.seeds))}, {result.model}; {result.paper.smaller}")
    print()


def print_methods(kinds: Mapping[str, Any]) -> None:
    """Methods with what they do: formula, source, and each field with its default and what it is."""
    for name, kind in kinds.items():
        print_prose(f"{name}: {kind.formula}")
        print_prose(f"source: {kind.source}", indent=4)
        for field, about in kind.model_fields.items():
            print_prose(
                f"{field} = {short(about.get_default(call_default_factory=True))}: {about.description}", indent=4
            )
        print()


def print_removed(method: str, subject: Subject, removal: Recipe, done: Removed) -> None:
    """What was known before and after, in a few lines."""
    from relearn_lens.show import tables

    chosen = ", ".join(f"{name} {short(value)}" for name, value in removal.departures().items())
    print_prose(f"{method} on {subject.name}, {subject.facts.name}: {chosen or 'no fields'}")
    steps = f"{done.pause.step} steps, " if done.pause.step else ""
    print_prose(f"moved: {done.where}; {steps}{done.seconds:.0f} s")
    print_table("before → after", *tables.answer_rows(done.before, done.after), piped=80)
    for note in done.notes:
        print_prose(f"note: {note}")
    if done.folder is None:
        return
    if subject.native:
        print_prose(f"{done.folder}: weights, tokenizer and manifest; a native model has no Hugging Face form")
    else:
        print_prose(f"{done.folder}: AutoModelForCausalLM.from_pretrained loads it; removal.json says how it was made")
