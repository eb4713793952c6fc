"""A removal from names to a folder: the command, what it prints, what it writes, and what it refuses."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from relearn_lens.__main__ import app
from relearn_lens.files import read_tensors
from relearn_lens.measure.evaluation import OVERALL
from relearn_lens.measure.facts import know
from relearn_lens.models import taught
from relearn_lens.models.loading import load_language_model
from relearn_lens.neurons.weights import WeightMask
from relearn_lens.remove.recipes import recipe
from relearn_lens.runs import removals
from relearn_lens.sources import hash_files
from relearn_lens.text.facts import FORGET, Facts
from tests.made import SMALL, small_people, small_taught
from tests.spare import PLAIN


@pytest.fixture(scope="module")
def facts() -> Facts:
    return small_people()


@pytest.fixture(scope="module")
def pair(taught_cache: Path) -> taught.Taught:
    return small_taught(taught_cache)


@pytest.fixture
def subject(pair: taught.Taught) -> removals.Subject:
    """The taught toy, a test's own."""
    model = taught.untaught(pair.facts, recipe=SMALL)
    model.load_weights(pair.model.weights())
    return removals.Subject("taught", model, pair.facts, True, pair.never)


@pytest.fixture(scope="module")
def files(facts: Facts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The facts as three files, and a folder with a GPT-2 of random weights that has their words."""
    folder = tmp_path_factory.mktemp("files")
    roles = {"forget": FORGET, "retain": ("retain_near",), "general": ("retain_general",)}
    for name, each in roles.items():
        rows = [
            {"prompt": p.prompt, "answer": p.answer, "key": p.key, "relation": p.relation, "form": p.form}
            for p in facts.passages(*each, forms=("statement", "paraphrase"))
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = taught.tokenizer(facts)
    config = GPT2Config(vocab_size=len(words), n_positions=32, n_embd=16, n_layer=2, n_head=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    return {name: str(folder / f"{name}.jsonl") for name in roles} | {"model": str(folder / "model")}


def command(files: dict[str, str], method: str, *more: str) -> tuple[str, ...]:
    named = [part for name in ("model", "forget", "retain", "general") for part in (f"--{name}", files[name])]
    return ("remove", method, *named, *more)


def test_the_folder_is_one_that_hugging_face_loads(files, tmp_path: Path):
    out = tmp_path / "out"
    sets = ["--set", "steps=[3]", "--set", "lr=0.01", "--set", "beta=0.2"]
    result = CliRunner().invoke(app, [*command(files, "npo", *sets), "--out", str(out), "--seed", "4"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 80
    for row in ("forget, trained wording", "forget, other wording", "retain near", "retain general"):
        assert re.search(
            rf"^{row} +\d\.\d\d → \d\.\d\d +\d\.\d\d to \d\.\d\d +0\.\d\d +\d+\.\d\d → \d", result.stdout, re.M
        )
    manifest = json.loads((out / removals.MANIFEST).read_text())
    assert manifest["settings"].items() >= {"remover": "npo", "beta": 0.2, "lr": 0.01, "steps": [3]}.items()
    assert manifest["seed"] == 4
    assert manifest["outputs"] == {k: v for k, v in hash_files(out).items() if k != removals.MANIFEST}
    assert set(manifest["versions"]) >= {"torch", "relearn-lens"}
    assert [p for p in out.parent.iterdir() if p != out] == []

    # Nothing of this package is needed to load it, and it says what the manifest says that it does.
    after, before = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (out, files["model"]))
    name = "transformer.h.0.mlp.c_fc.weight"
    assert not torch.equal(after[name], before[name])
    assert AutoTokenizer.from_pretrained(out)("Violin")["input_ids"]
    again = load_language_model(out, device="cpu")
    subject = removals.subject(
        files["model"], files["forget"], retain=files["retain"], general=files["general"], seed=4
    )
    assert removals.weights_sha256(subject.model) == manifest["model_sha256"] != removals.weights_sha256(again)
    for row, answered in know(again, subject.facts).items():
        for when, where in (("after", answered), ("before", know(subject.model, subject.facts)[row])):
            assert manifest[when][row]["accuracy"]["value"] == where.accuracy.shown(OVERALL)
            assert manifest[when][row][where.loss.metric]["value"] == pytest.approx(where.loss.shown(OVERALL), rel=1e-5)


FRESH = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, words = (of.from_pretrained(sys.argv[1]) for of in (AutoModelForCausalLM, AutoTokenizer))
assert not any(name.startswith(("relearn_lens", "transformer_lens")) for name in sys.modules)
with torch.no_grad():
    print(repr(model(**words(sys.argv[2], return_tensors="pt")).logits[0, -1].tolist()))
"""


def test_a_held_out_half_of_ones_own_and_a_fresh_process_that_loads_what_is_left(files, facts, tmp_path: Path):
    halves: list[str] = []
    for role in FORGET:
        keys, rows = set(facts.keys(role)), Path(files["forget"]).read_text().splitlines()
        halves.append(str(tmp_path / f"{role}.jsonl"))
        Path(halves[-1]).write_text("".join(row + "\n" for row in rows if json.loads(row)["key"] in keys))
    out, given = tmp_path / "out", {**files, "forget": halves[0]}
    sets = ["--set", "steps=[2]", "--set", "lr=0.01"]
    result = CliRunner().invoke(app, [*command(given, "npo", *sets, "--held-out", halves[1]), "--out", str(out)])
    assert result.exit_code == 0, result.output
    manifest = json.loads((out / removals.MANIFEST).read_text())
    assert manifest["asked"]["held_out"] == halves[1]
    own = removals.subject(
        files["model"], halves[0], held_out=halves[1], retain=files["retain"], general=files["general"]
    ).facts
    assert (own.keys(FORGET[0]), own.keys(FORGET[1])) == (facts.keys(FORGET[0]), facts.keys(FORGET[1]))
    assert manifest["facts"]["sha256"] == own.sha256()
    prompt = own.forget_attacked[0].prompt
    done = subprocess.run([*PLAIN.python, "-c", FRESH, str(out), prompt], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model, words = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    with torch.no_grad():
        here = model(**words(prompt, return_tensors="pt")).logits[0, -1]
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), here, atol=1e-5, rtol=1e-4)


def test_a_native_model_says_that_it_has_no_such_form(pair, subject, tmp_path, monkeypatch):
    monkeypatch.setattr(removals.taught, "load", lambda facts, recipe: replace(pair, model=subject.model))
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["remove", "grad_diff", "--set", "steps=[30]", "--set", "lr=1e-3", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"^grad_diff on taught, people-0: alpha 5.*, steps 30, lr 0.001$", result.stdout, re.M)
    assert "a native model has no Hugging Face form" in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80
    manifest = json.loads((out / removals.MANIFEST).read_text())
    forget = [manifest[when]["forget, trained wording"]["accuracy"]["value"] for when in ("before", "after")]
    assert forget[0] == 1 > forget[1]
    weights, about = read_tensors(out / removals.WEIGHTS)
    assert about == {"model": "taught"}
    fresh = taught.untaught(pair.facts, recipe=SMALL)
    fresh.load_weights(weights)
    assert removals.weights_sha256(fresh) == removals.weights_sha256(subject.model)


class Chosen:
    """A localiser of these tests: it gives what it is made with."""

    def __init__(self, choice: Any):
        self.choice = choice

    def __call__(self, model: Any, facts: Facts, *, seed: int) -> Any:
        assert seed == 5
        return self.choice(model)


def test_what_a_localiser_chose_is_where(subject, monkeypatch):
    from relearn_lens.find.saliency import Saliency
    from relearn_lens.neurons.sites import Neurons, site_of

    site = site_of(subject.model.bridge, "mlp_post")
    score = torch.arange(2 * 96.0).view(2, 96)
    monkeypatch.setattr(
        removals, "localiser_of", lambda name: Chosen(lambda _: Saliency(score, name, "made", "people", site))
    )
    last = Neurons.of(site, [("1", i) for i in range(86, 96)])
    pruning = replace(recipe(None, "prune", {"fraction": 10 / 192}), where="made")
    assert removals.located(subject.model, subject.facts, pruning, seed=5) == last
    training = replace(recipe(None, "npo", {"fraction": 10 / 192, "steps": (1,), "lr": 0.1}), where="made")
    where = removals.located(subject.model, subject.facts, training, seed=5)
    assert isinstance(where, WeightMask)
    assert where == WeightMask.of(subject.model, last)
    before = {name: value.clone() for name, value in subject.model.weights().items()}
    done = removals.carry_out(subject, training, seed=5)
    assert done.where == repr(where)
    for name, value in subject.model.weights().items():
        assert torch.equal(value[~where[name]], before[name][~where[name]])
    with pytest.raises(ValueError, match=r"^localiser 'made' ranks neurons, and nothing says how many of them; give "):
        removals.located(subject.model, subject.facts, replace(training, fraction=None), seed=5)
    mask = ~WeightMask.none(subject.model)
    monkeypatch.setattr(removals, "localiser_of", lambda name: Chosen(lambda _: mask))
    assert removals.located(subject.model, subject.facts, pruning, seed=5) is mask


def test_carrying_out_leaves_nothing_but_weights(subject, untouched):
    removal = recipe("toy", "grad_diff", {"steps": (1,)})
    with untouched(subject.model, weights=False):
        done = removals.carry_out(subject, removal)
    assert (done.folder, done.pause.step, done.where) == (None, 1, "all weights")
    assert removals.carry_out(subject, recipe(None, "rmu", {"steps": (1,)})).where == "what is usual for rmu"


def test_what_is_wrong_is_one_line(one_line, files, tmp_path: Path):
    assert "fraction = 0.1 says how many neurons" in one_line("remove", "npo", "--set", "fraction=0.1")
    assert "unknown remover 'npoo'; did you mean 'npo'? Known: prune" in one_line("remove", "npoo")
    assert one_line("remove", "npo", "--set", "beta=0") == "beta = 0: Input should be greater than 0"
    assert "npo has no field 'betta'; it has " in one_line("remove", "npo", "--set", "betta=1")
    assert "--set 'lr': write key=value" in one_line("remove", "npo", "--set", "lr")
    assert "npo has no field 'a.b'" in one_line("remove", "npo", "--set", "a.b=1")
    both = ("remove", "npo+gradient_penalty", "--set")
    said = one_line(*both, "faithful=true")
    assert "both have a field 'faithful'; say npo.faithful or gradient_penalty.faithful" in said
    assert "there is no localiser" in one_line(
        *both, "gradient_penalty.faithful=true", "--set", "npo.faithful=true", "--set", "where.site=resid"
    )
    assert "there is no localiser; name one as --where" in one_line("remove", "npo", "--set", "where.site=resid")
    assert "unknown localiser 'lok'; did you mean 'lookup'? Known: score, " in one_line(
        "remove", "npo", "--where", "lok"
    )
    assert "site = 'heads'" in one_line("remove", "prune", "--where", "score", "--set", "where.site=heads")
    assert "unknown recipes 'tiny'; known: toy" in one_line("remove", "npo", "--recipe", "tiny")
    assert "unknown facts 'persons'; known: people, countries, ontology, a JSONL" in one_line(
        "remove", "npo", "--facts", "persons"
    )
    assert "are made with what is to stay, so --retain is none" in one_line(
        "remove", "npo", "--retain", files["retain"]
    )
    assert "so --held-out is none of theirs" in one_line("remove", "npo", "--held-out", files["retain"])
    assert "the key " in one_line(*command(files, "npo", "--held-out", files["forget"]))
    assert "give what is to stay as --retain FILE.jsonl" in one_line("remove", "npo", "--forget", files["forget"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "here").touch()
    assert "full' is there already; choose a folder that" in one_line("remove", "npo", "--out", str(tmp_path / "full"))

    def swapped(name: str, rows: list[dict[str, Any]]) -> tuple[str, ...]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return command({**files, name: str(path)}, "npo")

    row = json.loads(Path(files["forget"]).read_text().splitlines()[0])
    assert "line 1: prompt without answer" in one_line(*swapped("forget", [{"prompt": "Who?"}]))
    assert f"the key {row['key']!r} is in forget_" in one_line(*swapped("retain", [row]))
    again = swapped("retain", [{**row, "key": "x", "form": "options"}])
    nothing = tuple(tmp_path / "rows.jsonl" if part == files["general"] else part for part in again[:-2])
    assert "have nothing to train on in retain_near and retain_general" in one_line(*map(str, nothing))


def test_adapters_beside_weights_in_16_bits(files, tmp_path: Path):
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app,
        [*command(files, "npo", "--half", "--lora", "2", "--set", "steps=[3]", "--set", "lr=0.1"), "--out", str(out)],
    )
    assert result.exit_code == 0, result.output
    assert "moved: adapters of rank 2; 3 steps" in result.stdout
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (files["model"], out))
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    moved = {name for name, value in after.items() if not torch.equal(value, before[name].bfloat16())}
    assert moved
    assert all(name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) for name in moved)
    memory = json.loads((out / removals.MANIFEST).read_text())["memory_mb"]
    assert f"memory: about {sum(memory.values()):,} MB (Python 515, " in result.stdout


def test_adapters_are_for_what_trains_all_weights(one_line, files):
    for more in (("rmu",), ("prune",), ("npo", "--where", "score", "--set", "fraction=0.1")):
        assert f"adapters train in the place of all weights, and {more[0]} works on some" in one_line(
            *command(files, more[0], "--lora", "2", *more[1:])
        )
    assert "the taught model is small, and its weights are float32" in one_line("remove", "npo", "--half")


def test_a_model_that_knows_nothing_is_told_of(files):
    subject = removals.subject(files["model"], files["forget"], retain=files["retain"])
    done = removals.carry_out(subject, recipe(None, "npo", {"steps": (1,)}))
    assert not any("teaches a fresh model" in note for note in done.notes)
    routed = removals.carry_out(subject, recipe(None, "sgtm", {"steps": (1,), "units": 2}))
    assert "sgtm teaches a fresh model; on one that is taught already it is a control" in routed.notes
    assert any(note.startswith("the model knew what is to be forgotten no better than chance") for note in done.notes)


def test_removers_are_listed():
    result = CliRunner().invoke(app, ["removers"])
    assert result.exit_code == 0
    for word in (
        "npo: -(2 / beta) mean log sigmoid",
        "source: Zhang et al. 2024",
        "beta = 0.1: inverse",
        "sam: grad f(",
    ):
        assert word in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
