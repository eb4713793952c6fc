"""What was reproduced, as Markdown: the table, and all that the seeds say."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from relearn_lens.reproduce.protocol import Reproduction
from relearn_lens.reproduce.readings import READINGS

BEGIN, END = "<!-- claims -->", "<!-- end of claims -->"
"""Lines of a page between which the short table stands."""
TITLE = "# What was reproduced"


def table(results: Sequence[Reproduction]) -> str:
    """All claims as a Markdown table."""
    head = ["paper", "claim", "measured", "bar", "control", "published", "verdict"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for result in results:
        for row in result.rows:
            claim = row.claim
            measured = "not measured" if row.effect is None else f"{row.effect} {claim.unit}"
            bar = f"{'within' if claim.rule == 'within' else 'beyond'} {claim.bar:g}"
            control = "" if row.control is None else f"{row.control:.3f}"
            cells = [result.paper.name, claim.says, measured, bar, control, claim.published, row.verdict]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def short_table(results: Sequence[Reproduction]) -> str:
    """A row per paper, as Markdown: its command, and its claims, each behind its verdict."""
    lines = ["| command | claims |", "|---|---|"]
    for result in results:
        claims = [
            f"{f'**{row.verdict}**' if row.verdict in ('reproduced', 'reversed') else row.verdict}: {row.claim.says}"
            for row in result.rows
        ]
        lines.append(f"| `{result.command}` | {'<br>'.join(claims)} |")
    return "\n".join(lines) + "\n"


def rewritten(
    page: str, results: Sequence[Reproduction], missing: Sequence[str] = (), pretrained: Sequence[Reproduction] = ()
) -> str:
    """A file with these results in the place of its old ones: of a page with lines `BEGIN` and `END` the short table
    between them, else the whole record.

    Raises:
        ValueError: the file holds something else, which would be lost.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if end:
        return f"{before}{begin}\n{short_table(results)}{end}{after}"
    if page and not page.startswith(TITLE):
        raise ValueError(
            f"the file holds something else than a record, and no lines {BEGIN} and {END} between which a table could "
            "stand; give --out a file that is not there, or put these lines in"
        )
    return record(results, missing, pretrained)


def busy(results: Sequence[Reproduction]) -> str:
    """Minutes of one core in all; of seeds that do not say, those by the clock are the most that they can have been."""
    each = [result.seconds if math.isnan(result.cpu_seconds) else result.cpu_seconds for result in results]
    most = "at most " if any(math.isnan(result.cpu_seconds) for result in results) else ""
    return f"{most}{sum(each) / 60:.1f} minutes of one core in all"


def record(
    results: Sequence[Reproduction], missing: Sequence[str] = (), pretrained: Sequence[Reproduction] = ()
) -> str:
    """All that was measured, as Markdown: the table, what the seeds say, and the seconds of every paper; `pretrained`:
    what was measured at scale real."""
    counts = Counter(row.verdict for result in results for row in result.rows)
    lines = [
        TITLE, "",
        "Made by `relearn-lens reproduce --table DIR --out FILE` from the folder of `relearn-lens reproduce all`. Bars "
        "stand in `claims.py`, older than the runs; what is smaller than in the papers stands in each paper's file. "
        "An interval is over seeds, and not narrower than the one over what was asked inside them.", "",
        f"{len(results)} papers, {sum(counts.values())} claims: "
        + ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
        + f"; {busy(results)}.",
        *(f"Not here: {line}." for line in missing), "", table(results),
    ]  # fmt: skip
    if pretrained:
        models = ", ".join(sorted({result.model for result in pretrained}))
        lines += [f"With `--scale real`, on {models}:", "", table(pretrained)]
    for result in (*results, *pretrained):
        name = result.paper.name + ("" if result.scale == "toy" else f" on {result.model}")
        lines += [
            f"## {name}", "",
            f"{result.paper.title} ({result.paper.source}). {result.paper.protocol}. Smaller here: "
            f"{result.paper.smaller}. Model {result.model}, seeds {', '.join(map(str, result.seeds))}, {result.took}.",
            "",
            *(f"- {row.claim.key}: {note.rstrip('; ')}" for row in result.rows for note in row.notes),
        ]  # fmt: skip
        if read := READINGS.get(name):
            readings = [
                f"- {row.claim.key} ({row.verdict}): {read[row.claim.key]}."
                for row in result.rows
                if row.verdict != "reproduced" and row.claim.key in read
            ]
            lines += ["", "Read so:", "", *readings]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"
