"""What is computed once and shared: a stage's recipe names its folder, which is complete or absent.

    KIND-DIGEST/recipe.json           what the stage depends on
    KIND-DIGEST/stage.json            its numbers
    KIND-DIGEST/tensors.safetensors   its tensors, where it has any

A folder is written under another name, synced, and renamed once. Whoever computes a stage holds its lock, so that of
several processes that need it one computes it and the others read it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from relearn_lens.files import as_json, digest_of, plain, read_json, read_tensors, whole, write_tensors, write_whole

RECIPE, NUMBERS, TENSORS = "recipe.json", "stage.json", "tensors.safetensors"
PACKAGES = ("relearn-lens", "torch", "transformer-lens", "transformers")
"""Whose versions every stage depends on."""
version = cache(metadata.version)  # to look for one takes a millisecond, and a bench has hundreds of recipes


@dataclass(frozen=True)
class StageRecipe:
    """All that a stage depends on: fields as JSON takes them, and the versions of what computes it."""

    kind: str
    """What it is, such as `"base"`: the beginning of its folder's name."""
    fields: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """Of kind, fields and versions, whatever the order of the fields."""
        return digest_of(self.to_dict())[:32]

    def to_dict(self) -> dict[str, Any]:
        """As `recipe.json` holds it."""
        versions = {name: version(name) for name in PACKAGES}
        return {"kind": self.kind, "fields": plain(self.fields), "versions": versions}


@dataclass(frozen=True)
class Stage:
    """What was computed by a recipe."""

    numbers: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Stages:
    """A folder of stages."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def folder(self, recipe: StageRecipe) -> Path:
        """Where a stage is, or would be."""
        return self.path / f"{recipe.kind}-{recipe.digest}"

    def read(self, recipe: StageRecipe) -> Stage | None:
        """A stage that is here; None where it is not.

        Raises:
            ValueError: a file of it is damaged; the message says which folder to remove.
        """
        return self.named(self.folder(recipe).name)

    def named(self, name: str) -> Stage | None:
        """The same, by the name of its folder."""
        folder = self.path / name
        if not folder.is_dir():
            return None
        try:
            numbers = read_json(folder / NUMBERS)
            tensors = read_tensors(folder / TENSORS)[0] if (folder / TENSORS).exists() else {}
        except (ValueError, OSError) as error:
            raise ValueError(
                f"the stage in {str(folder)!r} is damaged; remove that folder, and it is made again"
            ) from error
        return Stage(numbers, tensors)

    def keep(
        self, recipe: StageRecipe, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a stage, unless it is here already.

        Raises:
            OSError: as `files.write_whole`.
        """
        folder = self.folder(recipe)
        if folder.is_dir():
            return
        with whole(folder) as work:
            write_whole(work / RECIPE, as_json(recipe.to_dict()))
            if tensors:
                write_tensors(work / TENSORS, tensors, {})
            write_whole(work / NUMBERS, as_json(numbers))

    @contextlib.contextmanager
    def locked(self, recipe: StageRecipe) -> Iterator[None]:
        """For a while, no other process computes this stage; waits for one that does."""
        locks = self.path / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{recipe.kind}-{recipe.digest}"):
            yield

    def made(
        self, recipe: StageRecipe, make: Callable[[], tuple[Mapping[str, Any], Mapping[str, Tensor] | None]]
    ) -> Stage:
        """A stage that is here, or else what `make` gives (numbers, tensors), which is kept.

        Raises:
            ValueError, OSError: as `read` and `keep`, and whatever `make` raises.
        """
        stage = self.read(recipe)
        if stage is None:
            with self.locked(recipe):
                stage = self.read(recipe)  # another process may have had the lock
                if stage is None:
                    self.keep(recipe, *make())
                    stage = self.read(recipe)
        assert stage is not None
        return stage
