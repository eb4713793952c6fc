"""The run folder: what a run leaves on disk, and how it is read back.

    settings.toml            the resolved settings; `relearn-lens run settings.toml` repeats the run
    manifest.json            versions, hashes of every input, notes, seconds, memory; `complete` once all is there
    summary.json             the numbers, with their units (summary.py)
    metrics.parquet          F1, precision, recall per arm, seed, stage, label
    layers.parquet           saliency per arm, seed, stage, layer; all neurons and matched
    tensors/*.safetensors    per seed and arm: score of every neuron, class statistics, span counts, what was pruned
    stages/*.safetensors     every stage of the arm under way, and grafts at one stage, while the run lasts
    state/*.safetensors      where the training under way stood at its last pause: weights, optimiser, position
    turns/                   what several processes at one run tell each other, while it lasts
    weights/*.safetensors    the base models while the run lasts; of the arms, by `keep`, the last or every stage's
    report.html              the page (report.py)

Every file is written whole: to a temporary name, synced, renamed; and in an order in which what is there can be used:
measurements of a stage before the state to go on from it, results before what they were made from is removed, the
manifest's `complete` last. A run that was interrupted goes on from the last pause of the training under way, and ends
in the same bits.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relearn_lens import files
from relearn_lens.files import as_json, read_json, read_tensors, write_tensors, write_whole
from relearn_lens.measure.tracking import Snapshot, Trajectory
from relearn_lens.models import processes
from relearn_lens.models.training import Checkpoint
from relearn_lens.runs import archive, needs, settings, verify
from relearn_lens.runs.events import (
    Again,
    ArmDone,
    Base,
    Blocked,
    Cuts,
    Damage,
    Event,
    Grafted,
    GraftedAt,
    Measured,
    Own,
    Paused,
    Prepared,
    SeedDone,
    Sized,
    Weighed,
)
from relearn_lens.runs.results import Run
from relearn_lens.runs.settings import Experiment
from relearn_lens.runs.stages import Stages
from relearn_lens.runs.summary import layers_table, summary
from relearn_lens.runs.turns import TURNS, Turns, beside, processes_for
from relearn_lens.runs.units import BASE, GRAFTED, TWIN, Unit, units_of
from relearn_lens.runs.verify import MANIFEST

SUMMARY, SETTINGS = "summary.json", "settings.toml"


class RunFolder:
    """A run's folder on disk; gives `perform` what an earlier process left in it."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self.shared: Stages | None = None
        self.turns: Turns | None = None
        self._state_kept = time.monotonic()
        self._frozen: frozenset[Path] | None = None

    @classmethod
    def open(cls, path: Path, experiment: Experiment, *, fresh: bool = False) -> RunFolder:
        """A new folder, or one with a run of the same settings to go on with."""
        files.check_folder(path, MANIFEST, "run")
        if (path / MANIFEST).is_file() and not fresh:
            manifest = read_json(path / MANIFEST)
            if settings.are_of(manifest.get("settings"), experiment):
                files.remove_unfinished(path)
                return cls(path, manifest)
            if manifest.get("inputs"):  # else nothing ran: the settings were refused, and these may be the mended ones
                changed = _differences(manifest.get("settings", {}), experiment.model_dump(mode="json"))
                raise FileExistsError(
                    f"{str(path)!r} holds a run with other settings ({changed}); choose another folder with --out, or "
                    "--fresh to remove that run"
                )
        for old in path.iterdir() if path.is_dir() else ():
            if old.name != files.LOCK:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path, {})
        # The manifest first: it is what makes the folder a run.
        folder.note(settings=experiment.model_dump(mode="json"), complete=False)
        write_whole(path / SETTINGS, experiment.to_toml().encode())
        return folder

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """The folder that the first process has opened, for the others.

        Raises:
            FileNotFoundError: this process does not see it.
        """
        if not (path / MANIFEST).is_file():
            raise FileNotFoundError(
                f"process {processes.rank()} sees no run at {str(path)!r}, which the first process has opened; put "
                "runs on a file system that all machines share (--out)"
            )
        return cls(path, read_json(path / MANIFEST))

    def freeze(self) -> None:
        """What is here now is what was kept: the first process goes on writing while others still look, and all must
        find the same.

        Raises:
            OSError: the processes see different files.
        """
        self._frozen = frozenset(file for file in self.path.rglob("*.safetensors"))
        names = sorted(str(file.relative_to(self.path)) for file in self._frozen)
        digest = torch.frombuffer(bytearray(hashlib.sha256("\n".join(names).encode()).digest()), dtype=torch.uint8)
        if not torch.equal(digest, processes.agreed(digest.clone())):
            raise OSError(
                f"process {processes.rank()} sees other files in {str(self.path)!r} than the first process; put runs "
                "on a file system that all machines share (--out)"
            )
        processes.wait()

    def _is_here(self, path: Path) -> bool:
        return path.exists() if self._frozen is None else path in self._frozen

    def is_whole(self, experiment: Experiment) -> bool:
        """Whether the measurements of every seed and arm are here; what is missing can be made again."""
        return all(self._is_here(self._tensors(name)) for seed in experiment.seeds for name in self.names(seed))

    def names(self, seed: int) -> list[str]:
        """The names of all results of a seed, in their order."""
        experiment = settings.experiment(self.manifest["settings"])
        other = self.manifest.get("other")
        if not isinstance(other, str | None):
            raise ValueError(f"{str(self.path / MANIFEST)!r} is damaged (other: {other!r}); run again with --fresh")
        units = units_of(experiment, seed, other=other)
        return [f"{name}-{seed}" for unit in units for name in unit.results if name != BASE]

    def note(self, **entries: Any) -> None:
        """Write entries into the manifest."""
        self.manifest |= entries
        write_whole(self.path / MANIFEST, as_json(self.manifest))

    def check_inputs(self, inputs: Mapping[str, str]) -> None:
        """Refuse to go on with other inputs than the run began with."""
        before = self.manifest.get("inputs")
        if before is not None and before != dict(inputs):
            changed = sorted(k for k in {*before, *inputs} if before.get(k) != inputs.get(k))
            raise ValueError(
                f"the inputs of {str(self.path)!r} have changed since the run began ({', '.join(changed)}); put them "
                "back, or run again with --fresh"
            )

    def check_room(self, ready: Prepared) -> None:
        """Write down what the run will take of the disk, and refuse to begin if that much is not free."""
        need, disk = disk_estimate(ready), shutil.disk_usage(self.path)
        there = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        self.note(disk_estimate_mb=round(need / 2**20))
        if need - there > disk.free:
            raise OSError(
                errno.ENOSPC,
                f"the run needs about {need / 2**20:,.0f} MB of disk with keep={ready.experiment.keep!r}, "
                f"{disk.free / 2**20:,.0f} MB are free at {str(self.path)!r}; make room, choose another disk with "
                "--out, or keep less (--set keep=none, or of a run of several processes --set workers=1)",
            )

    def keep(self, event: Event) -> None:
        """What an event brings, so that another process need not compute it again."""
        match event:
            case Prepared():
                self.check_inputs(event.inputs)
                self.check_room(event)
            case Measured():  # the base's is kept with the base
                path = self._stage(event.arm, event.seed, event.stage)
                if not path.exists():
                    write_tensors(path, *archive.pack(event.snapshot))
            case Paused():
                self.keep_state(event)
            case Weighed():
                path = self._weights(f"{event.arm}@{event.stage}", event.seed)
                if not path.exists():
                    write_tensors(path, {name: value.cpu() for name, value in event.weights.items()}, {})
            case GraftedAt():
                write_tensors(self._stage(GRAFTED, event.seed, event.at), *archive.pack(event.grafted))
            case Base():
                self.keep_base(event)
            case ArmDone():
                self.keep_arm(event)
            case SeedDone():
                if self._keeps != "all":  # no more grafts of this seed are made
                    for path in (self.path / "weights").glob(f"*@*-{event.seed}.safetensors"):
                        path.unlink()
            case _:
                if not (path := self._tensors(name_of(event))).exists():
                    write_tensors(path, *archive.pack(event))

    def holds(self, unit: Unit) -> bool:
        """Whether all results of a unit are here."""
        seed, results = unit.seed, unit.results
        if unit.part_of:
            whole, part = unit.part_of
            weights = unit.name != TWIN or self._is_here(self._weights(f"{whole}@{part}", seed))
            if weights and self._is_here(self._stage(whole, seed, part)):
                return True
            results = (whole,)  # of what is done there are no parts any more
        weights = unit.name != BASE or self._is_here(self._weights(BASE, seed))
        return weights and all(self._is_here(self._tensors(f"{name}-{seed}")) for name in results)

    @contextlib.contextmanager
    def shared_out(self, ready: Prepared, units: Sequence[Unit]) -> Iterator[Turns | None]:
        """For a while, other processes of this machine compute units of the run too, as many as its settings say; None
        where there are no others."""
        n = self.manifest.get("workers")  # a run that goes on keeps its number: the last bits depend on it
        if not isinstance(n, int) or n < 1:
            n = processes_for(ready)
        if processes.size() > 1 or n == 1:  # those that a launcher started start no others
            self.manifest["workers"] = 1
            yield None
            return
        self.note(workers=n)
        self.turns = Turns(self.path, self, ready, units)
        shared = self.shared.path if self.shared else None
        threads = ready.experiment.threads or max(1, torch.get_num_threads() // n)  # of each process
        with beside(self.path, n - 1, threads=threads, shared=shared):
            yield self.turns

    def result(self, kind: type, seed: int, name: str = "") -> Any:
        """A result of a seed, if it is here."""
        return self._kept("-".join((kind.__name__.lower(), *([name] if name else []), str(seed))), kind)

    def named(self, name: str) -> Any:
        """A result by its name; None where it is not here."""
        return self._kept(name, KINDS.get(name.partition("-")[0], Trajectory))

    def weighed(self, arm: str, seed: int, stage: str) -> dict[str, Tensor] | None:
        """Weights of an arm at a stage that grafts are made from, if they are here."""
        path = self._weights(f"{arm}@{stage}", seed)
        return read_tensors(path)[0] if self._is_here(path) else None

    def stages_weighed(self, arm: str, seed: int) -> list[str]:
        """The stages of which `weighed` has weights."""
        paths = (self.path / "weights").glob(f"{arm}@*-{seed}.safetensors")
        return [path.stem.removeprefix(f"{arm}@").removesuffix(f"-{seed}") for path in paths if self._is_here(path)]

    def grafted_at(self, seed: int, at: str) -> Grafted | None:
        """What of an unfinished `Grafted` was made at one stage, if it is here."""
        path = self._stage(GRAFTED, seed, at)
        return _unpacked(path, Grafted) if self._is_here(path) else None

    def keep_base(self, base: Base) -> None:
        """Weights and measurement of a seed's base model, so that its arms need no new fine-tuning."""
        weights = self._weights("base", base.seed)
        if not weights.exists():
            write_tensors(weights, {k: v.cpu() for k, v in base.weights.items()}, {})
        self._keep(f"base-{base.seed}", base.snapshot)
        self._forget(f"base-{base.seed}")

    def stages(self, arm: str, seed: int) -> dict[str, Snapshot]:
        """The stages of an unfinished arm that were measured."""
        prefix = f"{arm}-{seed}@"
        paths = sorted((self.path / "stages").glob(f"{prefix}*.safetensors"))
        return {path.stem.removeprefix(prefix): _unpacked(path) for path in paths if self._is_here(path)}

    def keep_state(self, event: Paused) -> None:
        """Where a training stands: enough to go on from. One file, replaced at every pause; a large one not before
        `STATE_SECONDS` have gone by: writing it at every pause takes longer than computing again what a kill loses."""
        tensors = {f"weights/{name}": value for name, value in event.weights.items()}
        tensors |= {f"optimiser/{name}": value for name, value in event.state.items()}
        at = event.at
        meta = {"epoch": at.epoch, "step": at.step, "tokens_seen": at.tokens_seen, "loss": at.loss, "by": at.by}
        large = sum(value.nbytes for value in tensors.values()) > LARGE_STATE
        if not large or time.monotonic() - self._state_kept >= STATE_SECONDS:
            write_tensors(self._state(f"{event.training}-{event.seed}"), {k: v.cpu() for k, v in tensors.items()}, meta)
            self._state_kept = time.monotonic()
        if self._keeps == "all":
            path = self._weights(f"{event.training}@{at.stage}", event.seed)
            write_tensors(path, {name: value.cpu() for name, value in event.weights.items()}, {})

    def state(self, training: str, seed: int) -> tuple[Checkpoint, dict[str, Tensor], dict[str, Tensor]] | None:
        """Checkpoint, weights and optimiser state of a training that was interrupted."""
        path = self._state(f"{training}-{seed}")
        if not self._is_here(path):
            return None
        tensors, meta = read_tensors(path)
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "optimiser": {}}
        try:
            for name, value in tensors.items():
                kind, _, rest = name.partition("/")
                parts[kind][rest] = value
            numbers = float(meta["epoch"]), int(meta["step"]), int(meta["tokens_seen"]), float(meta["loss"])
            at = Checkpoint(*numbers, by=meta["by"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is damaged ({error!r}); run again with --fresh") from error
        return at, parts["weights"], parts["optimiser"]

    def _forget(self, training: str) -> None:
        """Remove what an unfinished training needed, once its result is there."""
        self._state(training).unlink(missing_ok=True)
        for path in (self.path / "stages").glob(f"{training}@*.safetensors"):
            path.unlink(missing_ok=True)

    @property
    def _keeps(self) -> str:
        return str(self.manifest.get("settings", {}).get("keep", "none"))

    def base(self, seed: int) -> tuple[dict[str, Tensor], Snapshot] | None:
        """A seed's base model, if both its weights and its measurement are here."""
        weights, snapshot = self._weights("base", seed), self._kept(f"base-{seed}", Snapshot)
        if snapshot is None or not self._is_here(weights):
            return None
        return read_tensors(weights)[0], snapshot

    def keep_arm(self, arm: ArmDone) -> None:
        """A finished arm."""
        path = arm.trajectory
        if self._keeps != "none" and arm.weights is not None:
            write_tensors(self._weights(path.arm, path.seed), {k: v.cpu() for k, v in arm.weights.items()}, {})
        if arm.weights is not None or not self._tensors(f"{path.arm}-{path.seed}").exists():
            self._keep(f"{path.arm}-{path.seed}", path)
        self._forget(f"{path.arm}-{path.seed}")
        self._forget(f"{path.arm}-fine-{path.seed}")

    def arm(self, name: str, seed: int) -> Trajectory | None:
        """A finished arm, if it is here."""
        return self._kept(f"{name}-{seed}", Trajectory)

    def finish(self, result: Run) -> None:
        """Tables and summary; then what only an unfinished run needs goes, and the run is complete: its manifest holds
        the hash of every file beside it."""
        files.remove_unfinished(self.path)
        write_whole(self.path / "metrics.parquet", result.to_dataframe().to_parquet(index=False))
        write_whole(self.path / "layers.parquet", layers_table(result).to_parquet(index=False))
        write_whole(self.path / SUMMARY, as_json(summary(result)))
        for name in ("state", "stages", TURNS, *(["weights"] if self._keeps == "none" else [])):
            shutil.rmtree(self.path / name, ignore_errors=True)
        final = {**self.manifest, "outputs": verify.hashes_of(self.path), "complete": True}
        final.pop("seal", None)
        self.note(**final, seal=verify.seal_of(final))

    def _tensors(self, name: str) -> Path:
        return self.path / "tensors" / f"{name}.safetensors"

    def _state(self, training: str) -> Path:
        return self.path / "state" / f"{training}.safetensors"

    def _stage(self, arm: str, seed: int, stage: str) -> Path:
        return self.path / "stages" / f"{arm}-{seed}@{stage}.safetensors"

    def _weights(self, name: str, seed: int) -> Path:
        return self.path / "weights" / f"{name}-{seed}.safetensors"

    def _keep(self, name: str, result: Any) -> None:
        write_tensors(self._tensors(name), *archive.pack(result))

    def _kept(self, name: str, kind: type) -> Any:
        path = self._tensors(name)
        value = _unpacked(path, kind) if self._is_here(path) else None
        if value is not None and kind is not Snapshot and (holds := name_of(value)) != name:
            raise ValueError(
                f"{str(path)!r} is damaged: it holds {holds}; put the right file back, or run again with --fresh"
            )
        return value


LARGE_STATE, STATE_SECONDS = 50 * 2**20, 20.0
"""Bytes from which on the state of a training is not written at every pause, and seconds between two times."""
KINDS = {kind.__name__.lower(): kind for kind in (Sized, Cuts, Damage, Own, Grafted, Again, Blocked)}
"""What a file of results holds, by the first word of its name; the others hold an arm."""


def name_of(event: Any) -> str:
    """The name of a result's file: its kind, what tells it from others of its kind, and its seed."""
    if isinstance(event, Trajectory):
        return f"{event.arm}-{event.seed}"
    held = f"-{event.held}" if isinstance(event, Blocked) else f"-{event.arm}" if isinstance(event, Own) else ""
    return f"{type(event).__name__.lower()}{held}-{event.seed}"


def disk_estimate(ready: Prepared) -> int:
    """Bytes of disk that a run takes at most at one time."""
    weights = sum(value.nbytes for value in ready.model.weights().values())
    return needs.disk_bytes(
        ready.experiment, weights=weights, neurons=ready.site.n_neurons, classes=len(ready.probe.corpus.label_names)
    )


def _unpacked(path: Path, kind: type = Snapshot) -> Any:
    tensors, meta = read_tensors(path)
    try:
        return archive.unpack(tensors, meta, kind)
    except ValueError as error:
        why = f"{str(path)!r} is damaged or of another version: {error}; run again with --fresh"
        raise ValueError(why) from error


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if inner := _differences(a, b, f"{prefix}{key}."):
                lines.append(inner)
        elif a != b:
            lines.append(f"{prefix}{key} {a!r} there, {b!r} here")
    return "; ".join(lines)
