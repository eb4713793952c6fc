"""What a bench says: in 25 lines, as JSON, and as a page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from relearn_lens.analysis import matrix
from relearn_lens.analysis.intervals import Estimate
from relearn_lens.analysis.matrix import NEVER, Entry, Results

if TYPE_CHECKING:
    from relearn_lens.bench.benches import Benched

LIMITS = (
    "What this does not say. The model is small and was taught invented facts, each in a handful of wordings: "
    "fine-tuning facts in makes them sit otherwise than pretraining does, and such facts overstate how robust a "
    "removal is (Deeb & Roger 2024). Only the attacks above were tried, for as many steps: 'not back by these "
    "attacks' is not 'erased', and nothing here can say that. The intervals hold for these keys and seeds; that a "
    "ranking of removers carries over to a larger model is not shown by it."
)
TAUGHT_LIMITS = LIMITS.replace("The model is small and was taught", "The model was taught")
KNOWN_LIMITS = (
    "What this does not say. There is no twin that never knew these facts, so what an attack teaches cannot be told "
    "from what it brings back: nothing here is called recovered. Only the attacks above were tried: 'not back by these "
    "attacks' is not 'erased'."
)


def limits(benched: Benched) -> str:
    """What a result of this bench does not say."""
    if benched.results is None or not benched.results.twin:
        return KNOWN_LIMITS
    return LIMITS if benched.bench.model == "taught" else TAUGHT_LIMITS


def short(estimate: Estimate | None, *, sign: bool = False) -> str:
    """A number between 0 and 1 with its interval, in as few characters as can be: `.82 [.71,.93]`."""
    if estimate is None:
        return "-"
    value = _digits(estimate.value, sign)
    return f"{value} [{_digits(estimate.low)},{_digits(estimate.high)}]" if estimate.interval else value


def _digits(value: float, sign: bool = False) -> str:
    if not math.isfinite(value):
        return "nan"
    text = f"{value:+.2f}" if sign else f"{value:.2f}"
    text = text.replace("-0.00", "0.00").replace("+0.00", "+.00")
    return text.replace("0.", ".", 1) if abs(value) < 0.995 else text


def entries(results: Results) -> dict[str, dict[str, Entry]]:
    """By row (the twin last) and column."""
    return {
        row: {column: matrix.entry(results, row, column) for column in results.columns}
        for row in [*results.rows, *([NEVER] if results.twin else [])]
    }


def lines(benched: Benched) -> list[str]:
    """What is printed: verdicts first, then the matrix, ranks and pairs; at most 25 lines of 80 columns."""
    bench, results = benched.bench, benched.results
    out = ["no remover is complete in every seed"]
    if results is not None:
        table, seeds = entries(results), ",".join(map(str, results.seeds))
        out = [f"{bench.facts}, model {bench.model}: of the half the attacker never had (seeds {seeds})"]
        out += [verdict_line(results, row, table) for row in results.rows[:7]]
        if len(results.rows) > 7:
            out.append(f"... and {len(results.rows) - 7} more removers in {benched.folder.name}/summary.json")
        width = max(map(len, table)) + 1
        columns = list(results.columns)[: max(1, (80 - width - 22) // 16)]
        cells = [["", "moved", "left", *(name[:15] for name in columns)]]
        for row in [*results.rows[:7], *([NEVER] if results.twin else [])]:
            moved = sum(results.cells[row, s].moved for s in results.seeds) / len(results.seeds)
            shown = [table[row][c].left if row == NEVER else table[row][c].recovery for c in columns]
            number = "" if row == NEVER else f"{moved:.2f}"
            cells.append([row, number, *map(short, (matrix.left(results, row), *shown))])
        out += [
            "".join([f"{row:{width}}{moved:>5} ", *(f"{cell:<16}" for cell in rest)]).rstrip()
            for row, moved, *rest in cells
        ]
        beside = "never: what it answers" if results.twin else "no twin: nothing is recovered"
        out += [
            "moved: share of the removal kept at equal ability; left: answered there; then",
            f"the share back, less the twin's gain ({beside})",
            *_ranking_lines(results),
        ]
    if benched.failed:
        name, error = next(iter(benched.failed.items()))
        out.append(f"{len(benched.failed)} failed, such as {name}: {error}"[:80])
    return out


def _ranking_lines(results: Results) -> list[str]:
    out = []
    if ranking := matrix.ranking(results):
        says = "no order on one side" if math.isnan(ranking.tau.value) else short(ranking.tau)
        out.append(f"ranks before and after calibration: Kendall's tau {says}")
    differences = matrix.pairs(results)
    apart = [pair for pair in differences if pair.p_holm < 0.05]
    if differences:
        out.append(
            f"more comes back, Holm over {len(differences)} pairs: {'none' if not apart else f'{len(apart)} apart'}"
        )
        less_than: dict[str, list[str]] = {}
        for pair in apart:
            more, less = (pair.one, pair.other) if pair.difference.value > 0 else (pair.other, pair.one)
            less_than.setdefault(more, []).append(less)
        pairs = "; ".join(f"{more} > {', '.join(less)}" for more, less in less_than.items())
        out += textwrap.wrap(pairs, 80, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return out


def verdict_line(results: Results, row: str, table: dict[str, dict[str, Entry]]) -> str:
    """One remover: what comes back by its strongest attack, the twin's gain beside it, and what may be said."""
    column = matrix.column_of(results, row)
    if column is None:
        return f"{row}: undecided: no attack leaves it usable (none passes)"[:80]
    entry = table[row][column]
    if entry.recovery is None:
        return f"{row}: undecided: {entry.why} ({column})"[:80]
    says = matrix.verdict(entry) if results.twin else "no twin"
    by = f"{column} {f'{float(entry.rate):.0e}'.replace('e-0', 'e-')}" if entry.rate else column
    twin = f"; twin {short(entry.twin, sign=True)}" if entry.twin else ""
    return f"{row}: {says} {short(entry.recovery)}, {by}{twin}"


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else asdict(estimate)


def chosen(benched: Benched, of: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What was looked into by attack and rate, then by row: of each row at the rate that was chosen for it."""
    results, first = benched.results, next(iter(benched.bench.columns))
    if results is None:
        return {}
    out: dict[str, Any] = {}
    for row in [*results.rows, *([NEVER] if results.twin else [])]:
        rate = matrix.rate_of(results, row, first)
        # Of a model that no checkpoint left usable, the first rate.
        for where, by in of.items():
            if row in by and (rate is None or where.rpartition(" ")[2] == rate):
                out.setdefault(row, by[row])
    return out


def tracked(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Metrics along one attack: by name its unit, steps, values with intervals, and values by layer or part."""
    out: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "why" in row:
            out.setdefault(row["metric"], {})["why"] = row["why"]
            continue
        mine = out.setdefault(
            row["metric"], {"unit": row["unit"], "steps": [], "whole": [], "chance": [], "layers": {}}
        )
        if row["layer"] is None:
            mine["steps"].append(row["step"])
            mine["whole"].append([row["value"], row["low"], row["high"]])
            mine["chance"].append(row["chance"])
        else:
            mine["layers"].setdefault(row["layer"], []).append(row["value"])
    return {name: each for name, each in out.items() if each.get("steps") or "why" in each}


def summary(benched: Benched) -> dict[str, Any]:
    """All numbers, as summary.json holds them."""
    bench, results = benched.bench, benched.results
    out: dict[str, Any] = {
        "settings": bench.model_dump(mode="json"),
        "failed": dict(benched.failed),
        "seconds": round(benched.seconds, 1),
        "unit": "share of what was removed, held-out half, less the twin's gain at the same step",
        "limits": limits(benched),
    }
    if results is None:
        return {**out, "rows": {}}
    table = entries(results)
    rows: dict[str, Any] = {}
    for row, by_column in table.items():
        cells = {str(seed): results.cells[row, seed] for seed in bench.every_seed}
        column = matrix.column_of(results, row) if row != NEVER else None
        rows[row] = {
            "verdict": None if column is None else matrix.verdict(by_column[column]),
            "strongest": column,
            "left": _plain(matrix.left(results, row)),
            "moved": {seed: cell.moved for seed, cell in cells.items()},
            "kept": {seed: cell.kept_calibrated for seed, cell in cells.items()},
            "kept_before_calibration": {seed: cell.kept_removed for seed, cell in cells.items()},
            "attacks": {
                name: {
                    "rate": entry.rate, "recovery": _plain(entry.recovery), "answers": _plain(entry.left),
                    "twin": _plain(entry.twin), "why": entry.why, "steps": list(entry.steps),
                    "verdict": None if row == NEVER else matrix.verdict(entry),
                }
                for name, entry in by_column.items()
            },
        }  # fmt: skip
    ranking = matrix.ranking(results)
    return {
        **out,
        "rows": rows,
        "chance": results.cells[results.rows[0], results.seeds[0]].chance,
        "ranking": None if ranking is None else {
            "before": dict(ranking.before), "after": dict(ranking.after), "tau": _plain(ranking.tau),
        },
        "pairs": [
            {"one": p.one, "other": p.other, "difference": _plain(p.difference), "p_holm": p.p_holm}
            for p in matrix.pairs(results)
        ],
        "parts": {where: {row: list(each) for row, each in by.items()} for where, by in benched.parts.items()},
        "metrics": {row: tracked(each) for row, each in chosen(benched, benched.metrics).items()},
    }  # fmt: skip


def render(benched: Benched) -> str:
    """The page as HTML.

    Raises:
        ValueError: no row is complete.
    """
    from relearn_lens.show import plots, report

    results, bench = benched.results, benched.bench
    if results is None:
        raise ValueError("no remover is complete in every seed, so there is nothing to draw")
    table = entries(results)
    draw = report.Drawing()
    pictures = {"matrix": draw(plots.bench_matrix, results)}
    pictures |= {f"curves-{column}": draw(plots.bench_curves, results, column) for column in results.columns}
    pictures["ranks"] = draw(plots.bench_ranks, results)
    about = f"{next(iter(bench.columns))} at the rate chosen for each remover, seed {bench.seeds[0]}"
    over_keys = f"{about}; intervals over keys"
    pictures["parts"] = draw(plots.bench_parts, results, chosen(benched, benched.parts), over_keys)
    metrics = {row: tracked(each) for row, each in chosen(benched, benched.metrics).items()}
    for name in dict.fromkeys(name for each in metrics.values() for name in each):
        by_row = {row: each[name] for row, each in metrics.items() if "whole" in each.get(name, {})}
        pictures[f"metric-{name}"] = draw(plots.bench_metric, results, by_row, name, over_keys)
        pictures[f"layers-{name}"] = draw(plots.bench_layers, results, by_row, name, about)
    pictures["components"] = draw(plots.bench_components, results)
    return report.page(
        "bench.html.j2",
        title=f"What comes back: {bench.facts}, {bench.model}",
        heading=f"What ways back bring back of {bench.facts} in {bench.model}",
        verdicts=[(row, verdict_line(results, row, table).partition(": ")[2]) for row in results.rows],
        pictures=pictures,
        matrix=matrix_table(results, table),
        pairs=(
            ["", "against", "difference", "p (Holm)"],
            [[p.one, p.other, short(p.difference, sign=True), f"{p.p_holm:.3f}"] for p in matrix.pairs(results)],
        ),
        limits=limits(benched),
        bound=f"{100 * results.bound:g} %",
        settings=bench.to_toml(),
        failed=list(benched.failed.items()),
        seconds=benched.seconds,
        chance=results.cells[results.rows[0], results.seeds[0]].chance,
        twin=results.twin,
    )


def matrix_table(results: Results, table: dict[str, dict[str, Entry]]) -> tuple[list[str], list[list[str]]]:
    """Every number of the matrix as a table."""
    header = ["", "attack", "rate", "back", "answers", "twin's gain", "left before", "steps", ""]
    return header, [
        [
            row, column, entry.rate, short(entry.recovery), short(entry.left), short(entry.twin, sign=True),
            short(matrix.left(results, row)), ", ".join(map(str, entry.steps)), entry.why,
        ]
        for row, by_column in table.items()
        for column, entry in by_column.items()
    ]  # fmt: skip
