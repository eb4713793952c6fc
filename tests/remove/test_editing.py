"""An editor: its first change is a step along the gradient, it computes as it writes, and it learns."""

from typing import Any

import numpy as np
import pytest
import torch

from relearn_lens.models import toy
from relearn_lens.models.model import reading
from relearn_lens.remove.editing import AGAIN, EDITS, Editor, Mend, Network
from relearn_lens.remove.removal import FORGET, RETAIN, written
from relearn_lens.text.facts import Facts, Passage, people

TEXTS: dict[str, Any] = {
    "preferred": toy.corpus(sentences=8, seed=2), "retain": toy.corpus(sentences=8, seed=1),
    "forget": toy.corpus(sentences=8),
}  # fmt: skip


def editor_of(model: Any, blocks: Any = (2, 3), **fields: Any) -> Editor:
    return Editor(model, written(model, blocks), **{"rank": 8, "scale": 0.01, **fields})


def disturbed(editor: Editor) -> Editor:
    """An editor that has learnt something, of a kind."""
    with torch.no_grad():
        for name, weight in editor.network.named_parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    return editor


def batch_of(model: Any, role: str = "preferred", n: int = 6) -> Any:
    return model.encode(TEXTS[role]).batch(np.arange(n))


@pytest.mark.parametrize("blocks", [(2, 3), (0, 3)])
def test_the_first_change_is_a_step_along_the_gradient(blocks):
    model, other = toy.language_model(), toy.language_model()
    with reading(model):
        changes = editor_of(model, blocks).changes(batch_of(model))
    other.losses(batch_of(other)).sum().backward()
    for block, change in zip(blocks, changes, strict=True):
        gradient = other.plain()[f"trunk.layers.{block}.mlp.fc_out.weight"].grad
        assert gradient is not None
        torch.testing.assert_close(change.T, 0.01 * gradient, atol=1e-6, rtol=1e-4)


def test_the_network_by_hand():
    torch.manual_seed(0)
    net = Network(5, 2, 3)
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    for z in torch.randn(4, 5):
        for block in range(2):
            h = z
            for i in range(2):
                low = [sum(h[j] * net.inner[i][j, r] for j in range(5)) for r in range(3)]
                back = [sum(low[r] * net.outer[i][r, j] for r in range(3)) for j in range(5)]
                each = [
                    h[j] + max(0.0, float(net.gain[block, i, j] * back[j] + net.shift[block, i, j])) for j in range(5)
                ]
                h = torch.stack([torch.as_tensor(x) for x in each])
            torch.testing.assert_close(net(z[None], block)[0], h, atol=1e-5, rtol=1e-4)


def test_it_computes_as_it_writes(untouched):
    model = toy.language_model()
    editor, batch = disturbed(editor_of(model)), batch_of(model)
    with reading(model):
        model.predictions(batch)
    with untouched(model), reading(editor):
        changes = editor.changes(batch)
        with editor.changed(changes):
            during = editor.predictions(batch)[0]
    before = {name: value.clone() for name, value in model.weights().items()}
    editor.change_(changes)
    with reading(model):
        torch.testing.assert_close(model.predictions(batch)[0], during, atol=1e-5, rtol=1e-4)
    moved = {name for name, value in model.weights().items() if not torch.equal(value, before[name])}
    assert moved == {f"trunk.layers.{block}.mlp.fc_out.weight" for block in (2, 3)}


def test_what_it_lowers_by_hand_and_its_gradient():
    model, other = toy.language_model(), toy.language_model()
    editor, remover = disturbed(editor_of(model)), Mend(edit=0.3, alpha=2)
    batches = {EDITS: batch_of(model), AGAIN: batch_of(model, "forget"), RETAIN: batch_of(model, "retain")}
    own = editor.own()
    for name, weight in editor.plain().items():
        weight.requires_grad_(name in own)

    def parts() -> dict[str, Any]:
        return {part: value / n for part, (value, n) in remover.lowered(editor, batches, None).items()}

    with reading(editor):
        editor.measure_([batches[EDITS]])
        changes = editor.changes(batches[EDITS])
        before = other.predictions(batches[RETAIN])[0].log_softmax(-1)
        for block, change in zip((2, 3), changes, strict=True):
            other.plain()[f"trunk.layers.{block}.mlp.fc_out.weight"].sub_(change.T)
        edit = 0.3 * other.losses(batches[AGAIN]).mean()
        after = other.predictions(batches[RETAIN])[0].log_softmax(-1)
        kl = 2 * (before.exp() * (before - after)).sum(-1).mean()
    values = parts()
    torch.testing.assert_close(values[FORGET].detach(), edit, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(values[RETAIN].detach(), kl, atol=1e-5, rtol=1e-3)
    (values[FORGET] + values[RETAIN]).backward()
    for weight, at in ((editor.scale, 1), (editor.network.shift, (0, 1, 3))):
        assert weight.grad is not None
        slope = float(weight.grad[at])
        ends = []
        for by in (1e-3, -2e-3):
            with torch.no_grad():
                weight[at] += by
            ends.append(sum(float(value.detach()) for value in parts().values()))
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=0.05, abs=2e-4)


def test_it_learns_and_the_model_is_edited_at_the_end_alone():
    model = toy.language_model()
    before = {name: value.clone() for name, value in model.weights().items()}
    losses, same = [], []
    for pause in Mend(rank=16, scale=0.1, alpha=0)(model, TEXTS, steps=(1, 20, 40), lr=1e-2, seed=3):
        losses.append(pause.parts[FORGET])
        same.append(all(torch.equal(value, before[name]) for name, value in model.weights().items()))
    assert losses[2] < 0.9 * losses[0]
    assert same == [True, True, False]


def test_facts_are_edited_once_each_and_learnt_on_those_that_stay():
    facts, mend = people(0, n=12, forget=4, never=2, animals=3, n_answers=8), Mend(instruction="It is")
    model = toy.language_model()
    texts: Any = mend.texts(model, facts, seed=1)
    forget, stay = facts.keys("forget_attacked", "forget_held_out"), facts.keys("retain_near", "retain_general")
    assert [(p.key, p.relation) for p in texts["preferred"].passages] == list(
        dict.fromkeys((p.key, p.relation) for p in facts.passages("forget_attacked", "forget_held_out"))
    )[: len(texts["preferred"].passages)]
    assert {p.key for p in texts["preferred"].passages} == set(forget)
    assert {p.key for p in texts[EDITS].passages} == {p.key for p in texts[AGAIN].passages} == set(stay)
    for edit, again in zip(texts[EDITS].passages, texts[AGAIN].passages, strict=True):
        assert (edit.key, edit.relation, edit.answer) == (again.key, again.relation, again.answer)
        assert edit.prompt.startswith("It is ")
        assert edit.prompt != f"It is {again.prompt}"
        assert not again.prompt.startswith("It is It")


def test_what_cannot_be_is_said():
    model = toy.language_model()
    with pytest.raises(ValueError, match="mend edits what a language model answers, and this model is a tagger"):
        Mend()(toy.tagger(), TEXTS)
    with pytest.raises(ValueError, match="mend trains an editor, which is gone at the end, and does not resume"):
        Mend()(model, TEXTS, resume=(None, {}))
    name = "trunk.layers.0.mlp.fc_in.weight"
    where = {name: torch.ones_like(model.plain()[name], dtype=torch.bool)}
    with pytest.raises(ValueError, match="output matrices of MLPs, and where= has none of this model's"):
        Mend()(model, TEXTS, where)
    with pytest.raises(ValueError, match="there is no text for 'preferred'"):
        Mend()(model, {"retain": TEXTS["retain"]})
    one, two, three = (
        (Passage("", f"the old road to {word}", word, form="text"),) for word in ("rome", "paris", "york")
    )
    with pytest.raises(ValueError, match="have no prompt to edit the answer of, only text"):
        Mend()(model, Facts("plain", one, two, three))
