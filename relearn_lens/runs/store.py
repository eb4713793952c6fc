"""Run an experiment, into a run folder or without one, and read a finished run back."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from relearn_lens import files, names
from relearn_lens.files import read_json
from relearn_lens.measure.tracking import Trajectory
from relearn_lens.models import processes
from relearn_lens.models.model import computing
from relearn_lens.progress import Progress, reported
from relearn_lens.runs import settings
from relearn_lens.runs.events import (
    ArmDone,
    Event,
    GraftedAt,
    Measured,
    Paused,
    Prepared,
    SeedDone,
    Weighed,
)
from relearn_lens.runs.experiment import perform, units_of_run
from relearn_lens.runs.folder import SETTINGS, RunFolder, name_of
from relearn_lens.runs.needs import peak_rss_mb
from relearn_lens.runs.preparation import precision_of, prepare
from relearn_lens.runs.presets import settings_of
from relearn_lens.runs.results import Run
from relearn_lens.runs.settings import Experiment
from relearn_lens.runs.stages import Stages, version
from relearn_lens.runs.turns import PATIENCE, Turns, end_with_parent
from relearn_lens.runs.verify import MANIFEST

PACKAGES = ("relearn-lens", "torch", "transformer-lens", "transformers", "accelerate", "nervaluate", "numpy")


@names.explained
def run(
    experiment: Experiment | Mapping[str, Any] | str | Path = "names",
    out: str | Path | None = None,
    *,
    fresh: bool = False,
    shared: str | Path | None = None,
    progress: Progress | None = None,
    on_event: Callable[[Event], object] | None = None,
    **changes: Any,
) -> Run:
    """Run an experiment; with `out`, into a run folder, where the same call continues what was interrupted.

    The experiment is settings, a preset's name, a TOML file or a mapping, as `settings_of` takes them. `changes` are
    settings of it by name, those of a group as a dictionary: `run("toy", seeds=[0], prune={"fraction": 0.02})`.

    A folder that holds a finished run of the same settings is read and not run again. `fresh` removes the run that
    the folder holds first. `shared` is a folder in which runs keep their fine-tuned models for each other: of equal
    recipes (model, text, training, seed, versions) the first is computed and the others read. `progress` is called with
    (what, done, of how much), in the place of the bar that a notebook shows; `on_event` with every event of `perform`
    as it comes.

    Raises:
        FileExistsError: the folder holds a run with other settings (and not `fresh`), or something that is no run.
        BlockingIOError: another process is running into this folder.
        ValueError, OSError: as `settings_of` and `experiment.prepare`; OSError with ENOSPC if the disk is full.
    """
    experiment = settings_of(experiment, changes) if changes or not isinstance(experiment, Experiment) else experiment
    with processes.joined(), reported(progress) if progress else contextlib.nullcontext():
        return _run(experiment, out, fresh, on_event, shared)


def _run(
    experiment: Experiment,
    out: str | Path | None,
    fresh: bool,
    on_event: Callable[[Event], object] | None,
    shared: str | Path | None,
) -> Run:
    if out is None:
        return _drive(experiment, None, on_event)
    path = Path(out)
    if not processes.is_first():
        processes.wait()  # for the first one to have opened the folder
        with reported(None):
            return _in_folder(RunFolder.read(path), experiment, None)
    files.check_folder(path, MANIFEST, "run")
    is_new = not path.exists()
    with files.alone(path), _nothing_left(path) if is_new else contextlib.nullcontext():
        folder = RunFolder.open(path, experiment, fresh=fresh)
        folder.shared = Stages(shared) if shared is not None else None
        processes.wait()
        return _in_folder(folder, experiment, on_event)


@contextlib.contextmanager
def _nothing_left(path: Path) -> Iterator[None]:
    """Remove a new folder where the run was refused before anything was done: there is nothing to go on with."""
    try:
        yield
    except Exception:
        with contextlib.suppress(ValueError):
            began = (path / MANIFEST).is_file() and "inputs" in read_json(path / MANIFEST)
            if not began:
                shutil.rmtree(path, ignore_errors=True)
        raise


def _in_folder(
    folder: RunFolder,
    experiment: Experiment,
    on_event: Callable[[Event], object] | None,
) -> Run:
    """Read the finished run of a folder, or run what is missing into it."""
    if processes.size() > 1:
        folder.freeze()
    if folder.manifest.get("complete") and folder.is_whole(experiment):
        return load_run(folder.path)
    return _drive(experiment, folder, on_event)


def _drive(
    experiment: Experiment,
    folder: RunFolder | None,
    on_event: Callable[[Event], object] | None,
) -> Run:
    """Take the events of `perform` into a `Run` and, if there is one, into its folder."""
    result = Run(experiment, manifest={"versions": versions()}, folder=str(folder.path) if folder else None)
    if processes.size() > 1:
        result.manifest["processes"] = processes.size()
    seconds: dict[str, float] = dict(folder.manifest.get("seconds", {})) if folder else {}
    phase_began = time.monotonic()
    events = perform(experiment, kept=folder)
    is_read = folder is not None
    folder = folder if processes.is_first() else None  # one process writes
    for event in events:
        if is_read:
            processes.wait()  # what is kept now may take the place of what another process has yet to read
        passing = isinstance(event, Measured | Paused | Weighed | GraftedAt | SeedDone)
        if not passing:
            name = _phase(event)
            seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - phase_began, 3)
            phase_began = time.monotonic()
            if folder and folder.turns:
                seconds = {"prepare": seconds["prepare"], **folder.turns.seconds()}
        if isinstance(event, Prepared):
            result.manifest |= {"inputs": dict(event.inputs), "notes": list(event.notes)}
            result.manifest["text"] = [repr(part.corpus) for part in (event.train, event.validation, event.probe)]
            result.manifest["tokens"] = {p: getattr(event, p).n_tokens for p in ("train", "validation", "probe")}
            result.manifest["other"] = event.other.name if event.other else None
        result.take(event)
        if folder:
            folder.keep(event)
        if not passing:
            result.manifest |= {"seconds": seconds, "peak_rss_mb": round(peak_rss_mb())}
            if folder:
                folder.note(**result.manifest)
        if on_event:
            on_event(event)
    if folder:
        folder.finish(result)
    return result


def work_beside(folder: Path, shared: Path | None) -> None:
    """Compute units of the run under way in a folder until none is left: in a process that the run itself started."""
    end_with_parent()
    kept = RunFolder.read(folder)
    kept.shared = Stages(shared) if shared is not None else None
    experiment = settings.experiment(kept.manifest["settings"])
    with reported(None):
        ready = prepare(experiment)
        kept.check_inputs(ready.inputs)
        with computing(ready.model, precision_of(experiment, ready.model.device)):
            turns = Turns(folder, kept, ready, units_of_run(ready))
            while not turns.are_done:
                if not turns.help():
                    time.sleep(PATIENCE)


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a finished run."""
    return (folder / MANIFEST).is_file() and bool(read_json(folder / MANIFEST).get("complete"))


def load_run(folder: str | Path) -> Run:
    """A finished run as objects, without loading the model.

    Raises:
        FileNotFoundError: there is no run folder.
        ValueError: the run is not finished, or a file of it is missing or damaged.
    """
    path = files.path_of(folder, "the path of a run's folder")
    if not (path / MANIFEST).is_file():
        inside = ", ".join(repr(str(each.parent)) for each in sorted(path.glob(f"*/{MANIFEST}"))[:5])
        more = f"; these in it are: {inside}" if inside else ""
        raise FileNotFoundError(f"{str(path)!r} is no run folder: there is no {MANIFEST}{more}")
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest.get("settings"), dict):
        raise ValueError(f"{str(path / MANIFEST)!r} is damaged (it has no settings); run again with --fresh")
    experiment = settings.experiment(manifest["settings"])
    if not manifest.get("complete"):
        raise ValueError(
            f"the run in {str(path)!r} is not finished; `relearn-lens run {path / SETTINGS} --out {path}` continues it"
        )
    kept = RunFolder(path, manifest)
    result = Run(experiment, manifest=manifest, folder=str(path))
    for seed in experiment.seeds:
        for name in kept.names(seed):
            value = kept.named(name)
            if value is None:
                raise ValueError(f"{str(path)!r}: {name} is missing; run it again with --fresh")
            result.take(ArmDone(value, None) if isinstance(value, Trajectory) else value)
    return result


def _phase(event: Event) -> str:
    """The phase that ends with an event, as `seconds` names it."""
    if isinstance(event, Prepared):
        return "prepare"
    return name_of(event.trajectory if isinstance(event, ArmDone) else event)


def versions() -> dict[str, str]:
    """Of this package and of those that it computes with."""
    return {name: version(name) for name in PACKAGES}
