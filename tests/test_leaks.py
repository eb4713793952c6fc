"""Nothing is left behind: by a context whose body raises, by a training that fails, by many measurements in a row."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as hf_logging

from relearn_lens import progress
from relearn_lens.find.attribution import _Run
from relearn_lens.measure import similarity
from relearn_lens.measure.prefixes import recorded, resumed
from relearn_lens.measure.tracking import measure
from relearn_lens.methods import Attributing
from relearn_lens.models import gguf
from relearn_lens.models.lora import adapted
from relearn_lens.models.model import Model, checkpointed, computing, hidden, lent, only_training, reading, seeded
from relearn_lens.models.toy import Toy
from relearn_lens.models.training import finetune_
from relearn_lens.neurons.sites import Neurons, kept, site_of, streaming
from relearn_lens.remove.ablation import ablated, held
from relearn_lens.remove.distillation import aside
from relearn_lens.remove.wrappers import moved
from relearn_lens.runs import cuts
from relearn_lens.text.concept import Concept
from tests.benchmarks.leaks import handles, hooks
from tests.fixtures import unchecked


class Stop(Exception):
    """What a body raises."""


PLACE = Concept("place", ["place"])


def forward(model: Model) -> None:
    """A pass within the context, so that its hooks fire before the body raises."""
    ids = torch.ones(1, 3, dtype=torch.int64, device=model.device)
    hidden(model.bridge, ids, torch.ones_like(ids))


def chosen(model: Model) -> Any:
    site = site_of(model.bridge, "mlp_post")
    return Neurons(torch.arange(site.width).expand(len(site.layers), -1) < 5, site)


def attributing(toy: Toy) -> AbstractContextManager[Any]:
    how = Attributing(target="margin", baseline="pad", steps=2, sentences=2)
    return _Run(toy.tagger, toy.corpus, PLACE, how, "mlp_post", "conductance", 0).hooked()


CONTEXTS: dict[str, Callable[[Toy], AbstractContextManager[Any]]] = {
    "ablated": lambda toy: ablated(toy.tagger, chosen(toy.tagger)),
    "ablated bridge": lambda toy: ablated(toy.tagger.bridge, chosen(toy.tagger), value=1.5),
    "held": lambda toy: held(toy.tagger, chosen(toy.tagger)),
    "streaming": lambda toy: streaming(toy.tagger.bridge, site_of(toy.tagger.bridge, "mlp_post"), lambda *_: None),
    "reading": lambda toy: reading(toy.tagger),
    "reading bridge": lambda toy: reading(toy.tagger.bridge),
    "seeded": lambda toy: seeded(5),
    "computing": lambda toy: computing(toy.tagger, torch.bfloat16),
    "adapted": lambda toy: adapted(toy.tagger, rank=2),
    "attributing": attributing,
    "wearing": lambda toy: similarity._wardrobe(
        {name: torch.zeros_like(value) for name, value in toy.tagger.weights().items()}, toy.tagger
    ),
    "recorded": lambda toy: recorded(toy.tagger, max_bytes=10**6),
    "resumed": lambda toy: resumed(toy.tagger, None, 1),
    "kept": lambda toy: kept(toy.tagger.bridge, site_of(toy.tagger.bridge, "mlp_post"), layers=(0,)),
    "moved": lambda toy: moved([(weight, torch.ones_like(weight)) for weight in toy.tagger.parameters()], 0.5),
    "lent": lambda toy: lent(toy.tagger),
    "only_training": lambda toy: only_training((), toy.tagger.parameters()),
    "aside": lambda toy: aside(toy.tagger, lambda: finetune_(toy.tagger, toy.corpus, epochs=0.1, prior_bias=False)),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_context_leaves_nothing_when_its_body_raises(toy, untouched, name):
    with untouched(toy.tagger), pytest.raises(Stop), CONTEXTS[name](toy):  # noqa: PT012
        if name != "attributing":  # its hooks know their own passes alone
            forward(toy.tagger)
        torch.rand(1) if name == "seeded" else None
        raise Stop
    with torch.no_grad():
        forward(toy.tagger)  # and the model still works


def test_checkpointed_leaves_nothing_when_its_body_raises(bert, untouched):
    def checkpointing() -> list[str]:
        return [n for n, m in bert.bridge.original_model.named_modules() if getattr(m, "gradient_checkpointing", False)]

    with untouched(bert), pytest.raises(Stop), checkpointed(bert):  # noqa: PT012
        assert checkpointing()
        raise Stop
    assert not checkpointing()


def test_computing_is_over_when_its_body_raises(toy):
    ids = torch.ones(1, 3, dtype=torch.int64)
    before = toy.tagger(ids, ids)
    with pytest.raises(Stop), computing(toy.tagger, torch.bfloat16):
        raise Stop
    assert torch.equal(toy.tagger(ids, ids), before)


def test_pruning_for_a_while_is_undone_when_its_body_raises(toy, untouched):
    settings = type("Settings", (), {"prune": type("Prune", (), {"sever": "both"})})
    ready = type("Ready", (), {"experiment": settings, "model": toy.tagger})
    base = type("Base", (), {"weights": {name: value.clone() for name, value in toy.tagger.weights().items()}})
    without = unchecked(cuts._without)
    with untouched(toy.tagger), pytest.raises(Stop), without(ready, base, chosen(toy.tagger), None):
        raise Stop


@pytest.mark.parametrize("quiet", [gguf.quiet, gguf.silent])
def test_silence_is_over_when_its_body_raises(quiet):
    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    with pytest.raises(Stop), quiet():
        raise Stop
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before


def test_failed_training_leaves_neither_its_mode_nor_gradients(toy, untouched):
    def stop(_: str, step: int, __: int) -> None:
        if step:
            raise Stop

    toy.tagger.eval()
    with untouched(toy.tagger, weights=False), progress.reported(stop), pytest.raises(Stop):
        list(finetune_(toy.tagger, toy.corpus, epochs=1))


def test_training_that_fails_within_a_step_leaves_no_gradients(toy, untouched, monkeypatch):
    def fail(batch: Any) -> Any:
        raise Stop

    monkeypatch.setattr(toy.tagger, "losses", fail)
    with untouched(toy.tagger), pytest.raises(Stop):
        list(finetune_(toy.tagger, toy.corpus, epochs=1, prior_bias=False))


def test_entries_that_may_not_move_are_as_they_were_when_a_step_fails(toy, monkeypatch):
    def fail(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.detach().add_(1.0)
        raise Stop

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    weight = toy.tagger.head.weight
    before, mask = weight.detach().clone(), torch.arange(weight.numel()).view_as(weight) % 2 == 0
    with pytest.raises(Stop):
        list(finetune_(toy.tagger, toy.corpus, epochs=1, only={"head.weight": mask}))
    assert torch.equal(weight.detach()[~mask], before[~mask])
    assert torch.equal(weight.detach()[mask], before[mask] + 1)


def test_abandoned_training_leaves_the_mode_as_it_was(toy, untouched):
    with untouched(toy.tagger, weights=False):
        next(finetune_(toy.tagger, toy.corpus, epochs=2, every=1))


@pytest.mark.parametrize("what", [[], ["conductance"], ["top_words"]])
def test_measurement_that_is_stopped_leaves_nothing(toy, untouched, what):
    calls = 0

    def stop(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stop

    settings: Any = {"sentences": 4, "steps": 2}
    with untouched(toy.tagger), progress.reported(stop), progress.task("measuring", 10**6), pytest.raises(Stop):
        measure(toy.tagger, toy.corpus, PLACE, site="mlp_post", what=what, max_tokens=64, **settings)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts files by /proc")
def test_measuring_again_and_again_leaves_no_hook_and_no_open_file(toy):
    def once() -> None:
        measure(toy.tagger, toy.corpus, PLACE, site="mlp_post", what=["auroc"])

    once()
    before = hooks(toy.tagger), handles()
    for _ in range(9):
        once()
    assert hooks(toy.tagger) == before[0]
    assert handles() <= before[1]


def test_every_context_of_the_package_is_tried_here():
    """A new context manager needs a test above."""
    import ast

    import relearn_lens

    found = {
        node.name
        for path in Path(relearn_lens.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and any("contextmanager" in ast.unparse(d) for d in node.decorator_list)
    }
    tried = {"ablated", "held", "streaming", "reading", "seeded", "computing", "checkpointed", "hooked", "_wardrobe"}
    tried |= {"_without", "quiet", "silent", "_learning", "_others_still", "adapted", "on"}
    tried |= {"recorded", "resumed", "kept", "moved", "lent", "only_training", "aside"}
    # What touches no model; _fused_attention is in test_models, where there is a model that has it.
    elsewhere = {
        "following",
        "interruptible",
        "alone",
        "beside",
        "shared_out",
        "_claimed",
        "_timed",
        "_nothing_left",
        "_room",
        "whole",
        "changed",
        "_in_our_words",
        "_sharing",
        "locked",
        "stoppable",
        "_cluster",
        "_fused_attention",
        "joined",
        "reported",
        "task",
        # Each beside its own tests.
        "_instead",
        "_block",
        "_from",
        "loaded",
        "quick_dropout",
    }
    assert found - elsewhere == tried
