"""Commands that remove facts from a model, and say what there is to do it with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relearn_lens.cli import pages
from relearn_lens.cli.following import following
from relearn_lens.cli.printing import print_prose, print_table, short

if TYPE_CHECKING:
    from relearn_lens.remove.recipes import Recipe


def remove(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="See `removers`; npo+sam: in a wrapper, npo@lookup: on a place.")
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
    from relearn_lens.files import check_free
    from relearn_lens.progress import reported
    from relearn_lens.runs import removals

    removal = _removal(model, method, set_ or [], recipe, where)
    if out is not None:
        check_free(out)
    says = {
        "lora": lora, "half": half, "model": model, "facts": facts, "retain": retain, "general": general,
        "held_out": held_out, "recipe": recipe,
    }  # fmt: skip
    with following() as follow, reported(follow.progress):
        subject = removals.subject(
            model, facts, retain=retain, general=general, held_out=held_out, seed=seed, half=half
        )
        memory = removals.memory_of(subject, removal, lora=lora)
        follow.say(f"memory: about {sum(memory.values()):,} MB ({', '.join(f'{k} {v:,}' for k, v in memory.items())})")
        done = removals.carry_out(
            subject, removal, out=out, lora=lora, seed=seed, says={"asked": says},
        )  # fmt: skip
    pages.print_removed(method, subject, removal, done)


def _removal(model: str, method: str, sets: list[str], recipe: str | None, where: str | None) -> Recipe:
    """The recipe with what was set."""
    from relearn_lens.find.localisers import localiser_of
    from relearn_lens.runs import removals

    fields = removals.fields_from(sets) | ({"where": where} if where else {})
    removal = removals.recipe_for(model, method, fields, kind=recipe)
    if removal.where is None and removal.fraction is not None:
        raise ValueError(
            f"fraction = {removal.fraction} says how many neurons a localiser gives, and {method} is given none; add "
            "--where attribution_patching, or leave fraction out"
        )
    if removal.where is not None:
        localiser_of(removal.where, **removal.where_fields)
    elif removal.where_fields:
        raise ValueError(f"--set where.{next(iter(removal.where_fields))}: there is no localiser; name one as --where")
    return removal


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


def localisers() -> None:
    """List the ways to find where something is in a model, with their fields and where they are from."""
    from relearn_lens.find.localisers import LOCALISERS

    pages.print_methods(LOCALISERS)
