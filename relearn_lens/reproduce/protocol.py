"""One paper over its seeds: readings kept as they come, intervals over seeds, a verdict for every claim.

A paper is a module of this package that measures its claims of one seed at a time, with a `Lab` that has the facts and
the models; each seed is one file of the folder, whole or absent, so that the same command goes on where it stopped.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats as st
from torch import Tensor, set_num_threads

from relearn_lens import progress
from relearn_lens.analysis.intervals import Estimate, over_seeds, over_seeds_and_neurons, over_sentences
from relearn_lens.files import as_json, read_json, sha256_of, write_whole
from relearn_lens.find.localisers import localiser_of
from relearn_lens.find.localising import Localiser
from relearn_lens.find.saliency import Saliency
from relearn_lens.measure.answers import AnswerAccuracy, Answered, answer, choose
from relearn_lens.measure.evaluation import OVERALL, Scores
from relearn_lens.models import taught
from relearn_lens.models.model import LanguageModel
from relearn_lens.names import meant
from relearn_lens.neurons.sites import Neurons
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.relearn.attack import Attack
from relearn_lens.remove.ablation import prune_
from relearn_lens.remove.calibration import calibrate, mixed_
from relearn_lens.remove.pruning import Pruner
from relearn_lens.remove.recipes import RECIPES, Recipe
from relearn_lens.reproduce.claims import CLAIMS, Claim, Verdict, verdict_of
from relearn_lens.runs import removals
from relearn_lens.runs.stages import StageRecipe, Stages
from relearn_lens.text.facts import TRAINED, Facts

Scale = Literal["toy", "real"]
TAU = 0.95
"""Share of its accuracy near by that a calibrated model keeps."""
SEEDS = (0, 1, 2)
"""What is chosen is chosen on the first; all are reported."""
MODEL = "smollm2"
"""What `real` takes unless another model is named."""
Where = str | Localiser | None
USUAL = "usual"
"""Where a remover's recipe says that it works."""


@dataclass(frozen=True)
class Reading:
    """What one seed says of one claim."""

    key: str
    """Of the claim."""
    effect: Estimate | float
    """In the claim's unit, positive in its direction; with an interval where there is one within the seed."""
    control: float | None = None
    """The same of the control, which the effect is already beyond; shown beside it."""
    note: str = ""


@dataclass(frozen=True, eq=False)
class State:
    """Weights of the one model of a lab, and what they are."""

    weights: Mapping[str, Tensor]
    digest: str
    """Of all that they depend on."""
    share: float = 1.0
    """Of the way from the base that calibration left, 0 to 1."""


@dataclass(frozen=True)
class Lab:
    """What a paper measures one seed with: facts, a model that was taught them, its twin, and what is made of them."""

    scale: Scale
    seed: int
    folder: Path
    """Removed models are kept there, for all papers."""
    name: str = removals.TAUGHT
    """Of the model: the toy, or a pretrained one."""

    @cached_property
    def _subject(self) -> removals.Subject:
        return removals.subject(self.name, "people" if self.name == removals.TAUGHT else "countries", seed=self.seed)

    @property
    def facts(self) -> Facts:
        """Invented people, or those facts about countries that a pretrained model knows; in roles."""
        return self._subject.facts

    @cached_property
    def base(self) -> State:
        """The model that knows everything."""
        return State(self._subject.model.copied(), "base")

    @cached_property
    def never(self) -> State:
        """Its twin, which never saw what is to be forgotten.

        Raises:
            ValueError: a pretrained model has none.
        """
        if self._subject.never is None:
            raise ValueError(f"{self.name} has no twin that never knew; only the taught toy has one")
        return State(self._subject.never.copied(), "never")

    @contextlib.contextmanager
    def loaded(self, state: State) -> Iterator[LanguageModel]:
        """The lab's model with some weights, for a while."""
        model = self._subject.model
        model.load_weights(state.weights)
        try:
            yield model
        finally:
            model.load_weights(self.base.weights)

    def model_of(self, state: State) -> LanguageModel:
        """A toy of its own with some weights, to compare with."""
        model = taught.untaught(self.facts, recipe=taught.Recipe(seed=self.seed))
        model.load_weights(state.weights)
        return model

    def removed(
        self,
        remover: str,
        *,
        where: Where = USUAL,
        calibrated: bool = True,
        **fields: Any,
    ) -> State:
        """The base after a remover's recipe for this model with some fields changed, by default calibrated: as far from
        the base as `TAU` of its accuracy near by allows. Computed once for all papers.

        `where` is a localiser: a training moves only the weights that it gives, pruning takes its neurons; None takes
        the recipe's own away, so that the remover's fields say where.

        Raises:
            ValueError: as the recipe, the localiser and the remover say.
        """
        removal = removals.recipe_for(self.name, remover, fields)
        if where is None:
            removal = replace(removal, where=None)
        localiser = None if where is None or where == USUAL else localiser_of(where)
        with self.loaded(self.base) as model:
            kept = {
                "facts": self.facts.sha256(), "seed": self.seed, "base": removals.weights_sha256(model),
                "how": removals.fields_of(removal),
                "where": None if localiser is None else [localiser.name, localiser.model_dump()],
            }  # fmt: skip
            how = StageRecipe("removed", kept)
            stage = self._stages.made(how, lambda: ({}, self._remove(model, removal, localiser)))
            name, share = self._stages.folder(how).name, 1.0
            if calibrated:
                how = StageRecipe("calibrated", {"from": name, "tau": TAU})
                share = self._stages.made(how, lambda: ({"share": self._share(model, stage.tensors)}, None)).numbers[
                    "share"
                ]
            model.load_weights(stage.tensors)
            mixed_(model, self.base.weights, share)
            return State(model.copied(), f"{name}-{share}", share)

    def cut(self, neurons: Neurons | WeightMask) -> State:
        """The base with some neurons pruned."""
        with self.loaded(self.base) as model:
            prune_(model, neurons)
            return State(model.copied(), f"cut {len(neurons)}")

    def calibrated(self, state: State) -> State:
        """As far from the base towards some weights as `TAU` of its accuracy near by allows."""
        with self.loaded(state) as model:
            return self.towards(state, self._share(model, state.weights))

    @cached_property
    def _stages(self) -> Stages:
        return Stages(self.folder / "stages")

    def _remove(self, model: LanguageModel, removal: Recipe, localiser: Localiser | None) -> Mapping[str, Tensor]:
        if localiser is None:
            place = removals.located(model, self.facts, removal, seed=self.seed)
        else:
            place = localiser(model, self.facts, seed=self.seed)
            if isinstance(place, Saliency):
                place = place.top(fraction=removal.fraction or 0.05)
                place = place if isinstance(removal.remover, Pruner) else WeightMask.of(model, place)
        for _ in removal(model, self.facts, place, seed=self.seed):
            pass
        return model.copied()

    def _share(self, model: LanguageModel, weights: Mapping[str, Tensor]) -> float:
        near = self.facts.passages("retain_near", forms=TRAINED)
        model.load_weights(weights)
        return calibrate(
            model, self.base.weights, lambda m: answer(m, near).accuracy.value(OVERALL), tau=TAU, points=64
        ).share

    def asked(
        self, state: State, *roles: str, forms: Iterable[str] = TRAINED, attack: Attack | None = None
    ) -> Answered:
        """What some weights answer of some roles' passages; with an attack in the prompt, as it asks them."""
        with self.loaded(state) as model:
            return self._asked(model, roles, forms, attack)

    def course(self, state: State, attack: Attack, *roles: str) -> dict[int, Answered]:
        """What is answered of some roles (by default V) before an attack, at step 0, and at each of its checkpoints."""
        roles = roles or ("forget_held_out",)
        with self.loaded(state) as model:
            courses = {0: self._asked(model, roles, TRAINED, None)}
            for pause in attack(model, self.facts, seed=self.seed):
                courses[pause.step or 1] = self._asked(model, roles, TRAINED, attack)
            return courses

    def chosen(self, state: State, *roles: str, form: str) -> AnswerAccuracy:
        """How often some weights prefer the right one of the choices."""
        with self.loaded(state) as model:
            return choose(model, self.facts.passages(*roles, forms=(form,)))

    def towards(self, state: State, share: float) -> State:
        """Only a share of the way from the base to some weights."""
        with self.loaded(state) as model:
            mixed_(model, self.base.weights, share)
            return State(model.copied(), f"{state.digest}*{share}", state.share * share)

    @property
    def n_weights(self) -> int:
        """Parameters of the model."""
        return sum(value.numel() for value in self._subject.model.parameters())

    def _asked(
        self, model: LanguageModel, roles: Sequence[str], forms: Iterable[str], attack: Attack | None
    ) -> Answered:
        passages = self.facts.passages(*roles, forms=forms)
        if attack is not None:
            passages = attack.asked(passages, self.facts, seed=self.seed)
        return answer(model, passages, closed=self.facts.answers())


def over_keys(of: Callable[..., Any], *scores: Scores) -> Estimate:
    """A function of what several models answer, with its interval over keys; the same keys are drawn for all."""
    return over_sentences(of, OVERALL, *scores)


def averaged(each: Sequence[Estimate]) -> Estimate:
    """The mean of several numbers over the same keys, without those that were refused; its interval is as wide as that
    of the least certain of them."""
    known = [one for one in each if one.interval]
    if not known:
        return Estimate(math.nan, math.nan, math.nan, "all refused")
    value = sum(one.value for one in known) / len(known)
    half = max(max(one.high - one.value, one.value - one.low) for one in known)
    return Estimate(value, value - half, value + half, known[0].over, n=known[0].n)


def rank_correlation(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> float:
    """Spearman's."""
    return float(st.spearmanr(ours, theirs)[0])  # pyright: ignore[reportArgumentType]


def kendall(ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray) -> float:
    """Kendall's tau."""
    return float(st.kendalltau(ours, theirs)[0])  # pyright: ignore[reportArgumentType]


def distance(ours: State, theirs: State, since: State) -> float:
    """How far apart two models are that came from one, relative to the way of the second; L2 over all weights."""
    way = sum(float((theirs.weights[name] - value).float().square().sum()) for name, value in since.weights.items())
    apart = sum(float((ours.weights[name] - value).float().square().sum()) for name, value in theirs.weights.items())
    return math.sqrt(apart / way) if way > 0 else math.nan


def cosine(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Between two changes of the same weights."""
    pairs = [(a.double().flatten(), b.double().flatten()) for a, b in zip(ours, theirs, strict=True)]
    dot, one, other = (sum(float(x @ y) for x, y in each) for each in (
        pairs, [(a, a) for a, _ in pairs], [(b, b) for _, b in pairs]
    ))  # fmt: skip
    return dot / math.sqrt(one * other) if one * other > 0 else math.nan


def recovered(base: Scores, removed: Scores, attacked: Scores, never: Scores, never_attacked: Scores) -> Estimate:
    """The share of what was removed that is back, less what the same attack teaches the twin, over keys.

    NaN, without an interval, where what was removed is within noise: there is nothing to take a share of.
    """
    gap = over_keys(lambda b, r: b - r, base, removed)
    if not (gap.interval and gap.low > 0):
        return Estimate(math.nan, math.nan, math.nan, f"refused: {gap} was removed")
    return over_keys(
        lambda b, r, a, n, t: ((a - r) - (t - n)) / np.where(b - r > 0, b - r, np.nan),
        base, removed, attacked, never, never_attacked,
    )  # fmt: skip


@dataclass(frozen=True)
class Paper:
    """One file of this package."""

    name: str
    title: str
    source: str
    """Authors, year, arXiv number."""
    protocol: str
    """What is done here."""
    smaller: str
    """What is smaller than in the paper, and what that cannot say."""
    measure: Callable[[Lab], Iterator[Reading]]
    toy_only: str = ""
    """Why there is no form for a pretrained model; empty where there is one."""

    @property
    def scales(self) -> tuple[Scale, ...]:
        """Where it can be measured."""
        return ("toy",) if self.toy_only else ("toy", "real")


@dataclass(frozen=True)
class Row:
    """One claim over all seeds."""

    claim: Claim
    effect: Estimate | None
    """None where no seed could measure it; `notes` say why."""
    control: float | None
    verdict: Verdict
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reproduction:
    """A paper's claims, measured."""

    paper: Paper
    scale: Scale
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    seconds: float
    """Summed over seeds; what was read from the folder counts as it took then."""
    cpu_seconds: float
    """The same of what the processor was busy; NaN where a seed's file does not say it."""
    folder: Path = field(compare=False)
    model: str = removals.TAUGHT

    @property
    def took(self) -> str:
        """How long, in words."""
        busy = "" if math.isnan(self.cpu_seconds) else f" ({self.cpu_seconds:.0f} s of one core)"
        return f"{self.seconds:.0f} s{busy}"

    @property
    def command(self) -> str:
        """That makes it."""
        return f"relearn-lens reproduce {self.paper.name}" + (" --scale real" if self.scale == "real" else "")

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "paper": self.paper.name, "source": self.paper.source, "scale": self.scale, "seeds": self.seeds,
            "model": self.model, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds,
            "rows": [asdict(row) for row in self.rows],
        }  # fmt: skip


PAPERS: tuple[str, ...] = (
    "lo2024", "chhabra2025", "fan2025", "che2025", "guo2024", "hu2024", "wang2024", "lynch2024", "deeb2024", "uds2026",
    "bayazit2023", "wang2024dinm", "wang2024concept", "cloud2024",
    "tian2024",
)  # fmt: skip
"""Names, each a module of this package with a `PAPER`."""


def paper_of(name: str) -> Paper:
    """A paper by its name.

    Raises:
        ValueError: no paper has this name.
    """
    if name not in PAPERS:
        raise ValueError(f"no reproduction is called {name!r}; known: {', '.join(PAPERS)}, all{meant(name, PAPERS)}")
    return importlib.import_module(f"{__package__}.{name}").PAPER


def reproduce(
    name: str,
    *,
    scale: Scale = "toy",
    model: str = MODEL,
    seeds: Sequence[int] = SEEDS,
    out: str | Path = "runs/reproduce",
) -> Reproduction:
    """Measure a paper's claims over some seeds, and say of each whether it holds here.

    `model` is the pretrained one of scale `real`: a source, a folder or a name on the hub.

    Raises:
        ValueError: no such paper, a scale that it does not have, or no seed.
    """
    paper, labs = _checked(name, scale, model, seeds, Path(out))
    each: dict[int, _Kept] = {}
    with progress.task(f"reproducing {name}", len(seeds)):
        for lab in labs:
            each[lab.seed] = _of_seed(paper, lab)
            progress.advance()
    result = _result(paper, scale, labs[0].name, each, Path(out))
    write_whole(Path(out) / name / f"{scale}.json", as_json(result.to_dict()))
    return result


def spread(
    names: Sequence[str],
    *,
    processes: int,
    scale: Scale = "toy",
    model: str = MODEL,
    seeds: Sequence[int] = SEEDS,
    out: str | Path = "runs/reproduce",
) -> Iterator[str]:
    """Measure seeds of papers that the folder does not have yet, in several processes; says of each when it is done.

    Afterwards `reproduce` reads them.

    Raises:
        ValueError: as `reproduce`, or no process.
    """
    if processes < 1:
        raise ValueError(f"processes = {processes}: it takes at least one")
    todo: list[tuple[str, Lab]] = []
    for name in names:
        paper, labs = _checked(name, scale, model, seeds, Path(out))
        todo += [(name, lab) for lab in labs if _kept(paper, lab) is None]
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(processes, get_context("spawn"), set_num_threads, (threads,)) as pool:
        ends = {pool.submit(_by_name, name, lab): f"{name}, seed {lab.seed}" for name, lab in todo}
        try:
            for end in as_completed(ends):
                yield f"{ends[end]}: {end.result():.0f} s"
        finally:
            pool.shutdown(cancel_futures=True)


def gathered(folder: str | Path, *, scale: Scale = "toy") -> tuple[list[Reproduction], list[str]]:
    """What a folder has of every paper, over the seeds that are there, and a line for each that it does not have.

    A seed that another version of a page wrote does not count.
    """
    results, missing = [], []
    for name in PAPERS:
        paper, model = paper_of(name), removals.TAUGHT
        each: dict[int, _Kept] = {}
        for path in sorted((Path(folder) / name).glob(f"{scale}-*.json")):
            lab = Lab(scale, int(path.stem.rpartition("-")[2]), Path(folder), read_json(path).get("model", model))
            if (kept := _kept(paper, lab)) is None:
                missing.append(f"{name}, seed {lab.seed}: of another version of the page")
            else:
                each[lab.seed], model = kept, lab.name
        if each:
            results.append(_result(paper, scale, model, each, Path(folder)))
        else:
            missing.append(f"{name}: no seed")
    return results, missing


@dataclass(frozen=True)
class _Kept:
    """One seed's file."""

    readings: list[Reading]
    seconds: float
    cpu_seconds: float


def _checked(name: str, scale: Scale, model: str, seeds: Sequence[int], folder: Path) -> tuple[Paper, list[Lab]]:
    paper = paper_of(name)
    if scale not in paper.scales:
        raise ValueError(f"{name} has no scale {scale!r}: {paper.toy_only}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds = {list(seeds)}: give at least one, and each once")
    return paper, [Lab(scale, seed, folder, model if scale == "real" else removals.TAUGHT) for seed in seeds]


def _result(paper: Paper, scale: Scale, model: str, each: Mapping[int, _Kept], folder: Path) -> Reproduction:
    readings = [kept.readings for kept in each.values()]
    rows = tuple(_row(claim, readings) for claim in CLAIMS[paper.name].values())
    seconds, cpu = (sum(getattr(kept, name) for kept in each.values()) for name in ("seconds", "cpu_seconds"))
    return Reproduction(paper, scale, tuple(each), rows, seconds, cpu, folder, model)


def _by_name(name: str, lab: Lab) -> float:
    """In a process of its own."""
    return _of_seed(paper_of(name), lab).seconds


def _of_seed(paper: Paper, lab: Lab) -> _Kept:
    """A seed's readings, measured or from the folder."""
    if (kept := _kept(paper, lab)) is not None:
        return kept
    begin, busy = time.perf_counter(), time.process_time()
    readings = list(paper.measure(lab))
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - busy
    if unknown := {each.key for each in readings} - set(CLAIMS[paper.name]):
        raise ValueError(f"{paper.name} measures {sorted(unknown)}, which claims.py does not have")
    kept = {
        "digest": _digest(paper, lab), "model": lab.name, "seconds": seconds, "cpu_seconds": cpu_seconds,
        "readings": [asdict(each) for each in readings],
    }  # fmt: skip
    write_whole(_path(paper, lab), as_json(kept))
    return _Kept(readings, seconds, cpu_seconds)


def _kept(paper: Paper, lab: Lab) -> _Kept | None:
    """From the folder; a file that another version of the page wrote, or with other recipes, does not count."""
    path = _path(paper, lab)
    if not path.exists() or (kept := read_json(path)).get("digest") != _digest(paper, lab):
        return None
    busy = float(kept.get("cpu_seconds", math.nan))
    return _Kept([_reading(each) for each in kept["readings"]], float(kept["seconds"]), busy)


def _path(paper: Paper, lab: Lab) -> Path:
    return lab.folder / paper.name / f"{lab.scale}-{lab.seed}.json"


def _digest(paper: Paper, lab: Lab) -> str:
    """Of what the page does (its words and its `PAPER` aside), the model, and the recipes that the page names."""
    page = Path(str(importlib.import_module(f"{__package__}.{paper.name}").__file__)).read_text(encoding="utf-8")
    body = [
        line.strip()
        for each in ast.parse(page).body
        if not (
            isinstance(each, ast.Expr)
            or (isinstance(each, ast.Assign) and [ast.unparse(target) for target in each.targets] == ["PAPER"])
        )
        # its lines, since a tree is dumped otherwise by every version of Python
        for line in (ast.get_source_segment(page, each) or "").splitlines()
        if not line.lstrip().startswith("#")
    ]
    recipes = RECIPES.get(removals.KINDS.get(lab.name, ""), {})
    named = {name: dict(fields) for name, fields in sorted(recipes.items()) if f'"{name}"' in page}
    return sha256_of(f"{body}{lab.name}{named}")[:16]


def _reading(kept: dict[str, Any]) -> Reading:
    effect = kept["effect"]
    if isinstance(effect, dict):  # JSON has no NaN
        ends = {end: math.nan if effect[end] is None else effect[end] for end in ("value", "low", "high")}
        effect = Estimate(**{**effect, **ends})
    return Reading(**{**kept, "effect": math.nan if effect is None else effect})


def _row(claim: Claim, readings: Sequence[Sequence[Reading]]) -> Row:
    """One claim over the seeds that measured it: the wider of the intervals over seeds and within them."""
    each = [reading for of_seed in readings for reading in of_seed if reading.key == claim.key]
    notes = tuple(dict.fromkeys(reading.note for reading in each if reading.note))
    values = [r.effect.value if isinstance(r.effect, Estimate) else float(r.effect) for r in each]
    finite = [i for i, value in enumerate(values) if math.isfinite(value)]
    if not finite:
        return Row(claim, None, None, "inconclusive", notes or ("not measured",))
    within = [each[i].effect for i in finite]
    if all(isinstance(effect, Estimate) and effect.interval for effect in within):
        effect = over_seeds_and_neurons(within)  # pyright: ignore[reportArgumentType]
    else:
        effect = over_seeds([values[i] for i in finite])
    if effect.interval and effect.low == effect.high:
        notes += ("every seed gives this number, so its interval has no width",)
    if len(finite) < len(readings):
        notes += (f"measured in {len(finite)} of {len(readings)} seeds",)
    known = [c for i in finite if (c := each[i].control) is not None and math.isfinite(c)]
    control = sum(known) / len(known) if len(known) == len(finite) else None
    return Row(claim, effect, control, verdict_of(claim, effect), notes)
