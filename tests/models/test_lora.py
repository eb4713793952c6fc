"""Low-rank adapters: what trains, what the block leaves, and the rank of what moved."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from relearn_lens.measure.similarity import activation_similarity
from relearn_lens.measure.tracking import measure
from relearn_lens.models.export import export
from relearn_lens.models.loading import load_tagger
from relearn_lens.models.lora import adapted, adapter_weights, load_adapter_weights
from relearn_lens.models.model import LanguageModel, Model, Tagger, computing
from relearn_lens.models.toy import language_model
from relearn_lens.models.toy import load as load_toy
from relearn_lens.neurons.sites import Neurons, site_of
from relearn_lens.relearn.finetuning import retrain_
from relearn_lens.remove.ablation import held, prune_
from relearn_lens.runs.events import ArmDone, Base, Measured, Paused
from relearn_lens.runs.experiment import perform
from relearn_lens.runs.presets import settings_of
from relearn_lens.text.concept import Concept
from tests.families import KINDS, lent_tagger
from tests.fixtures import unchecked
from tests.neurons.test_sites import IDS, MASK

RANK = 3
ATTENTION = ("attn", "attention", "self_attn")


@pytest.fixture(params=KINDS)
def family(request) -> Tagger:
    """One small model of each family."""
    return lent_tagger(request.param)


@pytest.fixture(params=["bert", "gpt2", "llama"])
def tagger(request) -> Tagger:
    return request.getfixturevalue("bert") if request.param == "bert" else lent_tagger(request.param)


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, MASK)


def copies(model: Model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.weights().items()}


def scatter(model: Model) -> None:
    """Let every adapter say something, and the head something else."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.1)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}


def test_merged_model_computes_what_the_adapted_one_did(family):
    before, start = copies(family), logits(family)
    with adapted(family, rank=RANK):
        torch.testing.assert_close(logits(family), start, rtol=0, atol=0)
        scatter(family)
        inside, within = logits(family), copies(family)
    assert not torch.allclose(inside, start, atol=1e-2)
    scale = max(1.0, float(inside.abs().max()))
    torch.testing.assert_close(logits(family), inside, rtol=0, atol=1e-5 * scale)
    after = family.weights()
    assert {n: v.shape for n, v in within.items()} == {n: v.shape for n, v in after.items()}
    assert {n: v.shape for n, v in before.items()} == {n: v.shape for n, v in after.items()}
    assert moved(within, after) == {}


def test_every_adapter_and_the_head_get_a_gradient_and_nothing_else_does(family):
    with adapted(family, rank=RANK):
        scatter(family)
        family(IDS, MASK).square().mean().backward()
        trained = {name for name, weight in family.named_parameters() if weight.requires_grad}
        reached = {name for name, weight in family.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert reached == trained
    adapters = {name for name in trained if "lora_" in name}
    assert trained - adapters == {"head.weight", "head.bias"}
    layers = len(family.bridge.blocks)
    assert len(adapters) >= 2 * 4 * layers  # queries, keys and values may be one matrix


def test_what_moves_in_training_is_of_low_rank(tagger, corpus):
    before = copies(tagger)
    with adapted(tagger, rank=RANK):
        for _ in retrain_(tagger, corpus, epochs=2, every=1, lr=1e-2):
            pass
    changed = moved(before, copies(tagger))
    assert {"head.weight", "head.bias"} < set(changed)
    for name, difference in changed.items():
        if not name.startswith("head."):
            assert difference.ndim == 2, f"{name} should stand still"
            parts = 3 if "c_attn" in name else 1  # queries, keys and values beside each other
            assert torch.linalg.matrix_rank(difference.double(), rtol=1e-4) <= RANK * parts, name


@pytest.mark.parametrize("where", ["attention", "mlp", "all"])
def test_where(tagger, where):
    before = copies(tagger)
    with adapted(tagger, rank=RANK, where=where):
        scatter(tagger)
    changed = {name for name in moved(before, copies(tagger)) if not name.startswith("head.")}
    attention = {name for name in changed if set(name.split(".")) & set(ATTENTION)}
    assert bool(attention) == (where != "mlp")
    assert bool(changed - attention) == (where != "attention")


def test_block_leaves_nothing(tagger, untouched):
    modules = [type(module) for module in tagger.modules()]
    with untouched(tagger):
        with adapted(tagger, rank=RANK):
            tagger(IDS, MASK)
        assert [type(module) for module in tagger.modules()] == modules


def test_error_in_the_block_merges_too(tagger):
    names = [name for name, _ in tagger.named_parameters()]
    tagger.bridge.blocks[0].requires_grad_(False)  # whatever stood still before does so after
    trains = [weight.requires_grad for weight in tagger.parameters()]
    with pytest.raises(KeyError), adapted(tagger, rank=RANK):  # noqa: PT012
        scatter(tagger)
        inside = logits(tagger)
        raise KeyError
    torch.testing.assert_close(logits(tagger), inside, rtol=0, atol=1e-5 * max(1.0, float(inside.abs().max())))
    assert [name for name, _ in tagger.named_parameters()] == names
    assert [weight.requires_grad for weight in tagger.parameters()] == trains


def test_failure_on_the_way_in_leaves_nothing(bert, untouched, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr("relearn_lens.models.lora._changes", fail)
    with untouched(bert), pytest.raises(RuntimeError, match="no room"), adapted(bert):
        pass


def test_seed_draws_the_adapters(bert):
    def drawn(seed: int) -> list[torch.Tensor]:
        with adapted(bert, seed=seed):
            return [weight.clone() for name, weight in bert.named_parameters() if "lora_A" in name]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({tuple(a.flatten().tolist()) for a in first}) == len(first)


def test_scale_is_alpha_by_rank(bert):
    def change(alpha: float) -> torch.Tensor:
        before = copies(bert)
        with adapted(bert, rank=RANK, alpha=alpha):
            scatter(bert)
        return moved(before, copies(bert))["trunk.encoder.layer.0.intermediate.dense.weight"]

    torch.testing.assert_close(change(6.0), 2 * change(3.0), rtol=1e-3, atol=1e-5)


def test_language_model_keeps_its_head():
    model = language_model()
    assert isinstance(model, LanguageModel)
    before = copies(model)
    with adapted(model, rank=RANK):
        for _ in retrain_(model, load_toy(sentences=20).corpus, epochs=1, every=1, lr=1e-2):
            pass
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    changed = moved(before, copies(model))
    assert changed
    assert not any("head" in name or "embed" in name for name in changed)


def chosen(model: Model, site: str) -> Neurons:
    place = site_of(model.bridge, site)
    return Neurons(torch.arange(place.width).expand(len(place.layers), -1) < 4, place)


def test_held_neurons_whose_weights_have_no_adapter_stay(bert, corpus):
    neurons = chosen(bert, "resid")  # of a BERT: LayerNorms
    prune_(bert, neurons)
    before = copies(bert)
    with held(bert, neurons), adapted(bert, rank=RANK), held(bert, neurons):
        list(retrain_(bert, corpus, epochs=1, every=1, lr=1e-2))
    assert not any("LayerNorm" in name for name in moved(before, copies(bert)))


def test_held_neurons_under_an_adapter_are_refused(bert, untouched):
    neurons = chosen(bert, "mlp_post")
    with (
        untouched(bert),
        held(bert, neurons),
        pytest.raises(ValueError, match=r"3 matrices .* masked gradient, such as blocks.0.mlp.* neurons are held"),
        adapted(bert),
    ):
        pass
    with held(bert, neurons), adapted(bert, where="attention"):
        pass
    for setting in (prune_, lambda *given: held(*given).__enter__()):
        with adapted(bert), pytest.raises(ValueError, match=r"blocks.0.mlp.out has a low-rank adapter now"):
            setting(bert, neurons)


def test_weights_cannot_be_loaded_in_the_block(bert, corpus):
    before = copies(bert)
    with adapted(bert):
        with pytest.raises(ValueError, match="has low-rank adapters now; load weights when the block"):
            bert.load_weights(before)
        with pytest.raises(ValueError, match="has low-rank adapters now"):
            activation_similarity(before, bert, corpus)
    bert.load_weights(before)


def test_model_cannot_be_exported_in_the_block(bert, tmp_path):
    with adapted(bert), pytest.raises(ValueError, match="has low-rank adapters now; export it when the block"):
        export(bert, tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_other_ways_to_train_and_to_measure_work_in_the_block(bert, corpus):
    place = Concept("place", ["LOC"])
    with computing(bert, torch.bfloat16), adapted(bert, rank=RANK):
        for _ in retrain_(bert, corpus, epochs=2, every=1, restart=True, checkpointing=True, accumulate=2, lr=1e-3):
            what = ["auroc", "conductance", "top_words"]
            shot = measure(bert, corpus, place, what=what, sentences=4, steps=2)
            assert shot.attribution is not None
            assert shot.attribution.score.abs().sum() > 0


def test_errors(bert, monkeypatch):
    with pytest.raises(ValueError, match="rank and alpha must be above 0, got rank=0"), adapted(bert, rank=0):
        pass
    with pytest.raises(ValueError, match="above 0, got rank=8, alpha=-1"), adapted(bert, alpha=-1):
        pass
    with pytest.raises(ValueError, match="unknown where 'heads'; known: attention, mlp, all"):
        unchecked(adapted)(bert, where="heads").__enter__()
    with adapted(bert), pytest.raises(ValueError, match="has adapters already"), adapted(bert):
        pass
    monkeypatch.setattr(bert.bridge, "blocks", nn.ModuleList())
    with pytest.raises(ValueError, match="BertForMaskedLM model have no plain linear layers for where='mlp'"):
        unchecked(adapted)(bert, where="mlp").__enter__()


def test_without_peft(bert, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"need peft: pip install 'relearn-lens\[lora\]'"), adapted(bert):
        pass


def test_weights_of_lower_precision(bert_folder):
    bert = load_tagger(bert_folder, ("O", "LOC", "PER"), device="cpu", dtype=torch.bfloat16)
    with adapted(bert, rank=RANK):
        scatter(bert)
        inside = logits(bert).float()
    torch.testing.assert_close(logits(bert).float(), inside, rtol=0, atol=0.05 * max(1.0, float(inside.abs().max())))


# --- in an experiment

TOY: dict[str, Any] = {
    "arms": ["concept", "unpruned"],
    "seeds": [0],
    "data": {"train_sentences": 64, "validation_sentences": 40, "probe_sentences": 40},
    "prune": {"control_draws": 2},
    "finetune": {"epochs": 0.5},
    "retrain": {"epochs": 2, "every": 1, "lora_rank": 4},
    "measure": ["probeless", "similarity"],
}


def test_experiment_moves_only_low_rank_parts():
    base: dict[str, torch.Tensor] = {}
    final, within, stages = {}, {}, []
    paused: dict[str, dict[str, tuple[int, ...]]] = {}
    model: Any = None
    for event in perform(settings_of("toy", TOY)):
        match event:
            case Base():
                base = dict(event.weights)
            case Measured():
                stages.append((event.arm, event.stage))
                if event.arm == "unpruned" and event.stage == "2":
                    within = {name: value.clone() for name, value in model.weights().items()}
            case Paused() if event.training != "base":
                paused[event.training] = {name: tuple(value.shape) for name, value in event.weights.items()}
            case ArmDone():
                assert event.weights is not None
                final[event.trajectory.arm] = {name: value.clone() for name, value in event.weights.items()}
                assert event.trajectory.similarity
            case _:
                model = getattr(event, "model", model)
    assert stages == [(arm, stage) for arm in TOY["arms"] for stage in ("base", "pruned", "1", "2")]
    assert set(within) == set(base)
    assert moved(within, final["unpruned"]) == {}
    # What an arm is taken up again from is its adapters and the head, not the model.
    for shapes in paused.values():
        assert set(shapes) > {"head.weight", "head.bias"}
        assert all(4 in shape for name, shape in shapes.items() if not name.startswith("head."))
    changed = moved(base, final["unpruned"])
    assert {"head.weight", "head.bias"} < set(changed)
    for name, difference in changed.items():
        if not name.startswith("head."):
            assert difference.ndim == 2
            assert torch.linalg.matrix_rank(difference.double(), rtol=1e-4) <= 4, name


def test_experiment_needs_peft_before_it_trains(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="need peft"):
        next(iter(perform(settings_of("toy", TOY))))


def test_lora_rank_is_a_setting():
    assert settings_of("toy").retrain.lora_rank is None
    assert settings_of("toy", {"retrain": {"lora_rank": 4}}, ["retrain.lora_rank=none"]).retrain.lora_rank is None
    with pytest.raises(ValueError, match=r"retrain.lora_rank = 0: .* greater than or equal to 1"):
        settings_of("toy", {"retrain": {"lora_rank": 0}})
    with pytest.raises(ValueError, match="weights are there at its end alone; use keep = 'last'"):
        settings_of("toy", {"retrain": {"lora_rank": 4}, "keep": "all"})


def test_interrupted_arm_goes_on_from_its_last_pause_to_the_bit(tmp_path: Path):
    from relearn_lens.runs.store import run

    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if isinstance(event, Paused) and event.training == "concept":
            raise Stop

    how = settings_of("toy", TOY | {"arms": ["concept"], "measure": ["probeless"]})
    steps: list[str] = []
    counting = register_optimizer_step_pre_hook(lambda *_: steps.append("one"))
    try:
        whole = run(how, tmp_path / "whole")
        in_all = len(steps)
        with pytest.raises(Stop):
            run(how, tmp_path / "cut", on_event=stop)
        steps.clear()
        cut = run(how, tmp_path / "cut")
    finally:
        counting.remove()
    assert 0 < len(steps) < in_all / 2  # one epoch of retraining: neither the fine-tuning nor the first epoch again
    for stage in ("1", "2"):
        first, second = cut.arms["concept"][0][stage], whole.arms["concept"][0][stage]
        assert first.at == second.at
        assert torch.equal(first.saliency.score, second.saliency.score)
        assert first.scores.f1 == second.scores.f1


def test_adapter_weights_come_back_and_others_are_refused(toy):
    with adapted(toy.tagger, rank=2, seed=1):
        with torch.no_grad():
            for parameter in toy.tagger.parameters():
                if parameter.requires_grad:
                    parameter += 0.1
        kept = {name: value.clone() for name, value in adapter_weights(toy.tagger).items()}
    fresh = load_toy(sentences=20).tagger
    with adapted(fresh, rank=2, seed=1):
        load_adapter_weights(fresh, kept)
        assert all(torch.equal(value, kept[name]) for name, value in adapter_weights(fresh).items())
    with adapted(fresh, rank=3), pytest.raises(ValueError, match="are of other adapters: rank"):
        load_adapter_weights(fresh, kept)
