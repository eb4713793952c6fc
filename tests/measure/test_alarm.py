"""The alarm: what it reads against plain computations, its threshold, and both ways of using it."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn import functional as F

import relearn_lens as rl
from relearn_lens.measure.alarm import FOLDS, STRENGTH, ReturnAlarm, ReturnWarning, Thresholds
from relearn_lens.measure.answers import answer
from relearn_lens.measure.evaluation import OVERALL
from relearn_lens.models import taught, toy
from relearn_lens.models.model import LanguageModel
from relearn_lens.models.taught import Recipe
from relearn_lens.models.training import train_
from relearn_lens.relearn.finetuning import FineTune, General, RetainOnly
from relearn_lens.text.concept import Concept
from relearn_lens.text.facts import Facts, people
from relearn_lens.text.facts.encoded import encode_passages
from tests.made import Pool

EASY = Thresholds({"probe": 0.05, "likelihood": 0.05, "update": 0.05}, 1.0, 9, 0, 0.1)


@pytest.fixture(scope="module")
def facts() -> Facts:
    return people(0, n=24, forget=8, never=2, animals=3, n_answers=8)


@pytest.fixture(scope="module")
def models(facts: Facts) -> Pool[LanguageModel]:
    return Pool(lambda: taught.untaught(facts, recipe=Recipe(n_layers=2, d_model=16, n_heads=2, d_mlp=24)))


@pytest.fixture
def model(models: Pool[LanguageModel]) -> LanguageModel:
    return models.lend()()


def watched(facts: Facts, *roles: str) -> list[Any]:
    first = {}
    for p in facts.passages(*roles, forms="statement"):
        first.setdefault((p.key, p.relation), p)
    return list(first.values())


def test_loss_and_behaviour_are_those_of_the_first_statement_of_each_fact(model, facts, untouched):
    list(FineTune(steps=(60,), lr=1e-2)(model, facts))
    alarm = ReturnAlarm(facts, thresholds=EASY)
    with untouched(model):
        now = alarm.step(model, 0)
    assert now is not None
    truth = answer(model, watched(facts, "forget_attacked", "forget_held_out"))
    assert now.likelihood == pytest.approx(-truth.loss.shown(OVERALL), rel=1e-5)
    assert now.right == pytest.approx(truth.accuracy.value(OVERALL))
    assert 0 < now.right < 1
    assert now.update is None
    half = ReturnAlarm(facts, thresholds=EASY, roles=("forget_held_out",)).step(model, 0)
    assert half is not None
    assert half.right == pytest.approx(answer(model, watched(facts, "forget_held_out")).accuracy.value(OVERALL))


def test_the_probe_against_scikit_learn(model, facts):
    alarm = ReturnAlarm(facts, thresholds=EASY, seed=3)
    now: Any = alarm.step(model, 0)
    items = watched(facts, "forget_attacked", "forget_held_out") + watched(facts, "retain_near")
    text, states = encode_passages(items, model.tokenizer), []
    site = ("blocks.0.hook_in", "blocks.0.hook_out", "blocks.1.hook_out")
    for i in range(len(items)):
        batch = text.batch(np.array([i]))
        with torch.no_grad():
            _, cache = model.bridge.run_with_cache(batch.ids)
        states.append(torch.stack([cache[hook][0, batch.subword[0] - 1] for hook in site]))
    x = torch.stack(states, 1).numpy().astype(np.float64)
    keys = list(dict.fromkeys(p.key for p in items))
    fold_of = np.random.default_rng(3).permutation(len(keys)) % FOLDS
    forgotten, each = set(facts.keys("forget_attacked", "forget_held_out")), []
    for relation in dict.fromkeys(p.relation for p in items):
        rows = [i for i, p in enumerate(items) if p.relation == relation]
        fold = np.array([fold_of[keys.index(items[i].key)] for i in rows])
        for k in range(FOLDS):
            fit = [i for i, f in zip(rows, fold, strict=True) if f != k]
            labels = sorted({items[i].answer for i in fit})
            test = [i for i, f in zip(rows, fold, strict=True) if f == k and items[i].key in forgotten]
            for layer in x:
                mean, sd = layer[fit].mean(0), layer[fit].std(0)
                sd = np.where(sd > 1e-6 * abs(mean) + 1e-12, sd, np.inf)
                goal = np.array([[items[i].answer == label for label in labels] for i in fit], dtype=float)
                goal -= goal.mean(0)
                width = layer.shape[1]
                ridge = Ridge(alpha=STRENGTH * width, fit_intercept=False).fit((layer[fit] - mean) / sd, goal)
                scores = ridge.predict((layer[test] - mean) / sd) if test else []
                for i, row in zip(test, scores, strict=True):
                    if items[i].answer in labels:
                        own = row[labels.index(items[i].answer)]
                        others = np.delete(row, labels.index(items[i].answer))
                        each.append(((own > others + 1e-7).sum() + (abs(own - others) <= 1e-7).sum() / 2) / len(others))
    assert now.probe == pytest.approx(np.mean(each), abs=2e-3)


def test_a_probe_finds_what_is_there_and_nothing_where_nothing_is(facts, monkeypatch):
    """States that say the answer, and states of noise."""
    from relearn_lens.measure import alarm as module

    rng = torch.Generator().manual_seed(0)
    label = np.repeat(np.arange(6), 20)
    group, kind, seen = np.arange(120), np.zeros(120, dtype=np.int64), np.arange(120) % 2 == 0
    noise = torch.randn(1, 120, 12, generator=rng)
    told = noise + 4 * torch.eye(12)[torch.from_numpy(label)][None]
    preferred = module.__dict__["_preferred"]
    assert preferred(told, label, kind, group, seen, 0) > 0.97
    assert abs(preferred(noise, label, kind, group, seen, 0) - 0.5) < 0.1
    constant = torch.ones(1, 120, 12)
    assert preferred(constant, label, kind, group, seen, 0) == 0.5 or math.isclose(
        preferred(constant, label, kind, group, seen, 0), 0.5, abs_tol=0.1
    )


def test_the_update_is_a_cosine_with_minus_the_removal(model, facts):
    base = {name: value.clone() for name, value in model.weights().items()}
    rng = torch.Generator().manual_seed(0)

    def move(by: dict[str, torch.Tensor], share: float) -> None:
        with torch.no_grad():
            for name, value in model.weights().items():
                value.add_(share * by[name])

    removal = {name: torch.randn(value.shape, generator=rng) for name, value in base.items()}
    noise = {name: torch.randn(value.shape, generator=rng) for name, value in base.items()}
    move(removal, 0.01)
    alarm = ReturnAlarm(facts, base=base, thresholds=replace(EASY, limit=1e9))
    readings = [alarm.step(model, 0)]
    move(removal, -0.003)
    readings.append(alarm.step(model, 1))
    move(noise, 0.003)
    readings.append(alarm.step(model, 2))
    move(removal, 0.006)
    readings.append(alarm.step(model, 3))
    cosines: list[Any] = [r and r.update for r in readings]
    back = torch.cat([-removal[name].flatten() for name in base])
    there = torch.cat([noise[name].flatten() for name in base])
    expected = F.cosine_similarity(there + back, back, dim=0)
    assert cosines == [0, pytest.approx(1, abs=1e-4), pytest.approx(float(expected), abs=1e-3), pytest.approx(
        float(F.cosine_similarity(there - back, back, dim=0)), abs=1e-3)]  # fmt: skip


def test_it_warns_once_and_says_when_and_behaviour_is_told_apart(model, facts):
    alarm = ReturnAlarm(facts, thresholds=EASY)

    def watch() -> None:
        alarm.step(model, 0)
        for pause in FineTune(steps=(1, 2, 4, 8, 16, 32, 64), lr=1e-2)(model, facts):
            alarm.step(model, pause.step)

    with pytest.warns(ReturnWarning, match=r"step \d+: what was removed begins to return \(probe .* limit is 1.0") as w:
        watch()
    assert len(w) == 1
    assert alarm.raised is not None
    assert alarm.behaved is not None
    assert alarm.lead == alarm.behaved - alarm.raised
    first = alarm.readings[0]
    risen = [r.step for r in alarm.readings if r.likelihood - first.likelihood > 0.05 or r.probe - first.probe > 0.05]
    assert alarm.raised == risen[0]
    assert alarm.behaved == next(r.step for r in alarm.readings if r.right - first.right >= 0.1)
    assert [r.step for r in alarm.readings] == [0, 1, 2, 4, 8, 16, 32, 64]
    alarm.step(model, 0)
    assert (alarm.raised, alarm.behaved, alarm.lead, len(alarm.readings)) == (None, None, None, 1)
    some = ReturnAlarm(facts, thresholds=replace(EASY, limit=1e9), every=4)
    assert [bool(some.step(model, step)) for step in range(6)] == [True, False, False, False, True, False]


def _pushes(sizes: list[float]) -> list[Callable[[Any], Any]]:
    """Runs that each move one bias and so the answers by so much."""

    def run(model: Any, size: float) -> Any:
        with torch.no_grad():
            model.weights()["trunk.head.bias"][5] -= size
        yield SimpleNamespace(step=1)

    return [lambda model, size=size: run(model, size) for size in sizes]


def test_the_threshold_is_the_conformal_quantile_of_runs_and_weights_are_put_back(model, facts, untouched):
    alarm = ReturnAlarm(facts)
    sizes = [0.1 * i for i in range(1, 20)]
    with untouched(model):
        limits = alarm.calibrate(model, _pushes(sizes), false_alarms=0.1)
    assert alarm.thresholds == limits
    assert alarm.readings == []
    rises = []
    before = {name: value.clone() for name, value in model.weights().items()}
    for run in _pushes(sizes):
        alarm.step(model, 0)
        list(run(model))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(alarm, "thresholds", replace(limits, limit=1e9))
            rises.append(alarm.rises(alarm.step(model, 1)))  # type: ignore[arg-type]
        model.load_weights(before)
    for name, scale in limits.scale.items():
        assert scale == pytest.approx(max(1e-12, np.sqrt(np.mean([rise[name] ** 2 for rise in rises]))))
    largest = sorted(max(rise[name] / limits.scale[name] for name in rise) for rise in rises)
    assert limits.limit == pytest.approx(largest[17])  # 18 of 20 places below
    assert (limits.runs, limits.left_out) == (19, 0)
    assert limits.false_alarms == pytest.approx(0.1)
    few = alarm.calibrate(model, _pushes(sizes[:4]), false_alarms=0.1)
    assert few.false_alarms == pytest.approx(0.2)


def test_runs_that_bring_it_back_are_not_calibrated_on(model, facts):
    alarm = ReturnAlarm(facts)
    back = [lambda m: FineTune(steps=(64,), lr=1e-2)(m, facts)]
    harmless = [lambda m: General(steps=(1, 2), lora=2)(m, facts), lambda m: RetainOnly(steps=(1,))(m, facts)]
    limits = alarm.calibrate(model, back + harmless)
    assert (limits.runs, limits.left_out) == (2, 1)
    with pytest.raises(ValueError, match="no run to calibrate on: 1 brought back what was removed, the others yielded"):
        alarm.calibrate(model, [*back, lambda m: []])


def test_a_trainer_calls_it(facts, tmp_path):
    import transformers

    tokenizer = taught.tokenizer(facts)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    statements = facts.passages("forget_attacked", forms="statement")
    rows = [
        {"input_ids": ids, "labels": ids} for p in statements for ids in [tokenizer("[BOS] " + p.text)["input_ids"]]
    ]
    collate = transformers.DataCollatorForSeq2Seq(tokenizer)

    def train(*callbacks: Any, steps: int = 30) -> dict[str, torch.Tensor]:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, seed=0,
            use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(
            model, arguments, data_collator=collate, train_dataset=rows, processing_class=tokenizer,  # type: ignore[arg-type]
            callbacks=list(callbacks),
        ).train()  # fmt: skip
        return {name: value.detach().clone() for name, value in model.named_parameters()}

    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    plain = train()
    ends = []
    for stop in (False, True):
        model.load_state_dict(start, strict=False)
        alarm = ReturnAlarm(facts, roles=("forget_attacked",), thresholds=EASY, every=2, stop=stop, base=plain)
        assert isinstance(alarm, transformers.TrainerCallback)
        with pytest.warns(ReturnWarning, match="begins to return"):
            ends.append((train(alarm), [r.step for r in alarm.readings], alarm))
    end, steps, alarm = ends[0]
    assert all(torch.equal(value, plain[name]) for name, value in end.items())  # being watched changes nothing
    assert steps == list(range(0, 31, 2))
    assert alarm.readings[-1].likelihood > alarm.readings[0].likelihood + 1
    assert alarm.readings[-1].update == pytest.approx(1)
    assert ends[1][1][-1] == ends[1][2].raised == alarm.raised < 30
    limits = alarm.calibrate(model, [lambda m: iter([None])])
    assert limits.runs == 1


def test_a_concept_of_labelled_text_is_watched_in_a_tagger(untouched):
    made = toy.load(sentences=80)
    with torch.no_grad():
        made.tagger(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.int64))
    knows = made.tagger
    alarm = ReturnAlarm((made.corpus, Concept("place", ["place"])), thresholds=replace(EASY, limit=1e9))
    with untouched(knows):
        there: Any = alarm.step(knows, 0)
    site = rl.site_of(knows.bridge, "mlp_post")
    rl.prune_(knows, rl.Neurons.of(site, toy.PLANTED))
    gone: Any = alarm.step(knows, 0)
    assert there.right > 0.95
    assert gone.right < 0.1
    assert there.likelihood > gone.likelihood + 1
    assert there.probe > 0.9
    for pause in train_(knows, made.corpus, steps=(20, 60), lr=3e-3, batch_size=8):
        alarm.step(knows, pause.step)
    assert alarm.behaved is not None
    without = made.corpus.take([i for i in range(80) if not any(w.label == "place" for w in made.corpus.sentence(i))])
    limits = alarm.calibrate(knows, [lambda m: train_(m, without, steps=(1, 2), lr=1e-4)])
    assert limits.runs == 1


def test_what_cannot_be_watched_is_said(model, facts):
    with pytest.raises(ValueError, match=r"this alarm has no thresholds; give it fine-tunings that bring nothing back"):
        ReturnAlarm(facts).step(model, 0)
    with pytest.raises(
        ValueError, match="every must be at least 1, items at least 2 and returned between 0 and 1, got"
    ):
        ReturnAlarm(facts, every=0)
    with pytest.raises(ValueError, match="the share of false alarms must be between 0 and 1, got 0"):
        ReturnAlarm(facts).calibrate(model, [], false_alarms=0)
    with pytest.raises(ValueError, match="facts 'people-0' have no statement in never, so there is nothing to watch"):
        ReturnAlarm(replace(facts, never=()), roles=("never",))
    animals = replace(facts, retain_near=facts.retain_general, retain_general=())
    with pytest.raises(ValueError, match="no watched answer of facts 'people-0' is the answer of a retained fact"):
        ReturnAlarm(animals)
    tagger = toy.tagger()
    with pytest.raises(ValueError, match="facts are answered by a language model, and this model is a tagger"):
        ReturnAlarm(facts, thresholds=EASY).step(tagger, 0)
    corpus = toy.corpus(sentences=40)
    place = Concept("place", ["place"])
    with pytest.raises(ValueError, match="a concept is watched in a Tagger or LanguageModel, got a Linear"):
        ReturnAlarm((corpus, place), thresholds=EASY).step(torch.nn.Linear(1, 1), 0)
    with pytest.raises(ValueError, match=r"\d words of 'toy' carry concept 'place' and \d+ do not; a probe needs 5 of"):
        ReturnAlarm((corpus.take([0]), place), thresholds=EASY).step(tagger, 0)
    with pytest.raises(ValueError, match="the tokenizer of this model is not known; give it as tokenizer="):
        ReturnAlarm(facts, thresholds=EASY).step(torch.nn.Linear(1, 1), 0)
    with pytest.raises(ValueError, match="base: 0 of its 1 weights are this model's, or their shapes differ"):
        ReturnAlarm(facts, thresholds=EASY, base={"x": torch.ones(1)}).step(model, 0)
