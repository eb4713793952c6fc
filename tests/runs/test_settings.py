"""One object from four places; every error one line that names the field, the value and what is allowed."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import BaseModel

from relearn_lens.runs.presets import PRESETS, preset, settings_of
from relearn_lens.runs.settings import ARMS, Experiment, Prune, experiment, fields


@pytest.fixture
def write(tmp_path):
    def save(text: str, name: str = "my.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return save


# --- one object, whatever it comes from


def test_settings_are_the_same_from_everywhere(write):
    values = {"prune": {"fraction": 0.3}, "concept": ["LOC", "ORG"], "seeds": [0, 1], "data": {"concept_share": None}}
    python = Experiment.model_validate(values)
    assert experiment(values) == python
    sets = ["prune.fraction=0.3", 'concept=["LOC", "ORG"]', "seeds=[0, 1]", "data.concept_share=none"]
    assert settings_of("names", sets=sets) == python
    changes = {"prune.fraction": 0.3, "concept": ("LOC", "ORG"), "seeds": (0, 1)}
    assert settings_of("names", changes, ["data.concept_share=none"]) == python
    text = 'concept = ["LOC", "ORG"]\nseeds = [0, 1]\n[prune]\nfraction = 0.3\n'
    assert settings_of(write(text), sets=["data.concept_share=none"]) == python
    assert settings_of(str(write('preset = "names"\n' + text)), sets=["data.concept_share=none"]) == python


def test_verdicts_need_three_seeds_and_every_arm_which_the_usual_run_has():
    assert Experiment().seeds == (0, 1, 2)
    assert Experiment().arms == ARMS == ("concept", "other", "random", "unpruned", "never")
    assert (Experiment().score, Experiment().contrast, Experiment().prune.fraction) == ("dprime", "rest", "auto")


def test_preset_is_what_its_name_gives():
    for name in PRESETS:
        assert preset(name) == settings_of(name)
    assert settings_of() == preset("names") == Experiment()


def test_changes_come_before_sets_and_both_over_the_preset():
    assert settings_of("toy").model == "toy"
    assert settings_of("toy", {"model": "a"}).model == "a"
    assert settings_of("toy", {"model": "a"}, ["model=b", "model=c"]).model == "c"
    assert settings_of("toy", {"model": None, "concept": None}) == preset("toy")


def test_set_changes_one_key_of_a_group_only():
    changed = settings_of("toy", sets=["retrain.lr=0.5"])
    assert changed.retrain.lr == 0.5
    assert changed.retrain.every == preset("toy").retrain.every
    assert changed.model_copy(update={"retrain": preset("toy").retrain}) == preset("toy")


def test_settings_leave_the_presets_alone():
    before = repr(PRESETS)
    settings_of("toy", {"prune.fraction": 0.9}, ["data.split_seed=5"])
    assert repr(PRESETS) == before


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("conll:some/file.tsv", "conll:some/file.tsv"),
        ("hf:a/b", "hf:a/b"),
        ('"quoted"', "quoted"),
        (" spaced ", "spaced"),
        ("with = sign", "with = sign"),
    ],
)
def test_set_takes_a_bare_string(text, value):
    assert settings_of("toy", sets=[f"corpus={text}"]).corpus == value


def test_concept_is_one_label_or_several():
    assert settings_of("toy", {"concept": "LOC"}).labels == ("LOC",)
    assert settings_of("toy", {"concept": ["LOC", "GPE"]}).labels == ("LOC", "GPE")


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        preset("toy").model = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_preset_of_a_file_lies_under_it(write):
    made = settings_of(write('preset = "toy"\n[retrain]\nlr = 0.5\n'))
    assert made == settings_of("toy", sets=["retrain.lr=0.5"])


# --- the protocol of the paper

PUBLISHED = {
    "prune.sever": "gain", "prune.embedding": "last_block", "prune.which": "by_family", "prune.control": "first",
    "measure.rank_bucket": 100, "measure.nulls": "zero_then_drop", "measure.selection": "published",
}  # fmt: skip


def at(made: Experiment, key: str):
    group, _, name = key.partition(".")
    return getattr(getattr(made, group), name)


def test_protocol_sets_the_fields_it_names():
    made = settings_of("lo2024", sets=["protocol=published"])
    assert {key: at(made, key) for key in PUBLISHED} == PUBLISHED
    corrected = settings_of("lo2024", sets=["protocol=corrected"])
    assert corrected == preset("lo2024")
    assert all(at(corrected, key) == at(Experiment(), key) != value for key, value in PUBLISHED.items())
    back = made.model_copy(update={"protocol": "corrected", "prune": corrected.prune, "measure": corrected.measure})
    assert back == corrected  # nothing else was changed


@pytest.mark.parametrize("key", PUBLISHED)
def test_field_that_is_given_wins_over_the_protocol(key):
    own = at(Experiment(), key)
    for sets in ([f"{key}={own}", "protocol=published"], ["protocol=published", f"{key}={own}"]):
        made = settings_of("lo2024", sets=sets)
        assert {k: at(made, k) for k in PUBLISHED} == {**PUBLISHED, key: own}
        assert made.departures() == {key: own}
    assert settings_of("lo2024", sets=["protocol=published"]).departures() == {}


def test_protocol_holds_in_python_too():
    made = Experiment.model_validate({"protocol": "published", "prune": Prune(fraction=0.3, sever="out")})
    assert (made.prune.fraction, made.prune.sever, made.prune.control) == (0.3, "out", "first")


def test_protocol_named_over_a_runs_own_file_takes_effect(write):
    file = write(preset("lo2024").to_toml())
    assert settings_of(file, sets=["protocol=published"]) == settings_of("lo2024", sets=["protocol=published"])
    kept = settings_of("lo2024", sets=["prune.control=uniform"]).to_toml()
    assert settings_of(write(kept), sets=["protocol=published"]).prune.control == "uniform"


@pytest.mark.parametrize("sets", [["protocol=published"], ["protocol=published", "prune.sever=out"]])
def test_protocol_is_written_and_read_back(sets, write):
    made = settings_of("lo2024", sets=[*sets, "probe_corpus=conll:x", "probe_concept=place"])
    assert settings_of(write(made.to_toml())) == made


def test_lo2024_is_what_the_paper_says():
    made = preset("lo2024")
    assert (made.model, made.site, made.score, made.contrast) == (
        "distilbert-base-cased", "resid", "probeless", "rest",
    )  # fmt: skip
    assert (made.finetune.epochs, made.retrain.epochs, made.retrain.every, made.retrain.restart) == (3, 8, 2, True)
    for training in (made.finetune, made.retrain):
        assert (training.lr, training.batch_size, training.clip, training.weight_decay) == (2e-5, 8, 1, 0.01)
    assert (made.finetune.prior_bias, made.prune.fraction, made.data.labelled_only) == (False, 0.5, False)


# --- written and read again


@pytest.mark.parametrize("name", PRESETS)
def test_to_toml_is_read_back_as_the_same(name, write):
    assert settings_of(write(preset(name).to_toml())) == preset(name)


@pytest.mark.parametrize("sets", [["data.concept_share=none"], ["data.concept_share=none", "threads=none"]])
def test_to_toml_keeps_none(sets, write):
    made = settings_of("toy", sets=sets)
    assert settings_of(write(made.to_toml())) == made


@examples(max_examples=40, deadline=None)
@given(
    st.floats(0, 1, exclude_min=True),
    st.floats(1e-12, 10),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, unique=True),
    st.floats(0.01, 1),
)
def test_to_toml_is_read_back_as_the_same_whatever_is_in_it(tmp_path_factory, fraction, lr, name, seeds, share):
    made = experiment(
        {
            "model": name, "concept": (name, "b"), "seeds": seeds, "prune": {"fraction": fraction},
            "retrain": {"lr": lr}, "data": {"concept_share": share},
        }
    )  # fmt: skip
    path = tmp_path_factory.mktemp("toml") / "x.toml"
    path.write_bytes(made.to_toml().encode())
    assert settings_of(path) == made


def test_to_toml_is_plain_toml_of_every_setting():
    values = tomllib.loads(preset("toy").to_toml())
    assert values["prune"]["fraction"] == 4 / 256
    for key, default, _ in fields():
        group, _, inner = key.rpartition(".")
        assert default is None or inner in (values[group] if group else values), key


# --- how long a training is


def test_retraining_is_by_steps_unless_epochs_are_said(write):
    usual = Experiment().retrain
    assert (usual.steps, usual.n_stages) == ((1, 2, 4, 8, 16, 32, 64), 7)
    assert Experiment().finetune.steps is None
    by_epochs = experiment({"retrain": {"epochs": 2, "every": 0.5}}).retrain
    assert (by_epochs.steps, by_epochs.n_stages) == (None, 4)
    assert settings_of(write("[retrain]\nevery = 0.5\n")).retrain.n_stages == 6  # of three epochs
    assert experiment({"retrain": {"epochs": 2, "steps": None}}).retrain.n_stages == 2


@pytest.mark.parametrize(
    ("sets", "steps", "epochs", "every"),
    [
        (["retrain.epochs=2"], None, 2, None),
        (["retrain.every=0.5"], None, 3, 0.5),
        (["retrain.epochs=2", "retrain.every=0.5"], None, 2, 0.5),
        (["retrain.steps=[3]"], (3,), 3, None),
        (["retrain.epochs=2", "retrain.steps=[3]"], (3,), 3, None),
        (["retrain.steps=[3]", "retrain.epochs=2"], None, 2, None),
        (["retrain.steps=none"], None, 3, None),
        (["retrain.lr=0.5"], (1, 2, 4, 8, 16, 32), 3, None),
    ],
)
def test_what_is_said_last_says_how_long(sets, steps, epochs, every, write):
    made = settings_of("toy", sets=sets)
    assert (made.retrain.steps, made.retrain.epochs, made.retrain.every) == (steps, epochs, every)
    assert settings_of(write(made.to_toml())) == made
    assert settings_of(write(made.to_toml()), sets=["retrain.steps=[5]"]).retrain.steps == (5,)
    assert settings_of(write(made.to_toml()), sets=["retrain.epochs=5"]).retrain.steps is None


def test_both_at_once_are_refused():
    with pytest.raises(ValueError, match=r"retrain\.steps = \[4\] and epochs or every: a training has one of them"):
        experiment({"retrain": {"steps": [4], "epochs": 2}})


# --- the list of settings


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, str | None]:
    """Every setting below a pydantic model, with its description."""
    found = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= leaves(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.description
    return found


def test_fields_are_complete_and_described():
    every = leaves(Experiment)
    assert [key for key, _, _ in fields()] == list(every)
    assert {key: says for key, _, says in fields()} == every
    for key, says in every.items():
        assert says, key
        assert len(says) > 3, key


def test_fields_give_the_defaults():
    for key, default, _ in fields():
        value = Experiment()
        for part in key.split("."):
            value = getattr(value, part)
        assert value == default, key


def test_every_field_can_be_set_to_its_default():
    for key, default, _ in fields():
        if key == "retrain.epochs":  # who says epochs means a training that is measured by epochs
            assert settings_of("names", {key: default}).retrain.steps is None
        else:
            assert settings_of("names", {key: default}) == Experiment(), key


# --- one line for each mistake


def one_line(sets=(), source="toy", changes=None) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        settings_of(source, changes, sets)
    text = str(caught.value)
    assert "\n" not in text, text
    assert not re.search(r"pydantic|validation error|https?://|\[type=", text), text
    return text


def test_unknown_key_lists_those_of_its_group():
    text = one_line(["prune.fractoin=0.3"])
    assert re.match(r"unknown setting 'prune\.fractoin'; did you mean 'prune\.fraction'\? Known: prune\.frac", text)
    assert "retrain" not in text


def test_unknown_key_at_the_top_lists_all():
    text = one_line(["modle=x"])
    assert re.match(r"unknown setting 'modle'; did you mean 'model'\? Known: model, head, ", text)
    assert "prune.fraction" in text


@pytest.mark.parametrize("key", ["nothing.at.all", "prune.fraction.deep.er", "a..b", "seeds.0"])
def test_unknown_key_of_any_depth_is_one_line(key):
    assert one_line([f"{key}=1"]).count(key.split(".")[0]) >= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("prune.fraction=0", r"prune\.fraction = 0: .*greater than 0"),
        ("prune.fraction=-0.1", r"prune\.fraction = -0\.1: .*greater than 0"),
        ("prune.fraction=1.5", r"prune\.fraction = 1\.5: .*less than or equal to 1"),
        ("prune.control_draws=-1", r"prune\.control_draws = -1: .*greater than or equal to 0"),
        ("retrain.epochs=0", r"retrain\.epochs = 0: .*greater than 0"),
        ("retrain.every=0", r"retrain\.every = 0: .*greater than 0"),
        ("retrain.lr=-1", r"retrain\.lr = -1: .*greater than 0"),
        ("finetune.batch_size=0", r"finetune\.batch_size = 0: .*greater than or equal to 1"),
        ("finetune.clip=0", r"finetune\.clip = 0: .*greater than 0"),
        ("finetune.weight_decay=-1", r"finetune\.weight_decay = -1: .*greater than or equal to 0"),
        ("data.train_sentences=0", r"data\.train_sentences = 0: .*greater than or equal to 1"),
        ("data.concept_share=0", r"data\.concept_share = 0: .*greater than 0"),
        ("data.concept_share=1.1", r"data\.concept_share = 1\.1: .*less than or equal to 1"),
        ("data.parts=[0.5, 0.5, 0.5]", r"data\.parts = .*0\.5.*: three shares above 0 that sum to 1"),
        ("data.parts=[1.0, 0.0, 0.0]", r"data\.parts = .*: three shares above 0 that sum to 1"),
        ("data.long=cut", r"data\.long = 'cut': .*'split', 'truncate' or 'error'"),
        ("data.scheme=bilou", r"data\.scheme = 'bilou': .*'auto', 'bio', 'iob1', 'io'"),
        ("measure.draws=5", r"measure\.draws = 5: .*greater than or equal to 100"),
        ("measure.level=1", r"measure\.level = 1: .*less than or equal to 0\.9999"),
        ("threads=0", r"threads = 0: .*greater than or equal to 1"),
        ("contrast=none at all", r"contrast = 'none at all': .*'classes' or 'rest'"),
        ("keep=every", r"keep = 'every': .*'none', 'last' or 'all'"),
        ("retrain.steps=[4, 2]", r"retrain\.steps = \[4, 2\]: numbers of steps that rise"),
        ("retrain.steps=[0, 2]", r"retrain\.steps\.0 = 0: .*greater than or equal to 1"),
        ("prune.grid=[0.1, 2]", r"prune\.grid\.1 = 2: .*less than or equal to 1"),
        ("prune.gone=1", r"prune\.gone = 1: .*less than 1; the range is above 0 below 1"),
        ("grafts.bands=0", r"grafts\.bands = 0: .*greater than or equal to 1"),
        ("rounds=-1", r"rounds = -1: .*greater than or equal to 0"),
        ('block.held=["all"]', r"block\.held\.0 = 'all': .*'part', 'heirs' or 'random'"),
        ("never=hidden", r"never = 'hidden': .*'absent' or 'outside'"),
        ("seeds=[0, -1]", r"seeds\.1 = -1: .*greater than or equal to 0"),
        ("seeds=[0, 0]", r"seeds = \[0, 0\] names one twice"),
        ('arms=["concept", "concept"]', r"arms = \['concept', 'concept'\] names one twice"),
        ('arms=["concept", "rnadom"]', r"arms\.1 = 'rnadom': .*'concept', 'other', 'random', 'unpruned' or 'never'"),
        ("prune.sever=in", r"prune\.sever = 'in': .*'auto', 'out', 'both', 'gain' or 'writes'"),
        ("prune.embedding=x", r"prune\.embedding = 'x': .*'own' or 'last_block'"),
        ("prune.which=x", r"prune\.which = 'x': .*'most', 'least' or 'by_family'"),
        ("prune.control=x", r"prune\.control = 'x': .*'disjoint', 'layers', 'uniform' or 'first'"),
        ("measure.rank_bucket=0", r"measure\.rank_bucket = 0: .*greater than or equal to 1"),
        ("measure.nulls=zero", r"measure\.nulls = 'zero': .*'drop' or 'zero_then_drop'"),
        ("measure.selection=all", r"measure\.selection = 'all': .*'matched' or 'published'"),
        ("protocol=paper", r"protocol = 'paper': .*'corrected' or 'published'"),
        ("probe_concept=LOC", r"probe_concept = 'LOC': there is no probe_corpus .*give probe_corpus too"),
    ],
)  # fmt: skip
def test_value_out_of_range_names_field_value_and_what_is_allowed(change, message):
    assert re.match(message, one_line([change]))


def numbers() -> list[str]:
    """The keys of all settings that are a number or may be one."""
    found = [key for key, default, _ in fields() if type(default) in (int, float)]
    return [*found, "threads", "max_memory", "prune.fraction", "retrain.lora_rank", "grafts.bands"]


@pytest.mark.parametrize("value", [10**30, -(10**30)])
@pytest.mark.parametrize("key", numbers())
def test_every_number_has_a_range_and_says_it(key, value):
    text = one_line([f"{key}={value}"])
    assert re.match(
        rf"{re.escape(key)} = {value}: .*; the range is (from|above) \S+ (up to|below) \S+( or 'auto')?$", text
    )


def test_ranges_are_said_with_both_ends():
    assert one_line(["retrain.epochs=1e12"]).endswith("10000; the range is above 0 up to 10,000")
    assert one_line(["measure.draws=1000000000"]).endswith("100000; the range is from 100 up to 100,000")
    assert (
        one_line(["measure.draws=1e30"])
        == "measure.draws = 1e+30: input is too large; the range is from 100 up to 100,000"
    )
    assert one_line([f"seeds=[0, {2**32}]"]).endswith("4294967295; the range is from 0 up to 4,294,967,295")
    assert one_line(["seeds=[-1]"]).startswith("seeds.0 = -1: input should be greater than or equal to 0")
    assert settings_of("toy", sets=[f"seeds=[{2**32 - 1}]"]).seeds == (2**32 - 1,)


def test_more_stages_than_anyone_measures_are_refused():
    text = one_line(["retrain.epochs=3.0", "retrain.every=1e-9"])
    assert re.match(
        r"retrain\.every = 1e-09: 3\.0 epochs would be more than 10,000 stages.*make it 0\.0003 or more", text
    )
    assert settings_of("toy", sets=["retrain.epochs=3", "retrain.every=0.0003"]).retrain.every == 0.0003


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("prune.fraction=half", r"prune\.fraction = 'half': .*number"),
        ("prune.fraction=none", r"prune\.fraction = 'none': .*number"),
        ("finetune.batch_size=1.5", r"finetune\.batch_size = 1\.5: .*integer"),
        ("model=5", r"model = 5: .*string"),
        ("seeds=1", r"seeds = 1: .*(tuple|list)"),
        ("data.labelled_only=perhaps", r"data\.labelled_only = 'perhaps': .*boolean"),
        ("data.parts=[1.0]", r"data\.parts = \[1\.0\]: three shares"),
        ("model.name=x", r"model = \{'name': 'x'\}: .*string"),
        ("prune=0.5", r"prune = 0\.5: "),
        ("seeds=[]", r"seeds = .*: .*at least 1"),
        ("arms=[]", r"arms = .*: .*at least 1"),
    ],
)
def test_value_of_the_wrong_type_names_field_value_and_what_is_allowed(change, message):
    assert re.match(message, one_line([change]))


def test_concept_of_the_wrong_type_is_one_line():
    assert re.match("concept = 5: ", one_line(["concept=5"]))


@pytest.mark.parametrize("value", ["[]", '""'])
def test_empty_concept_is_refused(value):
    assert re.match("concept = ", one_line([f"concept={value}"]))


def test_several_mistakes_are_a_line_each():
    with pytest.raises(ValueError, match="fraction") as caught:
        settings_of("toy", sets=["prune.fraction=0", "retrain.lr=0", "nonsense=1"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert {line.split(" = ")[0] for line in lines[:2]} <= {
        "prune.fraction",
        "retrain.lr",
        "unknown setting 'nonsense'",
    }


@pytest.mark.parametrize("text", ["prune.fraction", "=0.3", " =1", ""])
def test_set_without_key_or_value_says_how_to_write_it(text):
    found = one_line([text])
    assert re.match(re.escape(f"--set {text!r}: write key=value, such as prune.fraction=0.3"), found)


def test_unknown_preset_lists_the_known():
    text = one_line(source="nmaes")
    assert "unknown preset 'nmaes'" in text
    assert all(name in text for name in PRESETS)
    assert ".toml" in text
    with pytest.raises(ValueError, match="unknown preset 'x'; known: names, "):
        preset("x")


def test_unknown_preset_in_a_file_lists_the_known(write):
    assert re.match("unknown preset 'nothing'; known: names, ", one_line(source=write('preset = "nothing"\n')))


def test_file_that_is_missing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no settings file at '.*absent\.toml'.*names.*toy") as caught:
        settings_of(tmp_path / "absent.toml")
    assert "\n" not in str(caught.value)


def test_folder_is_no_settings_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(repr(str(tmp_path)))):
        settings_of(tmp_path)


def test_file_that_is_no_toml_says_where(write):
    text = one_line(source=write("prune = \n"))
    assert re.match(r"'.*my\.toml' is not valid TOML: .*line 1", text)


def test_file_in_another_encoding_says_so(tmp_path):
    path = tmp_path / "latin.toml"
    path.write_bytes('model = "caf\xe9"\n'.encode("latin-1"))
    assert "not valid TOML" in one_line(source=path)


def test_unknown_key_in_a_file_is_one_line(write):
    assert "unknown setting 'prune.frac'" in one_line(source=write("[prune]\nfrac = 0.5\n"))


def test_settings_do_not_wait_for_torch():
    code = (
        "import sys, relearn_lens, relearn_lens.runs.presets as p; p.settings_of('toy', sets=['prune.fraction=0.2']);"
        "print(sorted({'torch', 'transformer_lens', 'transformers', 'numpy', 'pandas', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert done.stdout.strip() == "[]"


def test_none_is_nothing_only_where_a_setting_may_be():
    assert settings_of("toy", {}, ["keep=none"]).keep == "none"
    assert settings_of("toy", {}, ["threads=none"]).threads is None
    with pytest.raises(ValueError, match="seeds"):
        settings_of("toy", {}, ["seeds=none"])


def test_a_sweep_is_sent_to_its_own_command(tmp_path):
    path = tmp_path / "many.toml"
    path.write_text('preset = "toy"\n[sweep]\nseeds = [[0], [1]]\n')
    with pytest.raises(ValueError, match=r"relearn-lens sweep FILE\.toml runs them"):
        settings_of(str(path))
