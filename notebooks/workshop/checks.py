"""Checks of the workshop's exercises.

Each `check_...` takes the learner's function, tries it on a case worked out by hand and on random input against a slow
loop, and either says in one line what now holds or raises `Wrong`, which says what is wrong. Typical mistakes are
recognised by their result: each check computes what would come out if one had made them.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

import relearn_lens as rl
from relearn_lens.models import toy


class Wrong(AssertionError):
    """What is wrong with a learner's function, in a teacher's words."""

    def _render_traceback_(self) -> list[str]:
        """Jupyter shows this in place of a traceback through code that is not the learner's."""
        return [f"✘ {self}"]


class SubWords(NamedTuple):
    """Activations of the sub-words of a few sentences. No word is in two batches."""

    activations: Float[Tensor, "token layer neuron"]
    word_of: Int[Tensor, " token"]
    """The word of each sub-word, numbered from 0 within the batch."""
    label: Int[Tensor, " word"]
    """The class of each word."""


# --- 1a class means


def check_class_means(class_means: Callable) -> None:
    """Batches of sub-words to the number of words and the mean of each class."""
    name = "class_means"
    # By hand: word 0 is (0, 0) and (2, 4), so (1, 2); with (3, 2) and (5, 2) class 1 has the mean (3, 2).
    hand = [
        SubWords(_t([[[0, 0]], [[2, 4]], [[3, 0]], [[3, 2]]]), torch.tensor([0, 0, 1, 2]), torch.tensor([1, 0, 1])),
        SubWords(_t([[[5, 2]]]), torch.tensor([0]), torch.tensor([1])),
    ]
    draw = _generator(0)
    sizes = [[1, 3, 2, 1], [2, 1], [1, 1, 4, 1, 2], [3, 1, 1]]
    random = [
        SubWords(
            torch.randn(sum(size), 2, 5, generator=draw) + 3,
            torch.arange(len(size)).repeat_interleave(torch.tensor(size)),
            torch.randint(0, 3, (len(size),), generator=draw),
        )
        for size in sizes
    ]
    for batches, classes in ((hand, 3), (random, 4)):
        stream = _Stream(batches)
        found = _called(name, class_means, iter(stream), classes)
        if not isinstance(found, tuple) or len(found) != 2:
            raise Wrong(f"{name} must return two tensors, (count, mean); it returned {_kind(found)}.")
        count, mean = found
        words, groups = _words_of(batches), range(classes)
        by_class = [[x for x, label in words if label == k] for k in groups]
        tokens = [(x, int(b.label[w])) for b in batches for x, w in zip(b.activations, b.word_of, strict=True)]
        sub = [[x for x, label in tokens if label == k] for k in groups]
        first = [[x for x, label in _words_of(batches, first=True) if label == k] for k in groups]
        shape = batches[0].activations.shape[1:]
        n = torch.tensor([len(xs) for xs in by_class])
        _same(
            f"{name}: the counts", count, n, "class",
            [
                (torch.tensor([len(xs) for xs in sub]), "Your counts count sub-words. Count words: a word of three "
                 "sub-words is one word."),
                (_counts(batches[-1], classes), "Your counts are those of the last batch alone: start them once, "
                 "before the loop."),
            ],
        )  # fmt: skip
        per_batch = [[[x for x, label in _words_of([b]) if label == k] for b in batches] for k in groups]
        last = [[x for x, label in _words_of(batches[-1:]) if label == k] for k in groups]
        _same(
            f"{name}: the means", mean, _means(by_class, shape), "class layer neuron",
            [
                (_means(sub, shape), "You averaged over sub-words before words: a word of three sub-words counted "
                 "three times. First the mean over the sub-words of each word, then over the words of each class."),
                (_means(first, shape), "You took the first sub-word of each word alone; a word is the mean of all of "
                 "its sub-words."),
                (_means([[torch.stack(xs).mean(0) for xs in bs if xs] for bs in per_batch], shape), "You averaged the "
                 "means of the batches, so a word in a small batch weighs more. Keep sums and counts, and divide once, "
                 "at the end."),
                (_means(last, shape), "Only the last batch is in your means: start the sums once, before the loop."),
                (_means([[x for xs in by_class for x in xs]] * classes, shape), "You pooled the words of all classes "
                 "into one mean; each class has its own."),
                (_means(by_class, shape, less=1), "It looks like you divided by n - 1. A mean divides by n; n - 1 is "
                 "for variances."),
                (_means(by_class, shape) * n.clamp(min=1).view(-1, 1, 1), "These are sums: divide them by the counts."),
                (_means(by_class, shape).where(n.view(-1, 1, 1) > 0, torch.nan), "A class without words has the mean "
                 "0 / 0, which is NaN: put 0 there (divide by count.clamp(min=1))."),
            ],
        )  # fmt: skip
        if stream.kept:
            raise Wrong(
                f"{name} is right, but it keeps every batch, so its memory grows with the text. Go through the batches "
                "one by one and keep nothing but sums and counts."
            )
    _holds("class_means: one pass, and memory that does not grow with the text.")


class _Stream:
    """Hands out batches one by one, and sees whether those before the last are still kept."""

    def __init__(self, batches: Sequence[SubWords]):
        self.batches, self.kept = batches, False

    def __iter__(self) -> Iterator[SubWords]:
        seen: list[weakref.ref] = []
        for batch in self.batches:
            # The loop's own variable still holds the batch before; those before it should be gone.
            self.kept = self.kept or any(ref() is not None for ref in seen[:-1])
            copy = batch.activations.clone()
            seen.append(weakref.ref(copy))
            yield SubWords(copy, batch.word_of, batch.label)
            del copy


def _words_of(batches: Sequence[SubWords], *, first: bool = False) -> list[tuple[Tensor, int]]:
    """Every word with its class, one after the other."""
    words = []
    for batch in batches:
        for w, label in enumerate(batch.label.tolist()):
            mine = batch.activations[batch.word_of == w]
            words.append((mine[0] if first else mine.mean(0), label))
    return words


def _means(groups: Sequence[Sequence[Tensor]], shape: Sequence[int], *, less: int = 0) -> Tensor:
    rows = [sum(xs, torch.zeros(*shape)) / max(len(xs) - less, 1) if xs else torch.zeros(*shape) for xs in groups]
    return torch.stack(rows)


def _counts(batch: SubWords, classes: int) -> Tensor:
    return torch.bincount(batch.label, minlength=classes)


# --- 1b probeless and its ranking


def check_probeless(probeless: Callable) -> None:
    """Counts and means of classes to one score per neuron."""
    name = "probeless"
    # By hand: the concept's mean is (3, 2), the others' (1, 5) and (4, 2): |3-1| + |3-4| = 3 and |2-5| + |2-2| = 3.
    hand = torch.tensor([5, 2, 9]), _t([[[1, 5]], [[3, 2]], [[4, 2]]]), 1
    draw = _generator(1)
    mean = torch.randn(5, 3, 6, generator=draw)
    mean[3] = 0  # a class without words
    for count, means, concept in (hand, (torch.tensor([40, 7, 11, 0, 3]), mean, 2)):
        found = _called(name, probeless, count, means.clone(), concept)
        others = [k for k in range(len(count)) if k != concept and count[k]]
        away = [means[concept] - means[k] for k in others]
        weights = torch.tensor([float(count[k]) for k in others])
        rest = sum((w * means[k] for w, k in zip(weights, others, strict=True)), torch.zeros(())) / weights.sum()
        everyone = [means[concept] - means[k] for k in range(len(count)) if k != concept]
        right = torch.stack([d.abs() for d in away]).sum(0)
        _same(
            name, found, right, "layer neuron",
            [
                (torch.stack(everyone).abs().sum(0), "A class without words takes part: its mean is 0 because there "
                 "is nothing, not because the neuron is silent. Leave out classes with count 0."),
                (torch.stack(away).sum(0), "The differences have signs, so they cancel: take the absolute value of "
                 "each before you sum."),
                (torch.stack(away).sum(0).abs(), "You took the absolute value of the sum; take it of each difference, "
                 "then sum, or they cancel."),
                ((means[concept] - torch.stack([means[k] for k in others]).mean(0)).abs(), "You compared with the mean "
                 "of the other classes' means; take the distance to each of them, then sum."),
                (torch.stack(away).square().sum(0), "You squared the differences; probeless sums their absolute "
                 "values, so its unit is that of activations."),
                (right / len(away), "You took the mean over the other classes; probeless is their sum."),
                (right.div(weights.sum()), "You divided by a number of words; the means are divided already."),
                (sum(w * d.abs() for w, d in zip(weights, away, strict=True)) / weights.sum(), "You weighted the "
                 "classes by how many words they have (a count-weighted mean), so the largest class decides. Every "
                 "other class counts once here, and they are summed."),
                (sum(w * d.abs() for w, d in zip(weights, away, strict=True)), "You multiplied each distance by the "
                 "class's number of words; every other class counts once."),
                ((means[concept] - rest).abs(), "You pooled all other words into one class. That is the two-class form "
                 '(contrast="rest"); here each other class counts for itself.'),
                (torch.stack(away).abs().amax(0), "You took the largest difference; probeless is their sum."),
            ],
        )  # fmt: skip
    _holds("probeless: the summed distance of the concept's mean from every other class's mean.")


def check_ranking(ranking: Callable) -> None:
    """Scores to places, 0 the most salient neuron of all layers together."""
    name = "ranking"
    draw = _generator(2)
    for score in (_t([[5, 9, 1], [7, 2, 8]]), torch.rand(4, 9, generator=draw)):
        found = _called(name, ranking, score.clone())
        flat = sorted(score.flatten().tolist(), reverse=True)
        right = torch.tensor([[flat.index(x) for x in row] for row in score.tolist()])
        each = [sorted(row, reverse=True) for row in score.tolist()]
        in_layer = [[own.index(x) for x in row] for own, row in zip(each, score.tolist(), strict=True)]
        upside_down = score.numel() - 1 - right
        order = score.flatten().argsort(descending=True)
        _same(
            name, found, right, "layer neuron",
            [
                (upside_down, "The ranking is upside down: the most salient neuron should come first, at place 0."),
                (order.view_as(right), "That is which neuron stands at each place. Wanted is the other way round: at "
                 "which place each neuron stands. argsort twice, or order[place] turned around."),
                (order.flip(0).view_as(right), "That is which neuron stands at each place, and upside down; wanted is "
                 "at which place each neuron stands, 0 the most salient."),
                (torch.tensor(in_layer), "You ranked each layer by itself. Rank all neurons of all layers together, or "
                 "every layer has a neuron in first place."),
                (right + 1, "Places start at 0, yours start at 1."),
                (order, "That is the order of the neurons, flat: give each neuron its place, shaped as the scores."),
            ],
        )  # fmt: skip
    _holds("ranking: every neuron has its place among all layers, 0 the most salient.")


# --- 2 ablation by hook


def check_zero_neurons(zero_neurons: Callable) -> None:
    """A hook function: activations in, activations without some neurons out."""
    name = "zero_neurons"
    hand = _t([[[1, 2, 3], [4, 5, 6]]]), [0, 2]
    for activations, neurons in (hand, (torch.randn(3, 5, 8, generator=_generator(3)), [1, 4, 6])):
        given = activations.clone()
        found = _called(name, zero_neurons, given, None, neurons=neurons)
        changed = not torch.equal(given, activations)
        if found is None and changed:
            raise Wrong(
                f"{name}: your hook changed the tensor in place and returned None. What others hold of this tensor "
                "(a cache, autograd) changes with it. Change a copy, and return the copy."
            )
        if found is None:
            raise Wrong(
                f"{name}: your hook returned None, so TransformerLens goes on with the old activations. Return yours."
            )
        if changed:
            raise Wrong(
                f"{name}: your hook changed the tensor in place. A cache that holds it now holds zeros, and autograd "
                "may refuse. Clone first, or use torch.where."
            )
        keep = torch.ones(activations.shape[-1])
        keep[neurons] = 0
        first, tokens = activations.clone(), activations.clone()
        first[:, 0, neurons] = 0
        tokens[:, [k for k in neurons if k < tokens.shape[1]]] = 0
        _same(
            name, found, activations * keep, "sentence token neuron",
            [
                (activations * (1 - keep), "You kept these neurons and zeroed all others."),
                (tokens, "You zeroed tokens: the neurons are the last axis, activations[..., neurons]."),
                (first, "You zeroed the neurons on the first token alone; it is every token that counts."),
                (activations, "Nothing is zeroed."),
            ],
        )  # fmt: skip
    _holds("zero_neurons: a new tensor, these neurons 0 on every token, all else as it was.")


def check_f1_without(f1_without: Callable) -> None:
    """F1 by label while some neurons are held at 0 by hooks."""
    name = "f1_without"
    tagger, corpus = _toy()
    bridge = tagger.bridge
    planted, persons = _of(toy.PLANTED), _of(toy.PERSON_NEURONS)
    hooks, weights = _hooks(bridge), {k: v.clone() for k, v in tagger.weights().items()}
    for neurons, place, person in ((planted, 0.0, 1.0), ({**persons, **planted}, 0.0, 0.0), ({}, 1.0, 1.0)):
        try:
            found = _called(name, f1_without, tagger, corpus, dict(neurons))
        except IndexError as error:
            raise Wrong(
                f"{name}: {error}. Look at which activations the hooks are on: blocks.{{i}}.mlp.out.hook_in has the 64 "
                "hidden units, mlp.in.hook_in and hook_out the 32 coordinates of the residual stream."
            ) from None
        left = _hooks(bridge) - hooks
        moved = [k for k, v in tagger.weights().items() if not torch.equal(v, weights[k])]
        if left:
            bridge.reset_hooks()
            raise Wrong(
                f"{name}: you left a hook behind ({left} of them), so everything that is measured later is ablated "
                "too. Use `with bridge.hooks(fwd_hooks=[...]):`, which takes them away when the block ends."
            )
        if moved:
            tagger.load_weights(weights)
            raise Wrong(f"{name}: the weights changed ({moved[0]}). Ablation by hook leaves the weights as they are.")
        if not isinstance(found, dict) or not {"place", "person"} <= set(found):
            raise Wrong(f"{name} must return F1 by label (rl.evaluate(tagger, corpus).f1), it returned {_kind(found)}.")
        got = found["place"], found["person"]
        if got == (place, person):
            continue
        without = ", ".join(f"layer {layer}: {some}" for layer, some in neurons.items()) or "no neurons"
        said = f"{name}: without {without} F1 should be place {place:.0f}, person {person:.0f}; yours is place " + (
            f"{got[0]:.2f}, person {got[1]:.2f}. "
        )
        if got == (1.0, 1.0):
            raise Wrong(
                said + "That is F1 without any ablation: was the evaluation inside the block, and do the hooks "
                "sit where the neurons are, at blocks.{i}.mlp.out.hook_in?"
            )
        if neurons and len(neurons) == 2 and place == person and 0 < sum(got) <= 1:
            raise Wrong(
                said + "One layer's neurons are gone, the other's are not. A lambda in a loop sees the loop's last "
                "value: every hook zeroes the last layer's neurons. functools.partial(zero_neurons, neurons=...) "
                "fixes the value."
            )
        raise Wrong(said + "Look at which activations the hooks are on: blocks.{i}.mlp.out.hook_in is what the MLP's "
                    "output matrix reads.")  # fmt: skip
    _holds("f1_without: the planted neurons carry place and nothing else does; no hook is left behind.")


# --- 2c dissociation


def check_dissociation(dissociation: Callable) -> None:
    """What two cuts cost two labels to how specific both are."""
    name = "dissociation"
    # By hand: place loses .9 by its own cut and .1 by the other's, person .7 and .2: .8 and .5, so .5.
    for lost in (_t([[0.9, 0.2], [0.1, 0.7]]), _t([[0.8, 0.75], [0.3, 0.9]]), _t([[0.4, 0.15], [0.5, 0.9]])):
        found = _called(name, dissociation, lost.clone())
        if isinstance(found, Tensor) and found.numel() == 1:
            found = found.item()
        if not isinstance(found, float | int):
            raise Wrong(f"{name} must return a number, it returned {_kind(found)}.")
        (a, b), (c, d) = lost.tolist()
        right = min(a - c, d - b)
        for value, says in (
            (right, ""),
            ((a - c + d - b) / 2, "That is the mean of the two labels, behind which one that any cut breaks can hide; "
             "take the smaller."),
            (max(a - c, d - b), "That is the larger of the two; a double dissociation is as good as the worse half."),
            (min(a - b, d - c), "You compared along a row: two labels under one cut, of which one may just be easier "
             "to break. Compare one label under the two cuts, down a column."),
            (min(abs(a - c), abs(d - b)), "You took the size of the difference: a label that loses less by its own cut "
             "than by the other's is the contrary of specific, and stays below 0."),
            (-right, "The sign is the wrong way round: what the own cut costs, less what the other's does."),
            (min(c - a, b - d), "The sign is the wrong way round: what the own cut costs, less what the other's does."),
            (min(a, d), "That is what the own cuts cost; take off what the other's cut costs the same label."),
        ):  # fmt: skip
            if math.isclose(found, value, abs_tol=1e-5):
                if says:
                    raise Wrong(f"{name}: for {lost.tolist()} it should be {right:.2f}, yours is {found:.2f}. {says}")
                break
        else:
            raise Wrong(f"{name}: for {lost.tolist()} it should be {right:.2f}, yours is {found:.2f}.")
    _holds("dissociation: each label by its own cut against the other's, and the worse of the two.")


# --- 3 conductance


def check_conductance(conductance: Callable) -> None:
    """A path, and what is said at each point of it, to what each neuron contributed."""
    name = "conductance"
    # By hand: X = (x0^2, x1) and f = X0 X1. On the path from (0, 0) to (2, 1) X = (4 a^2, a), so the integrals are
    # of a * 8 a and of 4 a^2 * 1: 8/3 and 4/3, which sum to f(end) - f(start) = 4.
    asked: list[Tensor] = []

    def by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(x)
        layer = torch.stack([x[:, 0].square(), x[:, 1]], -1)
        return (layer[:, 0] * layer[:, 1]).sum(), layer

    def exact(a: float) -> tuple[Tensor, Tensor]:
        return _t([[a, 4 * a * a]]), _t([[4 * a * a, a]])

    one, two = torch.zeros(1, 2), _t([[2, 1]])
    found = _called(name, conductance, by_hand, one, two, 64)
    _same(
        name, found, _t([8 / 3, 4 / 3]), "neuron",
        _conductance_mistakes(exact, 64, two - one, len(asked), two), tolerance=2e-3,
    )  # fmt: skip

    # f = sum over tokens of (v . X)^2 with X = tanh(x W), whose gradient and slope along the path are worked out here
    # by hand and integrated with many nodes: no autograd.
    draw = _generator(4)
    weight, v = torch.randn(4, 5, generator=draw) * 0.4, torch.randn(5, generator=draw)
    start, end = torch.randn(3, 4, generator=draw), torch.randn(3, 4, generator=draw)

    def says(x: Tensor) -> tuple[Tensor, Tensor]:
        asked.append(x)
        layer = torch.tanh(x @ weight)
        return (layer @ v).square().sum(), layer

    def at(a: float) -> tuple[Tensor, Tensor]:
        layer = torch.tanh((start + a * (end - start)) @ weight)
        return 2 * (layer @ v)[:, None] * v, layer

    right = torch.zeros(5)
    for k in range(2000):
        gradient, layer = at((k + 0.5) / 2000)
        right += (gradient * (1 - layer.square()) * ((end - start) @ weight)).sum(0) / 2000
    asked.clear()
    found = _called(name, conductance, says, start, end, 64)
    _same(
        name, found, right, "neuron",
        _conductance_mistakes(at, 64, end - start, len(asked), end), tolerance=2e-3,
    )  # fmt: skip
    _holds("conductance: summed over the neurons it is f(end) - f(start), where everything goes through the layer.")


def _conductance_mistakes(
    at: Callable[[float], tuple[Tensor, Tensor]], steps: int, way: Tensor, asked: int, end: Tensor
) -> list[tuple[Tensor, str]]:
    """What comes out of the usual short cuts; `at` gives gradient and activations at a point of the path."""
    points = [at(k / steps) for k in range(steps + 1)]
    gradients, layers = (torch.stack(list(xs)) for xs in zip(*points, strict=True))
    moved, mean = layers[1:] - layers[:-1], (gradients[1:] + gradients[:-1]) / 2
    whole = layers[-1] - layers[0]
    once = f" (says was called {asked} time{'s' * (asked != 1)})"
    found = [
        ((gradients[-1] * whole).sum(0), "Your integral uses the endpoint only: the gradient at the end of the path, "
         f"times the change or the activations{once}. Go along the path in `steps` steps, and sum gradient times "
         "increment."),
        ((mean.mean(0) * whole).sum(0), "That is the mean gradient times the whole change, as if the layer's "
         "activations moved evenly along the path. They do not: multiply each step's gradient with that step's "
         "increment of the layer, then sum."),
        ((gradients[1:].mean(0) * whole).sum(0), "That is the mean gradient times the whole change, as if the layer's "
         "activations moved evenly along the path. Multiply each step's gradient with that step's increment."),
        ((gradients.mean(0) * whole).sum(0), "That is the mean gradient times the whole change, as if the layer's "
         "activations moved evenly along the path. Multiply each step's gradient with that step's increment."),
        ((gradients[:-1] * moved).sum((0, 1)), "Close, but each step uses the gradient at its start only, so the "
         "error shrinks with 1/steps. Take the mean of the gradients at the two ends of each step (1/steps^2)."),
        ((gradients[1:] * moved).sum((0, 1)), "Close, but each step uses the gradient at its end only, so the error "
         "shrinks with 1/steps. Take the mean of the gradients at the two ends of each step (1/steps^2)."),
        ((mean * layers[1:]).sum((0, 1)) / steps, "You multiplied gradients with activations. Multiply them with the "
         "increments of the activations from one step to the next."),
        ((mean * moved).sum((0, 1)) / steps, "The increments are as small as the steps already: do not divide by "
         "steps once more."),
        (-(mean * moved).sum((0, 1)), "The sign is the wrong way round: the path goes from start to end."),
    ]  # fmt: skip
    if way.shape[0] > 1:
        found.append(((mean * moved).sum(0).mean(0), "You averaged over tokens; sum over them, or it does not add up."))
    return found


# --- 4 prune and retrain


def check_prune_mlp_(prune_mlp_: Callable) -> None:
    """Weights changed in place so that some MLP neurons have no effect."""
    name = "prune_mlp_"
    tagger, corpus = _toy()
    bridge, batch = tagger.bridge, next(tagger.encode(corpus).batches())
    chosen = {0: [2, 9], 1: _of(toy.PLANTED)[1]}
    site = rl.site_of(bridge, "mlp_post")
    hooks = _hooks(bridge)
    with torch.no_grad():
        for i in chosen:
            bridge.blocks[i].mlp.out.bias.fill_(0.1)  # the toy's are 0, so that one would not see them go
    before = {k: v.clone() for k, v in tagger.weights().items()}
    flags = {k: (id(p), p.requires_grad) for k, p in tagger.named_parameters()}
    with torch.no_grad():
        with rl.ablated(tagger, rl.Neurons.of(site, [(i, k) for i, ks in chosen.items() for k in ks])):
            right = tagger(batch.ids, batch.mask)
        fresh = tagger(batch.ids, batch.mask)
    out = "trunk.layers.{}.mlp.fc_out.weight"
    try:
        _called(name, prune_mlp_, tagger, {i: list(ks) for i, ks in chosen.items()})
    except IndexError as error:
        raise Wrong(
            f"{name}: {error}. The matrix `blocks[i].mlp.out.weight` is [d_model, d_mlp], here [32, 64]: a hidden unit "
            "is a column of it, weight[:, k]."
        ) from None
    except RuntimeError as error:
        if "leaf Variable" in str(error) or "in-place operation" in str(error):
            raise Wrong(
                f"{name}: torch does not change a weight in place while it records gradients; do it in a block of "
                "`with torch.no_grad():`."
            ) from None
        raise
    if _hooks(bridge) != hooks:
        bridge.reset_hooks()
        raise Wrong(f"{name}: you left a hook behind. Here the weights themselves are cut, without hooks.")
    parameters = dict(tagger.named_parameters())
    if any(id(parameters.get(k)) != same for k, (same, _) in flags.items()):
        raise Wrong(
            f"{name}: a parameter was replaced by a new one, which the bridge and an optimiser made before know "
            "nothing of. Change its values in place: weight[:, k] = 0 in a block of `with torch.no_grad():`."
        )
    if any(parameters[k].requires_grad != flag for k, (_, flag) in flags.items()):
        raise Wrong(f"{name}: a weight no longer requires a gradient; here neurons are free to grow back.")
    after = tagger.weights()
    changed = {k for k, v in after.items() if not torch.equal(v, before[k])}
    wanted = {out.format(i) for i in chosen}
    if not changed:
        raise Wrong(f"{name}: no weight changed. A clone, or a processed copy such as W_out, is not the weight itself.")
    if any("fc_in" in k for k in changed):
        raise Wrong(
            f"{name}: you cut the neuron's input weights. Its bias still moves it, so it is a constant, not 0; and "
            "what carries it on is the output matrix."
        )
    if any(k.endswith("fc_out.bias") for k in changed):
        raise Wrong(f"{name}: the output bias is the whole MLP's, not the neurons': leave it.")
    if wanted - changed or changed - wanted:
        raise Wrong(f"{name}: expected changes in {sorted(wanted)}, found them in {sorted(changed)}.")
    for i, ks in chosen.items():
        weight, zero = after[out.format(i)], torch.zeros(len(ks))
        rows = [k for k in ks if k < weight.shape[0]]
        if not weight.any():
            raise Wrong(f"{name}: the whole output matrix of layer {i} is 0; only columns {ks} should be.")
        if (weight[rows] == 0).all() and not torch.equal(weight[:, ks].abs().sum(0), zero):
            raise Wrong(
                f"{name}: rows {rows} of layer {i} are 0. Rows are coordinates of the residual stream; a hidden unit "
                "is a column, weight[:, k]."
            )
    with torch.no_grad():
        found = tagger(batch.ids, batch.mask)
    if not torch.allclose(found, right, atol=1e-5):
        far = (found - right).abs().max()
        same = " They are those of the model before." if torch.allclose(found, fresh, atol=1e-5) else ""
        raise Wrong(f"{name}: the logits differ from those with the neurons ablated by hooks, by {far:.2g}.{same}")
    _holds("prune_mlp_: cut in the weights, the model computes what it computes with the neurons ablated by hooks.")


def check_train_epoch_(train_epoch_: Callable) -> None:
    """One epoch of training by hand, with some neurons held at 0 or none."""
    name = "train_epoch_"
    chosen = {1: _of(toy.PLANTED)[1]}
    for held in (None, chosen):
        tagger, corpus = _toy(training=True)
        encoded = tagger.encode(corpus)
        batches = [encoded.batch(pieces) for pieces in encoded.shuffled(batch_size=7, seed=0, epoch=0)][:3]
        column = tagger.trunk.layers[1].mlp.fc_out.weight
        with torch.no_grad():
            column[:, chosen[1]] = 0
        start = {k: v.clone() for k, v in tagger.weights().items()}
        wanted, nats = _trained(tagger, batches, start, held, "right")
        tagger.load_weights(start)
        optimizer = torch.optim.SGD(tagger.parameters(), lr=_RATE)
        modes: list[bool] = []
        zero: list[bool] = []
        spies = [
            tagger.dropout.register_forward_hook(lambda module, *_, seen=modes: seen.append(module.training)),
            tagger.dropout.register_forward_hook(
                lambda *_, seen=zero, w=column: seen.append(not w[:, chosen[1]].any())
            ),
        ]
        try:
            loss = _called(name, train_epoch_, tagger, iter(batches), optimizer, held=held)
        finally:
            for spy in spies:
                spy.remove()
        if not modes:
            raise Wrong(f"{name}: no batch went through the model. Call tagger.losses(batch) for each of them.")
        if len(modes) != len(batches):
            raise Wrong(f"{name}: {len(batches)} batches were given, {len(modes)} went through the model.")
        if not all(modes):
            raise Wrong(f"{name}: the model was in eval mode, so without dropout; call tagger.train() before the loop.")
        after = {k: v.clone() for k, v in tagger.weights().items()}
        if not _equal(after, wanted, start):
            for how, says in _MISTAKES.items():
                if _equal(after, _trained(tagger, batches, start, held, how)[0], start):
                    raise Wrong(f"{name}: {says}")
            if held and _equal(after, _trained(tagger, batches, start, held, "free")[0], start):
                raise Wrong(
                    f"{name}: held={held}, but these neurons grew back: after every optimizer.step() set their columns "
                    "of the output matrix to 0 again."
                )
            if held and not all(zero):
                raise Wrong(
                    f"{name}: at the end the held neurons are 0, but between the steps they were not, so the model "
                    "trained with them. Set them to 0 after every step, not once at the end."
                )
            raise Wrong(f"{name}: the weights are not those that one step per batch (loss, backward, step) leads to.")
        if tagger.training:
            raise Wrong(f"{name}: the model is still in training mode; call tagger.eval() at the end.")
        if isinstance(loss, Tensor) and loss.numel() == 1:
            loss = loss.item()
        if not isinstance(loss, float | int):
            raise Wrong(f"{name} must return the loss as a number, it returned {_kind(loss)}.")
        right = sum(float(n.sum()) for n in nats) / sum(len(n) for n in nats)
        means = [n.mean().item() for n in nats]
        for value, says in (
            (sum(means) / len(means), "That is the mean of the batches' means, in which a sub-word of a small batch "
             "weighs more. Sum all nats, then divide by the number of sub-words."),
            (means[-1], "That is the loss of the last batch alone."),
            (sum(float(n.sum()) for n in nats), "That is the sum; divide it by the number of sub-words."),
            (sum(means), "That is the sum of the batches' means. Sum all nats, divide by the number of sub-words."),
        ):  # fmt: skip
            if math.isclose(loss, value, rel_tol=1e-5) and not math.isclose(right, value, rel_tol=1e-5):
                raise Wrong(f"{name}: the loss should be {right:.4f} nats per sub-word, yours is {loss:.4f}. {says}")
        if not math.isclose(loss, right, rel_tol=1e-4):
            raise Wrong(f"{name}: the loss should be {right:.4f} nats per sub-word, yours is {loss:.4f}.")
    _holds("train_epoch_: one step per batch, the loss in nats per sub-word, and held neurons stay at 0 throughout.")


_RATE = 0.01
_MISTAKES = {
    "no zero_grad": "the gradients of earlier batches are still in each step: call optimizer.zero_grad() for every "
    "batch.",
    "no step": "the weights did not move: call optimizer.step() for every batch.",
    "sum": "the steps follow the sum of the losses, so long batches take larger steps: take the mean over the batch's "
    "sub-words before backward().",
    "one step": "there was one step for the whole epoch: zero_grad, backward and step belong inside the loop.",
}


def _trained(
    tagger: Any, batches: Sequence[Any], start: dict[str, Tensor], held: dict[int, list[int]] | None, how: str
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Weights after an epoch done right, or with one mistake in it, and the nats of each batch; without optimiser."""
    tagger.load_weights(start)
    parameters, nats = list(tagger.parameters()), []
    total: list[Tensor] | None = None
    for batch in batches:
        tagger.train()
        loss = tagger.losses(batch)
        said = loss.sum() if how == "sum" else loss.mean()
        slopes = torch.autograd.grad(said, parameters, allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, slopes, strict=True)]
        nats.append(loss.detach())
        kept = how in ("no zero_grad", "one step") and total is not None
        total = [a + b for a, b in zip(total, gradients, strict=True)] if kept and total else gradients
        if how not in ("no step", "one step"):
            _step(tagger, parameters, total, None if how == "free" else held)
    if how == "one step" and total:
        _step(tagger, parameters, total, held)
    tagger.eval()
    return {k: v.clone() for k, v in tagger.weights().items()}, nats


def _step(tagger: Any, parameters: Sequence[Tensor], gradients: Sequence[Tensor], held: dict | None) -> None:
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= _RATE * gradient
        for layer, neurons in (held or {}).items():
            tagger.trunk.layers[layer].mlp.fc_out.weight[:, neurons] = 0


def _equal(one: dict[str, Tensor], two: dict[str, Tensor], start: dict[str, Tensor]) -> bool:
    """Whether training took the weights to the same place, up to rounding."""
    a, b = (torch.cat([(weights[k] - start[k]).flatten() for k in start]) for weights in (one, two))
    return bool((a - b).norm() <= 1e-3 * b.norm())


def check_graft(graft: Callable) -> None:
    """Two sets of weights to one that has a single layer from the second."""
    name = "graft"
    draw = _generator(8)
    names = ["trunk.tok_embed.weight", "trunk.layers.1.w", "trunk.layers.1.b", "trunk.layers.10.w", "head.weight"]
    cut, retrained = ({k: torch.randn(3, generator=draw) for k in names} for _ in range(2))
    for layer in (1, 10):
        given = [{k: v.clone() for k, v in each.items()} for each in (cut, retrained)]
        found = _called(name, graft, *given, layer)
        if any(not torch.equal(v, was[k]) for each, was in zip(given, (cut, retrained), strict=True)
               for k, v in each.items()):  # fmt: skip
            raise Wrong(f"{name}: a model that was passed in has changed. Make a new dictionary, of copies.")
        if not isinstance(found, dict) or set(found) != set(names):
            raise Wrong(f"{name} must return a weight for each name of `cut`, it returned {_kind(found)}.")
        part = {k for k in names if k.startswith(f"trunk.layers.{layer}.")}
        taken = {k for k in names if torch.equal(found[k], retrained[k])}
        kept = {k for k in names if torch.equal(found[k], cut[k])}
        if taken | kept != set(names):
            strange = next(k for k in names if k not in taken | kept)
            raise Wrong(f"{name}: {strange} is neither as cut nor as retrained; take each weight whole from one.")
        if taken != part:
            if taken == set(names) - part:
                raise Wrong(
                    f"{name}: that is the retrained model with this layer as it was cut: it asks whether the layer is "
                    "needed. Wanted is the cut model with this layer as retrained: is it enough?"
                )
            if layer == 1 and "trunk.layers.10.w" in taken:
                raise Wrong(
                    f"{name}: for layer 1 you took layer 10 as well: both begin with 'trunk.layers.1'. Compare with "
                    "the dot behind the number, 'trunk.layers.1.'."
                )
            if not taken:
                raise Wrong(f"{name}: nothing was taken from the retrained model.")
            raise Wrong(f"{name}: for layer {layer} expected {sorted(part)} as retrained, found {sorted(taken)}.")
        if any(found[k].data_ptr() in {v.data_ptr() for each in given for v in each.values()} for k in names):
            raise Wrong(f"{name}: what you return shares its memory with what was passed in; clone() the weights.")
    _holds("graft: the cut model with one layer as retrained, all else as it was cut.")


# --- 5 the matched control


def check_layer_ranks(layer_ranks: Callable) -> None:
    """Scores to the mean rank saliency of each layer, among some neurons."""
    name = "layer_ranks"
    # By hand: among 9, 7, 8 and 2 the places are 0, 2, 1 and 3, so 1 - place / 3 is 1, 1/3, 2/3, 0.
    hand = _t([[5, 9, 1], [7, 2, 8]]), torch.tensor([[False, True, False], [True, True, True]])
    draw = _generator(5)
    among = torch.rand(4, 12, generator=draw) < 0.5
    among[2] = False  # a layer without any of them
    for score, mask in (hand, (torch.rand(4, 12, generator=draw), among)):
        found = _called(name, layer_ranks, score.clone(), mask.clone())
        inside = sorted((x for x, m in zip(score.flatten().tolist(), mask.flatten().tolist(), strict=True) if m))
        everyone = sorted(score.flatten().tolist())

        def mean_of(
            place: Callable[[int, float], float], mask: Tensor = mask, score: Tensor = score, fill: float | None = None
        ) -> Tensor:
            rows = []
            for i, (row, m) in enumerate(zip(score.tolist(), mask.tolist(), strict=True)):
                taken = [place(i, x) if keep else fill for x, keep in zip(row, m, strict=True)]
                some = [x for x in taken if x is not None]
                rows.append(sum(some) / len(some) if some else math.nan)
            return torch.tensor(rows)

        by_layer = [
            sorted(x for x, m in zip(row, ms, strict=True) if m)
            for row, ms in zip(score.tolist(), mask.tolist(), strict=True)
        ]
        right = mean_of(lambda _, x, xs=inside: xs.index(x) / (len(xs) - 1))
        _same(
            name, found, right, "layer",
            [
                (mean_of(lambda _, x, xs=inside: 1 - xs.index(x) / (len(xs) - 1)), "Upside down: the most salient "
                 "neuron has the rank saliency 1, the least 0."),
                (mean_of(lambda _, x, xs=everyone: xs.index(x) / (len(xs) - 1)), "You ranked all neurons and then "
                 "chose. Rank the chosen ones among themselves: places of those that are gone must not count."),
                (mean_of(lambda i, x, xs=by_layer: xs[i].index(x) / max(len(xs[i]) - 1, 1)), "You ranked each layer by "
                 "itself, so all layers look alike. Rank the neurons of all layers together."),
                (mean_of(lambda _, x, xs=inside: xs.index(x) / (len(xs) - 1), fill=0.0), "Neurons outside of `among` "
                 "count as 0 in your means; leave them out."),
                (mean_of(lambda _, x, xs=inside: xs.index(x) / len(xs)), "The most salient neuron should have 1: "
                 "divide places by n - 1, not by n."),
                (mean_of(lambda _, x: x), "Those are means of the scores; wanted are means of ranks, 1 the most "
                 "salient and 0 the least."),
                (right.nan_to_num(0), "A layer without any of the neurons has no mean: NaN, not 0."),
            ], nan=True,
        )  # fmt: skip
    _holds("layer_ranks: mean rank saliency of each layer, ranked among the neurons that you name.")


def check_moved(moved: Callable) -> None:
    """Scores before and after to the change of each layer's mean rank, on the same neurons."""
    name = "moved"
    draw = _generator(6)
    before = torch.rand(4, 15, generator=draw) + 0.15 * torch.arange(4.0)[:, None]
    survivors = before < before.median()
    for after in (before.clone(), torch.rand(4, 15, generator=draw)):
        found = _called(name, moved, before.clone(), after.clone(), survivors.clone())
        everyone = torch.ones_like(survivors)
        then, now = _ranks(before, survivors), _ranks(after, survivors)
        trap = now - _ranks(before, everyone)
        _same(
            name, found, now - then, "layer",
            [
                (trap, "You compared all base neurons with survivors. Pruning takes the most salient neurons, most of "
                 "them from late layers, so this moves although nothing moved: here the scores did not change at all. "
                 "Take the survivors on both sides."
                 if torch.equal(before, after)
                 else "You compared all base neurons with survivors. Take the survivors on both sides."),
                (_ranks(after, everyone) - _ranks(before, everyone), "You took all neurons on both sides, pruned ones "
                 "included. Take the survivors on both sides."),
                (then - now, "The sign is the wrong way round: later minus before, so that a layer that gained is "
                 "positive."),
                (now, "That is where the survivors are later; subtract where they were before."),
            ],
        )  # fmt: skip
    _holds("moved: the same survivors on both sides, so scores that do not change do not move.")


def check_random_like(random_like: Callable) -> None:
    """A set of neurons to a random one, with as many in every layer."""
    name = "random_like"
    chosen = torch.zeros(4, 20, dtype=torch.bool)
    chosen[0, :2] = chosen[1, 3:8] = chosen[3, :9] = True
    state = torch.get_rng_state()
    drawn = []
    for seed in range(30):
        found = _called(name, random_like, chosen.clone(), seed)
        if not torch.equal(torch.get_rng_state(), state):
            torch.set_rng_state(state)
            raise Wrong(
                f"{name}: the global random generator moved, so whatever is drawn after it depends on this call. Use "
                "one of your own: torch.Generator().manual_seed(seed)."
            )
        if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape != chosen.shape:
            raise Wrong(f"{name} must return a mask like `chosen` (bool, {tuple(chosen.shape)}), got {_kind(found)}.")
        drawn.append(found)
    again = _called(name, random_like, chosen.clone(), 0)
    if not torch.equal(again, drawn[0]):
        raise Wrong(f"{name}: seed 0 gave two different sets: draw with the seed, torch.Generator().manual_seed(seed).")
    if all(torch.equal(d, drawn[0]) for d in drawn):
        raise Wrong(
            f"{name}: every seed gives the same set. The 'random' arm of the paper's released code was the first N "
            "neurons in order, too: a control must be drawn."
        )
    for found in drawn:
        per_layer, wanted = found.sum(1).tolist(), chosen.sum(1).tolist()
        if per_layer != wanted:
            more = (
                "You drew from all layers together; a control that takes other layers answers another question. "
                if sum(per_layer) == sum(wanted)
                else "Draw without replacement. "
            )
            raise Wrong(f"{name}: as many in every layer: wanted {wanted}, got {per_layer}. {more}".rstrip())
    share = torch.stack(drawn).float().mean(0)
    if not (torch.stack(drawn) & chosen).any():
        raise Wrong(
            f"{name}: never a neuron of `chosen` in 30 draws. Draw from all neurons of the layer, or the control is "
            "what the score ranks low, which is not random."
        )
    if any(len(set(row.tolist())) == 1 and 0 < row[0] < 1 for row in share) or (share[1] == 0).any():
        raise Wrong(f"{name}: some neurons are never drawn; in each layer every neuron must have the same chance.")
    _holds("random_like: as many in every layer, every neuron of a layer equally likely, decided by the seed alone.")


def check_p_value(p_value: Callable) -> None:
    """A number and those of random sets to the chance of one as far from 0."""
    name = "p_value"
    draw = _generator(7)
    spread = torch.randn(99, generator=draw)
    for ours, control in ((0.9, _t([0.1, -0.2, 0.0, 0.3])), (-1.5, spread), (1.2, spread), (0.0, spread)):
        found = _number(name, _called(name, p_value, ours, control.clone()))
        n, values = len(control), control.tolist()
        two = sum(abs(c) >= abs(ours) for c in values)
        right = (1 + two) / (1 + n)
        for value, says in (
            (right, ""),
            (two / n, "The observed set is one of the possible draws too: (1 + how many) / (1 + draws). Otherwise 4 "
             "draws are enough for p = 0."),
            ((1 + sum(c >= ours for c in values)) / (1 + n), "That is one-sided: a move the other way, as far, would "
             "have counted as well. Compare sizes."),
            ((1 + sum(c <= ours for c in values)) / (1 + n), "That is one-sided, and towards the low end. Compare "
             "sizes, |control| >= |ours|."),
            ((1 + n - two) / (1 + n), "The wrong way round: count the draws that are at least as far from 0 as ours."),
            (1 - right, "The wrong way round: count the draws that are at least as far from 0 as ours."),
        ):  # fmt: skip
            if math.isclose(found, value, abs_tol=1e-6):
                if says:
                    raise Wrong(
                        f"{name}: for {ours} and {n} draws it should be {right:.3f}, yours is {found:.3f}. {says}"
                    )
                break
        else:
            raise Wrong(f"{name}: for {ours} and {n} draws it should be {right:.3f}, yours is {found:.3f}.")
    _holds("p_value: with 4 draws it is never below 1/5, however large the effect.")


def _ranks(score: Tensor, among: Tensor) -> Tensor:
    inside = sorted(score[among].tolist())
    return torch.stack(
        [
            torch.tensor([inside.index(x) / (len(inside) - 1) for x in row[mask].tolist()]).mean()
            for row, mask in zip(score, among, strict=True)
        ]
    )


# --- 6 the twin


def check_recovered(recovered: Callable) -> None:
    """Five scores to the share that came back beyond what the twin was taught."""
    name = "recovered"
    draw = torch.rand(20, 5, generator=_generator(8), dtype=torch.float64).tolist()
    drawn = [(1 + a, b, c, d, e) for a, b, c, d, e in draw]
    for five in ((0.9, 0.1, 0.7, 0.1, 0.3), (0.9, 0.1, 0.9, 0.0, 0.8), *drawn):
        found = _number(name, _called(name, recovered, *five))
        whole, removed, attacked, twin, taught = five
        back, gap = attacked - removed, whole - removed
        right = (back - (taught - twin)) / gap
        if math.isclose(found, right, abs_tol=1e-6):
            continue
        for value, says in (
            (back / gap, "That leaves the twin out: what the attack teaches a model that never knew counts as back."),
            ((attacked - taught) / gap, "Take what the twin *gains*, not where it ends: it may have guessed well "
             "before the attack, too."),
            (back - (taught - twin), "That is a gain, not a share: divide by what the removal took."),
            ((back - (taught - twin)) / whole, "A share of what the removal took, whole - removed, not of the whole "
             "score."),
            ((back - (taught - twin)) / (whole - twin), "A share of what the removal took from this model: the gap to "
             "the twin is another."),
            (-right, "The wrong way round: what came back is positive."),
        ):  # fmt: skip
            if math.isclose(found, value, abs_tol=1e-6):
                raise Wrong(f"{name}: for {_rounded(five)} it should be {right:.3f}, yours is {found:.3f}. {says}")
        raise Wrong(f"{name}: for {_rounded(five)} it should be {right:.3f}, yours is {found:.3f}.")
    for five in ((0.5, 0.5, 0.9, 0.1, 0.2), (0.5, 0.6, 0.9, 0.1, 0.2)):
        try:
            found = _number(name, _called(name, recovered, *five))
        except ZeroDivisionError:
            found = 0.0
        if not math.isnan(found):
            raise Wrong(
                f"{name}: for {_rounded(five)} the removal took nothing, so there is no share of it; give float('nan')."
            )
    _holds("recovered: what the twin gains as well was taught, and did not come back.")


def _number(name: str, found: Any) -> float:
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    if not isinstance(found, float | int):
        raise Wrong(f"{name} must return a number, it returned {_kind(found)}.")
    return found


def _rounded(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


# --- what the checks share


def check_all(namespace: dict[str, Any]) -> None:
    """Every check on the functions of a notebook (`check_all(globals())`): what holds, and what does not yet."""
    for name, check in CHECKS.items():
        try:
            check(namespace.get(name, functools.partial(_missing, name)))
        except Wrong as error:
            print(f"✘ {error}")


def _missing(name: str, *_: Any, **__: Any) -> None:
    raise NotImplementedError(name)


@functools.cache
def _toy_parts() -> tuple[Any, dict[str, Tensor], rl.Corpus]:
    made = toy.load(sentences=60, seed=3)
    return made.tagger, {k: v.clone() for k, v in made.tagger.weights().items()}, made.corpus


def _toy(*, training: bool = False) -> tuple[Any, rl.Corpus]:
    """A planted model of the checks' own, as new, and its text; without dropout where its steps are compared."""
    tagger, weights, corpus = _toy_parts()
    if any(not torch.equal(v, weights[k]) for k, v in tagger.weights().items()):
        tagger.load_weights(weights)
    for parameter in tagger.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
    tagger.dropout.p = 0.0 if training else 0.1
    return tagger.eval(), corpus


def _of(members: Sequence[tuple[str, int]]) -> dict[int, list[int]]:
    """Planted neurons as layer number to indices."""
    grouped = itertools.groupby(members, key=lambda neuron: neuron[0])
    return {int(layer): [index for _, index in some] for layer, some in grouped}


def _hooks(bridge: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bridge.hook_dict.values())


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _t(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _called(name: str, function: Callable, *arguments: Any, **keywords: Any) -> Any:
    """What the learner's function gives, or that it is not there yet."""
    try:
        return function(*arguments, **keywords)
    except NotImplementedError:
        raise Wrong(
            f"{name} is not written yet: put your code in place of `raise NotImplementedError`, and run both cells."
        ) from None
    except Exception as error:
        note = f"{name} raised this on the check's input."
        error.add_note(note)
        mine = inspect.getsourcefile(inspect.unwrap(function)) if inspect.isfunction(function) else None
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == mine]
        said = [f"✘ {note}"]
        said += [f"    line {frame.lineno} of {frame.name}:  {frame.line or ''}".rstrip() for frame in frames]
        said.append(f"{type(error).__name__}: {error}")
        # Jupyter shows this in place of a traceback through code that is not the learner's.
        error._render_traceback_ = lambda: said  # pyright: ignore[reportAttributeAccessIssue]
        raise


def _kind(found: Any) -> str:
    if found is None:
        return "None (is there a `return`?)"
    if isinstance(found, Tensor):
        return f"a {str(found.dtype).removeprefix('torch.')} tensor of shape {tuple(found.shape)}"
    return f"{type(found).__name__} {found!r}"[:80]


def _same(
    name: str,
    found: Any,
    right: Tensor,
    axes: str,
    mistakes: Sequence[tuple[Tensor, str]] = (),
    *,
    tolerance: float = 1e-4,
    nan: bool = False,
) -> None:
    """Compare a learner's tensor with the right one, and with what typical mistakes lead to."""
    if not isinstance(found, Tensor):
        raise Wrong(f"{name}: expected a tensor [{axes}], got {_kind(found)}.")
    found = found.detach()

    def close(other: Tensor, equal_nan: bool = nan) -> bool:
        return found.shape == other.shape and torch.allclose(
            found.double(), other.double(), rtol=tolerance, atol=tolerance, equal_nan=equal_nan
        )

    if close(right):
        if found.is_floating_point() != right.is_floating_point():
            kinds = {True: "floating-point numbers (float32)", False: "whole numbers (int64)"}
            raise Wrong(
                f"{name}: the values are right, but they are {str(found.dtype).removeprefix('torch.')}; expected "
                f"{kinds[right.is_floating_point()]}, so that they can be used as such."
            )
        return
    for wrong, says in mistakes:
        if close(wrong, equal_nan=True):
            raise Wrong(f"{name}: {says}")
    if found.shape != right.shape:
        raise Wrong(
            f"{name}: wrong shape: got {tuple(found.shape)}, expected [{axes}] = {tuple(right.shape)}."
            + (" The axes are in another order." if sorted(found.shape) == sorted(right.shape) else "")
        )
    off = (found.double() - right.double()).abs().nan_to_num(math.inf).where(~(found.isnan() & right.isnan()), 0.0)
    at = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
    raise Wrong(
        f"{name}: wrong values; at [{axes}] = {list(at)} expected {float(right[at]):.4g}, got {float(found[at]):.4g}."
    )


def _holds(what: str) -> None:
    print(f"✔ {what}")


CHECKS: dict[str, Callable[[Callable], None]] = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_") and name != "check_all"
}
"""Every check, by the name of the function that it takes; in the order of the workshop."""
