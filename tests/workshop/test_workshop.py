"""The workshop: its notebooks follow from the master, its checks pass on the solutions and name what is wrong else."""

import ast
import importlib
import json
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import torch
from torch import Tensor

import relearn_lens as rl

HERE = Path(__file__).resolve().parents[2] / "notebooks" / "workshop"


def module(name: str) -> ModuleType:
    """A module of the workshop's folder."""
    sys.path.insert(0, str(HERE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(HERE))


build, checks = module("build"), module("checks")
CELLS = build.read(build.MASTER.read_text(encoding="utf-8"))
NOTEBOOKS = ("exercises", "solutions")


def code_of(name: str, cells: str = "") -> list[str]:
    """The code cells of a notebook whose id ends so."""
    book = json.loads((HERE / f"{name}.ipynb").read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code" and c["id"].endswith(cells)]


def functions(name: str) -> dict[str, Any]:
    """The functions of a notebook's exercises."""
    space: dict[str, Any] = {}
    for source in (code_of(name, "setup")[0], *code_of(name, "-code")):
        exec(source, space)
    return {name: space[name] for name in checks.CHECKS}


# --- the notebooks and the master


def test_the_notebooks_and_the_timetable_are_what_the_master_makes():
    assert build.main(["--check"]) == 0, "run `python notebooks/workshop/build.py`"


def test_a_stale_notebook_is_seen_and_made_again(tmp_path, monkeypatch, capsys):
    for path in build.made():
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(build, "HERE", tmp_path)
    monkeypatch.setattr(build, "TEACHER", tmp_path / "TEACHER.md")
    assert build.main(["--check"]) == 0
    stale = tmp_path / "exercises.ipynb"
    stale.write_text(stale.read_text(encoding="utf-8").replace("Welcome", "Hello").replace("half", "a whole"))
    (tmp_path / "TEACHER.md").write_text((tmp_path / "TEACHER.md").read_text(encoding="utf-8").replace("| 0:10 |", "|"))
    assert build.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "exercises.ipynb is not what master.py makes: run `python notebooks/workshop/build.py`" in said
    assert "TEACHER.md is not" in said
    assert "solutions.ipynb" not in said
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
    assert build.main(["--what"]) == 2


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_valid_and_has_no_outputs(name):
    path = HERE / f"{name}.ipynb"
    nbformat.validate(nbformat.read(path, 4))
    assert path.read_text(encoding="utf-8").endswith("}\n")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in cells if c["cell_type"] == "code")
    ids = [c["id"] for c in cells]
    assert len(set(ids)) == len(ids)
    assert [c["id"] for c in cells if "first-picture" in c["metadata"].get("tags", [])] == ["first-picture"]


def test_exercises_have_typed_stubs_with_the_solutions_folded_below():
    stubs, solved = ([ast.parse(s).body for s in code_of(name, "-code")] for name in NOTEBOOKS)
    assert len(stubs) == len(solved) == len(checks.CHECKS) == 15
    book = json.loads((HERE / "exercises.ipynb").read_text(encoding="utf-8"))
    folded = "".join("".join(c["source"]) for c in book["cells"] if c["id"].endswith("-help"))
    for (stub,), (solution,) in zip(stubs, solved, strict=True):
        assert isinstance(stub, ast.FunctionDef)
        assert isinstance(solution, ast.FunctionDef)
        assert ast.unparse(stub.body[-1]) == "raise NotImplementedError"
        assert len(stub.body) == 2
        assert ast.unparse(stub.args) == ast.unparse(solution.args)
        assert all(arg.annotation for arg in (*stub.args.args, *stub.args.kwonlyargs))
        assert stub.returns
        assert ast.get_docstring(stub)
        assert f"def {stub.name}(" in folded
        assert not [n for n in ast.walk(solution) if isinstance(n, ast.Raise)]
    assert folded.count("<summary>Hint 1</summary>") == folded.count("<summary>Solution</summary>") == 15
    text = (HERE / "exercises.ipynb").read_text(encoding="utf-8")
    assert text.count("What do you notice?**") == text.count("<summary>Answer</summary>") == 9


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("# %% [riddle] id=a\n", r"master.py line 1: unknown cell '\[riddle\] id=a'; kinds: markdown, code, exercise"),
        ("# %% a\n", "unknown cell 'a'"),
        ("# %% [code] id=a level=2\n", "a code cell takes id, tags"),
        ("x\n# %% [code] tags=a\n", "master.py line 2: a code cell takes id, tags"),
        ("# %% [hint] id=a\n# b\n", "a hint that follows no exercise"),
        ("# %% [exercise] id=a title=b level=1 minutes=5\n# c\n", "exercise 'a' lacks a solution or a check"),
        ("# %% [markdown] id=a\nx = 1\n", "line 1: a markdown cell holds comment lines, found 'x = 1'"),
        ("# %% [code] id=a\n# %% [code] id=a\n", "two cells are called a"),
    ],
)
def test_build_says_what_is_wrong_with_a_master(source, says):
    with pytest.raises(ValueError, match=says):
        build.notebook(build.read(source), solved=True)


@pytest.mark.parametrize("code", ["x = 1\n", "def f():\n    return 1\n"])
def test_build_stubs_functions_with_docstrings_alone(code):
    with pytest.raises(ValueError, match="a solution holds functions with docstrings, found '"):
        build.stub(code)


def test_build_refuses_a_teachers_page_without_the_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "TEACHER", tmp_path / "TEACHER.md")
    build.TEACHER.write_text("no table", encoding="utf-8")
    with pytest.raises(ValueError, match=r"TEACHER.md must hold the lines '<!-- timetable"):
        build.made()


def test_the_timetable_adds_up():
    page = build.TEACHER.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d):(\d\d) \| (\**)(\d+)\** \| (.+?) \|", page, flags=re.MULTILINE)
    *parts, (hours, minutes, bold, total, _) = rows
    assert bold
    assert sum(int(m) for _, _, _, m, _ in parts) == int(total) == sum(c.minutes for c in CELLS)
    assert int(hours) * 60 + int(minutes) == int(total)
    assert [int(h) * 60 + int(m) for h, m, *_ in rows] == [sum(int(r[3]) for r in parts[:i]) for i in range(len(rows))]
    assert {title for *_, title in parts} >= {c.given["title"] for c in CELLS if c.kind == "exercise"}
    assert 180 <= int(total) <= 240  # half a day
    assert f"{int(total) / 60:.1f} hours" in page


# --- the checks


def test_checks_refuse_every_stub(capsys):
    stubs = functions("exercises")
    for name, check in checks.CHECKS.items():
        with pytest.raises(checks.Wrong, match=f"{name} is not written yet: put your code in place of"):
            check(stubs[name])
    assert "✔" not in capsys.readouterr().out
    checks.check_all(stubs)
    checks.check_all({})
    assert capsys.readouterr().out.count("✘") == 30


def test_a_wrong_answer_is_shown_without_a_traceback():
    assert checks.Wrong("too long")._render_traceback_() == ["✘ too long"]


def test_other_errors_of_a_learner_come_through_with_a_note():
    with pytest.raises(ZeroDivisionError) as caught:
        checks.check_probeless(lambda *_: 1 / 0)
    assert "probeless raised this on the check's input" in caught.value.__notes__[0]


def test_an_error_shows_the_learners_own_lines_alone():
    def helper():
        return {}["nothing"]

    def probeless(count, mean, concept):
        return helper()

    with pytest.raises(KeyError) as caught:
        checks.check_probeless(probeless)
    shown: list[str] = caught.value._render_traceback_()  # pyright: ignore[reportAttributeAccessIssue]
    assert shown[0] == "✘ probeless raised this on the check's input."
    lines = [line.split(":  ") for line in shown[1:-1]]
    assert [where.split(" of ")[1] for where, _ in lines] == ["probeless", "helper"]
    assert [code for _, code in lines] == ["return helper()", 'return {}["nothing"]']
    assert shown[-1] == "KeyError: 'nothing'"


# --- wrong answers. Each is what somebody writes.


def means(batches, n_classes, *, words=True, first=False, less=0, per_batch=False, restart=False, keep=False, **how):
    """Class means with a mistake or two."""
    count, total, parts = torch.zeros(n_classes, dtype=torch.int64), torch.zeros(()), []
    kept = list(batches) if keep else batches
    for batch in kept:
        if restart:
            count, total = torch.zeros_like(count), torch.zeros(())
        x, label = batch.activations, batch.label[batch.word_of]
        if words:
            groups = [x[batch.word_of == w] for w in range(len(batch.label))]
            x, label = torch.stack([g[0] if first else g.mean(0) for g in groups]), batch.label
        here = torch.zeros(n_classes, *x.shape[1:]).index_add(0, label, x)
        n = torch.bincount(label, minlength=n_classes)
        parts.append((here / n.clamp(min=1)[:, None, None], n > 0))
        total, count = total + here, count + n
    if per_batch:
        seen = torch.stack([some for _, some in parts]).sum(0).clamp(min=1)
        return count, torch.stack([mean for mean, _ in parts]).sum(0) / seen[:, None, None]
    if how.get("nan"):
        return count, total / count[:, None, None]
    return count, total if how.get("sums") else total / (count - less).clamp(min=1)[:, None, None]


def others(count, concept):
    keep = count > 0
    keep[concept] = False
    return keep


def score(count, mean, concept, *, of=torch.abs, by=torch.sum, empty=False):
    away = of(mean[concept] - mean[others(count.clamp(min=int(empty)), concept)])
    return by(away, dim=0)


def pooled(count, mean, concept):
    keep = others(count, concept)
    weight = count[keep].float()
    return (mean[concept] - (mean[keep] * weight[:, None, None]).sum(0) / weight.sum()).abs()


def weighted(count, mean, concept):
    rest = others(count, concept)
    away = (mean[concept] - mean[rest]).abs()
    return (count[rest, None, None] * away).sum(0) / count[rest].sum()


def planted_into(host, guest, layer, *, dot=".", copy=True):
    part = f"trunk.layers.{layer}{dot}"
    mixed = {name: (guest if name.startswith(part) else host)[name] for name in host}
    return {name: value.clone() for name, value in mixed.items()} if copy else mixed


def order(score, *, down=True):
    return score.flatten().argsort(descending=down)


def in_place(x, hook, *, neurons, back=True):
    x[..., neurons] = 0
    return x if back else None


def masked(x, *, axis=-1, neurons, invert=False, first=False):
    y = x.clone()
    if axis == 1:
        y[:, [k for k in neurons if k < x.shape[1]]] = 0
    elif first:
        y[:, 0, neurons] = 0
    else:
        y[..., neurons] = 0
    return x - y if invert else y


def hooks(neurons, *, at="mlp.out.hook_in", late=False):
    zero = partial(in_place, back=True)
    pairs = []
    for i, some in neurons.items():
        if late:
            pairs.append((f"blocks.{i}.{at}", lambda x, hook: zero(x, hook, neurons=some)))  # noqa: B023
        else:
            pairs.append((f"blocks.{i}.{at}", partial(zero, neurons=some)))
    return pairs


def f1(tagger, corpus, neurons, **how):
    with tagger.bridge.hooks(fwd_hooks=hooks(neurons, **how)):
        return rl.evaluate(tagger, corpus).f1


def f1_outside(tagger, corpus, neurons):
    with tagger.bridge.hooks(fwd_hooks=hooks(neurons)):
        pass
    return rl.evaluate(tagger, corpus).f1


def f1_leaving(tagger, corpus, neurons):
    for name, hook in hooks(neurons):
        tagger.bridge.hook_dict[name].add_hook(hook)
    return rl.evaluate(tagger, corpus).f1


def f1_pruning(tagger, corpus, neurons):
    cut(tagger, neurons)
    return rl.evaluate(tagger, corpus).f1


def path(says, start, end, steps, *, how="right"):
    points = []
    for k in range(steps + 1):
        answer, layer = says((start + k / steps * (end - start)).requires_grad_())
        points.append((torch.autograd.grad(answer, layer)[0], layer.detach()))
    slope, layer = (torch.stack(xs) for xs in zip(*points, strict=True))
    moved, middle = layer[1:] - layer[:-1], (slope[1:] + slope[:-1]) / 2
    return {
        "straight": (middle.mean(0) * (layer[-1] - layer[0])).sum(0),
        "left": (slope[:-1] * moved).sum((0, 1)),
        "right end": (slope[1:] * moved).sum((0, 1)),
        "no increment": (middle * layer[1:]).sum((0, 1)) / steps,
        "divided": (middle * moved).sum((0, 1)) / steps,
        "tokens": (middle * moved).sum(0),
        "mean": (middle * moved).sum(0).mean(0),
        "backwards": -(middle * moved).sum((0, 1)),
    }[how]


def endpoint(says, start, end, steps, *, times_change=True):
    answer, layer = says(end.clone().requires_grad_())
    (slope,) = torch.autograd.grad(answer, layer)
    return (slope * (layer - says(start)[1] if times_change else layer)).sum(0).detach()


def cut(tagger, neurons, *, part="out", rows=False, whole=False, bias=False):
    with torch.no_grad():
        for i, some in neurons.items():
            linear = getattr(tagger.bridge.blocks[i].mlp, part)
            if whole:
                linear.weight.zero_()
            elif rows or part == "in":
                linear.weight[[k for k in some if k < len(linear.weight)]] = 0
            else:
                linear.weight[:, some] = 0
            if bias:
                linear.bias.zero_()


def cut_rows_all(tagger, neurons):
    with torch.no_grad():
        for i, some in neurons.items():
            tagger.bridge.blocks[i].mlp.out.weight[some] = 0


def cut_recorded(tagger, neurons):
    for i, some in neurons.items():
        tagger.bridge.blocks[i].mlp.out.weight[:, some] = 0


def cut_new(tagger, neurons):
    for i, some in neurons.items():
        linear = tagger.trunk.layers[i].mlp.fc_out
        weight = linear.weight.detach().clone()
        weight[:, some] = 0
        linear.weight = torch.nn.Parameter(weight)


def cut_hooked(tagger, neurons):
    for name, hook in hooks(neurons):
        tagger.bridge.hook_dict[name].add_hook(hook)


def cut_frozen(tagger, neurons):
    cut(tagger, neurons)
    for i in neurons:
        tagger.bridge.blocks[i].mlp.out.weight.requires_grad_(False)


def epoch(tagger, batches, optimizer, *, held=None, how=""):
    nats: list[Tensor] = []
    if how != "eval":
        tagger.train()
    for batch in batches:
        losses = tagger.losses(batch)
        if how not in ("no zero_grad", "one step"):
            optimizer.zero_grad()
        (losses.sum() if how == "sum" else losses.mean()).backward()
        if how not in ("no step", "one step"):
            optimizer.step()
        if held and how not in ("free", "late"):
            cut(tagger, held)
        nats.append(losses.detach())
    if how == "one step":
        optimizer.step()
    if held and how == "late":
        cut(tagger, held)
    if how != "stays":
        tagger.eval()
    if how == "mean of means":
        return sum(n.mean().item() for n in nats) / len(nats)
    if how == "last":
        return nats[-1].mean().item()
    if how == "total":
        return torch.cat(nats).sum().item()
    return None if how == "none" else torch.cat(nats).mean().item()


def ranks(score, among, *, first=None, up=True, every=False, n=1, fill=torch.nan):
    inside = torch.ones_like(among) if every else among
    place = torch.full_like(score, torch.nan)
    place[inside] = score[inside].argsort().argsort() / (int(inside.sum()) - n)
    place = place if up else 1 - place
    return place.where(among, fill).nanmean(1)


def ranks_in_layer(score, among):
    rows = [row[mask].argsort().argsort() / max(int(mask.sum()) - 1, 1) for row, mask in zip(score, among, strict=True)]
    return torch.stack([row.mean() for row in rows])


def everywhere(mask):
    return torch.ones_like(mask)


def drawn(chosen, seed, *, how="right"):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros_like(chosen)
    if how == "all layers":
        flat = torch.randperm(chosen.numel(), generator=generator)[: int(chosen.sum())]
        mask.view(-1)[flat] = True
        return mask
    for i, row in enumerate(chosen):
        n, pool = int(row.sum()), torch.arange(len(row))
        if how == "replacement":
            pick = torch.randint(len(row), (n,), generator=generator)
        elif how == "first":
            pick = pool[:n]
        elif how == "global":
            torch.manual_seed(seed)
            pick = torch.randperm(len(row))[:n]
        elif how == "unseeded":
            pick = torch.randperm(len(row), generator=torch.Generator().manual_seed(id(mask) + len(UNSEEDED)))[:n]
            UNSEEDED.append(1)
        elif how == "others":
            free = pool[~row]
            pick = free[torch.randperm(len(free), generator=generator)[:n]]
        elif how == "rolled":
            pick = (pool + seed % 3)[:n]
        else:
            pick = torch.randperm(len(row), generator=generator)[:n]
        mask[i, pick] = True
    return mask


UNSEEDED: list[int] = []

WRONG = {
    "class_means": [
        (lambda b, n: (means(b := list(b), n)[0], means(b, n, words=False)[1]), "averaged over sub-words before words"),
        (partial(means, words=False), "Your counts count sub-words"),
        (partial(means, first=True), "You took the first sub-word of each word alone"),
        (partial(means, per_batch=True), "You averaged the means of the batches"),
        (partial(means, restart=True), "Your counts are those of the last batch alone"),
        (lambda b, n: (means(b := list(b), n)[0], means(b, n, restart=True)[1]), "Only the last batch is in your"),
        (partial(means, less=1), "It looks like you divided by n - 1"),
        (partial(means, sums=True), "These are sums"),
        (lambda b, n: (means(b := list(b), n)[0].float(), means(b, n)[1]), "are right, but they are float32; expected "
         r"whole numbers \(int64\)"),
        (partial(means, nan=True), "A class without words has the mean 0 / 0"),
        (partial(means, keep=True), "it keeps every batch"),
        (lambda b, n: means(b, n)[1], r"must return two tensors, \(count, mean\); it returned a float32 tensor"),
        (lambda b, n: None, r"it returned None \(is there a `return`\?\)"),
        (lambda b, n: (means(b := list(b), n)[0], means(b, n)[1].mT), r"wrong shape: got \(3, 2, 1\), expected "
         r"\[class layer neuron\] = \(3, 1, 2\). The axes are in another order"),
        (lambda b, n: (means(b := list(b), n)[0], means(b, n)[1] + 1), r"wrong values; at \[class layer neuron\] = "),
    ],
    "probeless": [
        (partial(score, of=lambda x: x), "The differences have signs, so they cancel"),
        (lambda *a: score(*a, of=lambda x: x).abs(), "have signs|You took the absolute value of the sum"),
        (partial(score, of=torch.square), "You squared the differences"),
        (partial(score, by=torch.mean), "You took the mean over the other classes"),
        (partial(score, by=torch.amax), "You took the largest difference"),
        (partial(score, empty=True), "A class without words takes part"),
        (pooled, "You pooled all other words into one class"),
        (weighted, "You weighted the classes by how many words they have \\(a count-weighted mean\\)"),
        (lambda c, m, k: (m[k] - m[others(c, k)].mean(0)).abs(), "You compared with the mean of the other classes'"),
        (lambda c, m, k: score(c, m, k).round().long(), "the values are right, but they are int64; expected floating"),
        (lambda c, m, k: score(c, m, k).flatten(), r"wrong shape: got \(2,\), expected \[layer neuron\] = \(1, 2\)"),
    ],
    "ranking": [
        (lambda s: order(s, down=False).argsort().view_as(s), "The ranking is upside down: the most salient neuron "
         "should come first"),
        (lambda s: order(s).view_as(s), "That is which neuron stands at each place"),
        (lambda s: order(s, down=False).view_as(s), "which neuron stands at each place, and upside down"),
        (lambda s: s.argsort(1, descending=True).argsort(1), "You ranked each layer by itself"),
        (lambda s: order(s).argsort().view_as(s) + 1, "Places start at 0"),
        (order, "That is the order of the neurons, flat"),
        (lambda s: order(s).argsort(), "wrong shape"),
    ],
    "zero_neurons": [
        (partial(in_place, back=False), "your hook changed the tensor in place and returned None"),
        (in_place, "your hook changed the tensor in place"),
        (lambda x, hook, neurons: None, "your hook returned None"),
        (lambda x, hook, neurons: masked(x, neurons=neurons, invert=True), "You kept these neurons"),
        (lambda x, hook, neurons: masked(x, neurons=neurons, axis=1), "You zeroed tokens|Nothing is zeroed"),
        (lambda x, hook, neurons: masked(x, neurons=neurons, first=True), "on the first token alone"),
        (lambda x, hook, neurons: x.clone(), "Nothing is zeroed"),
        (lambda x, hook, neurons: x[..., neurons], "wrong shape"),
    ],
    "f1_without": [
        (f1_leaving, "you left a hook behind"),
        (f1_outside, "That is F1 without any ablation: was the evaluation inside the block"),
        (partial(f1, late=True), "A lambda in a loop sees the loop's last value"),
        (partial(f1, at="mlp.in.hook_in"), "Look at which activations the hooks are on"),
        (f1_pruning, "the weights changed"),
        (lambda t, c, n: f1(t, c, n)["place"], "must return F1 by label"),
    ],
    "dissociation": [
        (lambda x: float((x.diagonal() - x.flip(0).diagonal()).mean()), "That is the mean of the two labels"),
        (lambda x: float((x.diagonal() - x.flip(0).diagonal()).max()), "That is the larger of the two"),
        (lambda x: float((x.diagonal() - x.flip(1).diagonal()).min()), "You compared along a row"),
        (lambda x: -float((x.diagonal() - x.flip(0).diagonal()).min()), "The sign is the wrong way round"),
        (lambda x: float(x.diagonal().min()), "That is what the own cuts cost"),
        (lambda x: float((x.diagonal() - x.flip(0).diagonal()).abs().min()), "You took the size of the difference"),
        (lambda x: x, "must return a number, it returned a float32 tensor"),
    ],
    "conductance": [
        (endpoint, r"Your integral uses the endpoint only: .* \(says was called 2 times\)"),
        (partial(endpoint, times_change=False), r"the endpoint only: .* \(says was called 1 time\)"),
        (partial(path, how="straight"), "as if the layer's activations moved evenly"),
        (partial(path, how="left"), "each step uses the gradient at its start only"),
        (partial(path, how="right end"), "each step uses the gradient at its end only"),
        (partial(path, how="no increment"), "You multiplied gradients with activations"),
        (partial(path, how="divided"), "do not divide by steps once more"),
        (partial(path, how="mean"), "You averaged over tokens"),
        (partial(path, how="tokens"), r"wrong shape: got \(1, 2\), expected \[neuron\] = \(2,\)"),
        (partial(path, how="backwards"), "The sign is the wrong way round"),
    ],
    "prune_mlp_": [
        (cut_rows_all, r"a hidden unit is a column of it, weight\[:, k\]"),
        (partial(cut, rows=True), r"rows \[2, 9\] of layer 0 are 0"),
        (cut_recorded, r"do it in a block of `with torch.no_grad\(\):`"),
        (partial(cut, part="in"), "you cut the neuron's input weights"),
        (partial(cut, whole=True), "the whole output matrix of layer 0 is 0"),
        (partial(cut, bias=True), "the output bias is the whole MLP's"),
        (cut_new, "a parameter was replaced by a new one"),
        (cut_hooked, "you left a hook behind"),
        (cut_frozen, "no longer requires a gradient"),
        (lambda *_: None, "no weight changed"),
        (lambda t, n: cut(t, {i: ks[:1] for i, ks in n.items()}), "the logits differ from those with the neurons"),
        (lambda t, n: cut(t, {0: n[0]}), "expected changes in"),
    ],
    "train_epoch_": [
        (partial(epoch, how="no zero_grad"), r"call optimizer.zero_grad\(\) for every batch"),
        (partial(epoch, how="no step"), r"call optimizer.step\(\) for every batch"),
        (partial(epoch, how="sum"), "the steps follow the sum of the losses"),
        (partial(epoch, how="one step"), "there was one step for the whole epoch"),
        (partial(epoch, how="free"), "but these neurons grew back"),
        (partial(epoch, how="late"), "between the steps they were not"),
        (partial(epoch, how="eval"), "the model was in eval mode"),
        (partial(epoch, how="stays"), "still in training mode"),
        (partial(epoch, how="mean of means"), "That is the mean of the batches' means"),
        (partial(epoch, how="last"), "That is the loss of the last batch alone"),
        (partial(epoch, how="total"), "divide it by the number of sub-words"),
        (partial(epoch, how="none"), "must return the loss as a number, it returned None"),
        (lambda *_, **__: 0.0, "no batch went through the model"),
        (lambda t, b, o, **k: epoch(t, list(b)[:2], o, **k), "3 batches were given, 2 went through"),
    ],
    "graft": [
        (lambda c, r, i: planted_into(r, c, i), "that is the retrained model with this layer as it was cut"),
        (lambda c, r, i: planted_into(c, r, i, dot=""), "for layer 1 you took layer 10 as well"),
        (lambda c, r, i: planted_into(c, r, i, copy=False), "shares its memory with what was passed in"),
        (lambda c, r, i: c.update(planted_into(c, r, i)) or c, "a model that was passed in has changed"),
        (lambda c, r, i: dict(c), "nothing was taken from the retrained model"),
        (lambda c, r, i: dict(r), r"for layer 1 (expected|you took)"),
        (lambda c, r, i: {k: (c[k] + r[k]) / 2 for k in c}, "is neither as cut nor as retrained"),
        (lambda c, r, i: None, "must return a weight for each name of `cut`, it returned None"),
    ],
    "layer_ranks": [
        (partial(ranks, up=False), "Upside down: the most salient neuron has the rank saliency 1"),
        (partial(ranks, every=True), "You ranked all neurons and then chose"),
        (ranks_in_layer, "You ranked each layer by itself"),
        (partial(ranks, fill=0.0), "Neurons outside of `among` count as 0"),
        (partial(ranks, n=0), "divide places by n - 1"),
        (lambda s, a: s.where(a, torch.nan).nanmean(1), "Those are means of the scores"),
        (lambda s, a: ranks(s, a).nan_to_num(0), "A layer without any of the neurons has no mean: NaN"),
    ],
    "moved": [
        (lambda b, a, s: ranks(a, s) - ranks(b, everywhere(s)), "You compared all base neurons with survivors.*here "
         "the scores did not change at all"),
        (lambda b, a, s: ranks(a, everywhere(s)) - ranks(b, everywhere(s)), "You took all neurons on both sides"),
        (lambda b, a, s: ranks(b, s) - ranks(a, s), "The sign is the wrong way round"),
        (lambda b, a, s: ranks(a, s), "subtract where they were before"),
    ],
    "random_like": [
        (partial(drawn, how="all layers"), "You drew from all layers together"),
        (partial(drawn, how="replacement"), "Draw without replacement"),
        (partial(drawn, how="first"), "every seed gives the same set"),
        (partial(drawn, how="global"), "the global random generator moved"),
        (partial(drawn, how="others"), "never a neuron of `chosen` in 30 draws"),
        (partial(drawn, how="unseeded"), "seed 0 gave two different sets"),
        (partial(drawn, how="rolled"), "some neurons are never drawn"),
        (lambda c, s: drawn(c, s).nonzero(), r"must return a mask like `chosen` \(bool, \(4, 20\)\), got a int64"),
    ],
    "p_value": [
        (lambda x, c: float((c.abs() >= abs(x)).float().mean()), "The observed set is one of the possible draws too"),
        (lambda x, c: (1 + int((c >= x).sum())) / (1 + len(c)), "That is one-sided"),
        (lambda x, c: (1 + int((c <= x).sum())) / (1 + len(c)), "one-sided, and towards the low end"),
        (lambda x, c: 1 - (1 + int((c.abs() >= abs(x)).sum())) / (1 + len(c)), "The wrong way round"),
        (lambda x, c: 0.5, "it should be 0.200, yours is 0.500"),
        (lambda x, c: None, "must return a number, it returned None"),
    ],
    "recovered": [
        (lambda w, r, a, n, t: (a - r) / (w - r), "it should be 0.500, yours is 0.750. That leaves the twin out"),
        (lambda w, r, a, n, t: (a - t) / (w - r), "Take what the twin .gains., not where it ends"),
        (lambda w, r, a, n, t: (a - r) - (t - n), "That is a gain, not a share"),
        (lambda w, r, a, n, t: ((a - r) - (t - n)) / w, "not of the whole score"),
        (lambda w, r, a, n, t: ((a - r) - (t - n)) / (w - n), "the gap to the twin is another"),
        (lambda w, r, a, n, t: ((t - n) - (a - r)) / (w - r), "The wrong way round"),
        (lambda w, r, a, n, t: 0.25, "it should be 0.500, yours is 0.250"),
        (lambda w, r, a, n, t: ((a - r) - (t - n)) / (w - r), "the removal took nothing"),
        (lambda w, r, a, n, t: ((a - r) - (t - n)) / (w - r) if w != r else 0.0, "the removal took nothing"),
        (lambda w, r, a, n, t: None, "must return a number, it returned None"),
    ],
}  # fmt: skip


def test_every_check_meets_three_wrong_answers_at_least():
    assert list(WRONG) == list(checks.CHECKS)
    assert min(len(answers) for answers in WRONG.values()) >= 3


@pytest.mark.parametrize("name", WRONG)
def test_check_says_what_is_wrong(name, capsys):
    for answer, says in WRONG[name]:
        with pytest.raises(checks.Wrong, match=f"(?s)^{name}.*({says})"):
            checks.CHECKS[name](answer)
    assert capsys.readouterr().out == ""
    checks.CHECKS[name](SOLUTIONS[name])  # after all that the checks' own model is as new
    assert capsys.readouterr().out.startswith(f"✔ {name}: ")


SOLUTIONS = functions("solutions")
