"""The command line: what is printed, and that every mistake is one message and exit code 1."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from relearn_lens.__main__ import app, main
from relearn_lens.find.saliency import SCORES
from relearn_lens.neurons.sites import FAMILIES, SITES
from relearn_lens.runs import store
from relearn_lens.runs.presets import PRESETS
from relearn_lens.runs.settings import fields
from relearn_lens.show import report
from relearn_lens.sources import SOURCES
from tests.made import TINY

SETS = [part for key, value in TINY.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def printed(*arguments: str) -> str:
    """What a command that succeeds prints, with runs of blanks as one."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return re.sub(r"\s+", " ", result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run made by the command line, with what it printed beside it."""
    path = tmp_path_factory.mktemp("cli") / "run"
    result = CliRunner().invoke(app, ["run", "toy", "--out", str(path), *SETS])
    assert result.exit_code == 0, result.output
    (path.parent / "printed").write_text(result.stdout)
    return path


# --- without a run


def test_version_is_that_of_the_package():
    assert printed("--version").strip() == version("relearn-lens")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["presets"]])
def test_help_does_not_wait_for_torch(arguments):
    code = f"""
import sys
sys.argv = ["relearn-lens", *{arguments!r}]
from relearn_lens.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code
heavy = {{"torch", "transformers", "transformer_lens", "numpy", "pandas", "plotly"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_names_the_commands_and_options():
    text = printed("--help")
    for command in ("run", "show", "report", "fetch", "presets", "sources", "sites", "scores", "doctor"):
        assert re.search(rf"\b{command}\b", text), command
    text = printed("run", "--help")
    for option in ("--model", "--corpus", "--concept", "--out", "--set", "--fresh", "PRESET"):
        assert option in text


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "relearn_lens", "run", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"error: unknown preset 'nothing'; known: names, .*\n", done.stderr)


def test_presets_lists_presets_and_where_settings_are():
    text = printed("presets")
    for name, (says, _) in PRESETS.items():
        assert f"{name} {says}" in text
    assert "presets GROUP, one of run, data, prune, finetune, retrain, measure, grafts, block; --all" in text
    assert "prune.fraction" not in text


def test_presets_lists_every_setting_when_asked():
    text = printed("presets", "--all")
    assert all(name in text for name in PRESETS)
    for key, _, says in fields():
        assert key in text
        assert says.split(";")[0] in text, key


@pytest.mark.parametrize("group", ["prune", "measure", "run"])
def test_presets_lists_one_group_of_settings(group):
    lines = CliRunner().invoke(app, ["presets", group]).stdout.splitlines()
    keys = [line.split()[0] for line in lines[2:] if line and not line.startswith(" ")]
    assert keys == [key for key, _, _ in fields() if (key.partition(".")[0] if "." in key else "run") == group]


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_presets_fit_a_terminal_of_80_columns():
    import pty

    ours, theirs = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "TERM": "dumb"}
    with subprocess.Popen([sys.executable, "-m", "relearn_lens", "presets"], stdout=theirs, env=env) as process:
        os.close(theirs)
        text = b""
        while part := _read(ours):
            text += part
    os.close(ours)
    assert process.returncode == 0
    lines = text.decode().splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("settings:"))]
    assert len(lines) < 30
    assert all(len(line) <= 80 for line in table)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that the other end has closed
        return b""


def test_presets_refuses_an_unknown_group(error):
    assert error("presets", "pruning") == (
        "unknown group of settings 'pruning'; known: run, data, prune, finetune, retrain, measure, grafts, block"
    )


def test_sources_lists_what_can_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("RELEARN_LENS_CACHE", str(tmp_path))
    text = printed("sources")
    for source in SOURCES.values():
        assert source.name in text
        assert source.licence in text
    assert str(tmp_path) in text


def test_sites_lists_the_sites():
    text = printed("sites")
    assert all(name in text for name in SITES)
    assert all(family in text.replace(" ", "") for family in FAMILIES)
    assert "gain, writes" in text


def test_scores_lists_the_scores():
    text = printed("scores")
    assert all(f"{score.name} {score.unit} {score.says}" in text for score in SCORES.values())


def test_doctor_says_what_is_there_and_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("RELEARN_LENS_CACHE", str(tmp_path / "cache"))
    text = printed("doctor")
    for name in store.PACKAGES:
        assert f"{name} {version(name)}" in text
    assert "cpu (" in text
    assert str(tmp_path / "cache") in text.replace(" ", "")
    for name in SOURCES:
        assert f"source {name} not fetched relearn-lens fetch {name}" in text
    assert text.count(" of disk)") == 1
    assert not (tmp_path / "cache").exists()


def test_a_table_folds_what_is_long(monkeypatch):
    system = "Linux-" + "x86" * 40
    monkeypatch.setattr("platform.platform", lambda: system)
    text = CliRunner().invoke(app, ["doctor"]).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert system in "".join(text.split())


# --- a run


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_run_is_printed_whatever_the_encoding(encoding, folder, tmp_path, monkeypatch):
    place = shutil.copytree(folder, tmp_path / "Łódź 東 😀")
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding=encoding, errors="strict"))
    monkeypatch.setattr(sys, "argv", ["relearn-lens", "show", str(place)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    sys.stdout.flush()
    text = screen.getvalue().decode(encoding)
    assert "place in toy" in text
    # What the encoding lacks is written as JSON would, so that --json stays JSON.
    shown = "".join(c if c.encode(encoding, "ignore") else json.dumps(c)[1:-1] for c in place.name)
    assert shown in text
    # Our own signs have plain ones.
    assert ("place 1.00 → ." if encoding == "utf-8" else "place 1.00 -> .") in text
    assert ("東" in text) == (encoding == "utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_error_is_printed_whatever_the_encoding(encoding):
    env = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    command = [sys.executable, "-m", "relearn_lens", "run", "Ortsname-地名"]
    done = subprocess.run(command, capture_output=True, env=env, text=True, check=False, encoding=encoding)
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown preset 'Ortsname-\\u5730\\u540d'; known: names")


def test_run_prints_what_it_does_the_tables_and_the_story(folder):
    text = re.sub(r"\s+", " ", (folder.parent / "printed").read_text())
    assert "toy, toy, concept place, site mlp_post" in text
    assert re.search(r"sentences: train \d+, validation \d+, probe \d+; \d notes are on the page, .*--verbose", text)
    assert "note: " not in text
    assert "fine-tuning ..." not in text
    lines = re.findall(r"concept 1\.00 \.\d\d \d?\.\d\d \d?\.\d\d", text)  # base, cut, and two stages
    assert len(lines) == 2  # as it came, and at the end
    for question in ("gone?", "back?", "sooner?", "where?", "same?"):
        assert question in text
    assert str(folder / "report.html") in text
    assert (folder / "report.html").stat().st_size < 8_000_000


def test_show_prints_the_numbers_again(folder):
    shown, once = printed("show", str(folder)), re.sub(r"\s+", " ", (folder.parent / "printed").read_text())
    assert shown.startswith("place in toy")
    assert shown.partition(" report ")[0] in once
    assert "what_happened" not in shown


def test_show_json_is_the_summary(folder):
    result = CliRunner().invoke(app, ["show", str(folder), "--json"])
    assert json.loads(result.stdout) == json.loads((folder / "summary.json").read_text())


def test_compare_prints_the_run_beside_the_release(folder):
    text = printed("compare", str(folder))
    assert "not comparable: the model is toy, there distilbert-base-cased; the corpus is toy, there CoNLL-2003" in text
    assert "release 0.935 0.028 0.914 0.924 0.928 0.929" in text or "release 0.938 0.058 0.914" in text
    assert "difference" in text
    found = json.loads(CliRunner().invoke(app, ["compare", str(folder), "--json"]).stdout)
    assert {"variant", "differs", "source", "rows"} == set(found)
    assert "arXiv 2401.01814" in found["source"]


def test_compare_puts_runs_side_by_side(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "again")
    text = printed("compare", str(folder), str(tmp_path / "again"))
    assert "no setting differs" in text
    assert "arm run: F1 of place again: F1 of place" in text
    assert re.search(r"concept base stage 1\.000 \[.*\] 1\.000 \[", text)
    assert re.search(r"claims of the paper: verdict, effect run again C1 \w+ .*C9b \w+", text)


def test_run_says_every_note_and_phase_where_it_is_asked(called, capsys):
    from relearn_lens.cli.following import Following

    for verbose, phases in ((True, "fine-tuning ...\n"), (False, "")):
        follow = Following(None, verbose)
        follow.progress("fine-tuning (1)", 0, 2)
        assert capsys.readouterr().out == phases


@pytest.mark.parametrize(("said", "width"), [("60", 60), ("", 80), ("no number", 80)])
def test_tables_are_as_wide_as_columns_says_where_output_is_piped(monkeypatch, said, width):
    monkeypatch.setenv("COLUMNS", said)
    text = CliRunner().invoke(app, ["doctor"]).stdout
    assert 0.8 * width < max(map(len, text.splitlines())) <= width


def test_report_writes_the_page_again(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    assert printed("report", str(tmp_path / "run")).strip() == str(tmp_path / "run" / "report.html")
    assert "<html" in (tmp_path / "run" / "report.html").read_text()[:200]


@pytest.fixture
def undrawn(monkeypatch) -> list[Path]:
    """The page is not drawn, which takes a second; where it would be."""
    pages: list[Path] = []
    monkeypatch.setattr(report, "write_report", lambda _, path: pages.append(path) or path)
    return pages


def test_run_of_a_finished_folder_says_so_and_prints_it(folder, undrawn, monkeypatch):
    monkeypatch.setattr(store, "perform", lambda *_, **__: pytest.fail("it ran again"))
    text = printed("run", "toy", "--out", str(folder), *SETS)
    assert undrawn == [folder / "report.html"]
    assert "complete already; --fresh runs it again" in text
    assert "F1 of place base cut 6 10 steps" in text


def test_run_of_an_interrupted_folder_does_not_call_it_complete(folder, undrawn, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "run")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    finished = store.load_run(folder)
    monkeypatch.setattr(store, "run", lambda *_, **__: finished)
    assert "complete already" not in printed("run", "toy", "--out", str(tmp_path / "run"), *SETS)


@pytest.fixture
def called(monkeypatch) -> list[tuple]:
    """What `run` would have run, and into which folder."""
    calls: list[tuple] = []

    def run(experiment, out, **settings):
        calls.append((experiment, out, settings["fresh"]))
        raise ValueError("enough")

    monkeypatch.setattr(store, "run", run)
    return calls


def test_run_takes_its_options(error, called, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text('preset = "toy"\nmodel = "x"\n')
    error(
        "run", str(path), "--model", "m", "--corpus", "conll:c", "--concept", "LOC", "--out", "there", "--fresh",
        "--set", "prune.fraction=0.3", "--set", "seeds=[1, 2]",
    )  # fmt: skip
    ((experiment, out, fresh),) = called
    assert (experiment.model, experiment.corpus, experiment.labels) == ("m", "conll:c", ("LOC",))
    assert (experiment.prune.fraction, experiment.seeds) == (0.3, (1, 2))
    assert (out, fresh) == (Path("there"), True)


def test_run_folder_is_named_by_what_is_run(error, called, tmp_path):
    (tmp_path / "mine.toml").write_text('preset = "toy"\n')
    for arguments in (
        ["run"], ["run", "toy"], ["run", str(tmp_path / "mine.toml")], ["run", "toy", "--concept", "person"],
        ["run", "toy", "--set", "concept=person"], ["run", "toy", "--concept", "place"], ["run", "toy", "--model", "m"],
    ):  # fmt: skip
        error(*arguments)
    names = [out.as_posix() for _, out, _ in called]
    assert names[:3] == ["runs/names", "runs/toy", "runs/mine"]
    assert re.fullmatch(r"runs/toy-[0-9a-f]{6}", names[3])
    assert names[4] == names[3]  # the same settings
    assert names[5] == "runs/toy"  # nothing was changed
    assert names[6] not in names[:6]


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing"], r"unknown preset 'nothing'; known: names, .*toy"),
        (["run", "absent.toml"], r"no settings file at 'absent\.toml'"),
        (["run", "toy", "--model", "./nothing"], r"no model folder at './nothing'"),
        (["run", "toy", "--corpus", "nothing"], r"no corpus is called 'nothing'.*bsb-names.*conll:PATH"),
        (["run", "toy", "--corpus", "conll:/no/such"], r"/no/such does not exist"),
        (["run", "toy", "--concept", "river"], r"no label 'river' .*its labels are O, person, place"),
        (["run", "toy", "--set", "site=nowhere"], r"unknown site 'nowhere'; known: resid, mlp_post"),
        (["run", "toy", "--set", "score=magic"], r"unknown score 'magic'; known: .*probeless"),
        (["run", "toy", "--set", "prune.fraction"], r"--set 'prune\.fraction': write key=value"),
        (["run", "toy", "--set", "prune.fraction=0"], r"prune\.fraction = 0: .*greater than 0"),
        (["run", "toy", "--set", "prune.fraction=1.5"], r"prune\.fraction = 1\.5: .*less than or equal to 1"),
        (["run", "toy", "--set", "nothing=1"], r"unknown setting 'nothing'; known: model, "),
        (["show", "no/run"], r"'no/run' is no run folder"),
        (["show", "no/run", "--json"], r"'no/run' is no run folder"),
        (["report", "no/run"], r"'no/run' is no run folder"),
        (["compare", "no/run"], r"'no/run' is no run folder"),
        (["fetch", "nothing"], r"'nothing'.*minilm"),
    ],
)
def test_mistake_is_one_message(error, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    said = error(*arguments)
    assert re.search(message, said)
    assert "\n" not in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no words"),
        (b"one\ncolumn\n", "column"),
        (b"a O\nb\nc O\n", "2"),
        (b"caf\xe9 O\n", "utf-8|encoding"),
        (b"a Q-X\nb R-X\n" * 5, "Q|scheme"),
    ],
)
def test_bad_corpus_file_is_one_message_that_names_it(error, tmp_path, content, message):
    path = tmp_path / "text.conll"
    path.write_bytes(content)
    said = error("run", "toy", "--corpus", f"conll:{path}", "--set", "data.scheme=bio", "--out", str(tmp_path / "run"))
    assert "\n" not in said
    assert str(path) in said
    assert re.search(message, said.replace(str(path), ""))


def test_mistake_before_training_leaves_a_folder_that_can_be_used(error, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "load_run", lambda *_: pytest.fail("nothing was run"))
    out = ["--out", str(tmp_path / "run")]
    assert "river" in error("run", "toy", "--concept", "river", *out)
    assert "brook" in error("run", "toy", "--concept", "brook", *out)


def test_folder_of_another_run_is_refused(error, folder):
    said = error("run", "toy", "--out", str(folder), *SETS, "--set", "prune.fraction=0.5")
    assert re.search(r"holds a run with other settings \(prune\.fraction 0\.015625 there, 0\.5 here\).*--fresh", said)


def test_folder_that_is_no_run_is_refused(error, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "holds files that are no run" in error("run", "toy", "--out", str(tmp_path))
    assert "is a file" in error("run", "toy", "--out", str(tmp_path / "file"))


def test_operating_systems_message_names_the_file(error, tmp_path):
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in error("run", "toy", "--out", str(tmp_path / "file" / "run"))


def test_full_disk_is_one_message(error, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said = error("run", "toy", "--out", str(tmp_path / "run"))
    assert re.match(r"the disk is full: manifest\.json needs [\d,]+ bytes, .*same command again to continue", said)


@pytest.mark.parametrize("device", ["cuda:7", "gpu"])
def test_device_that_there_is_not_is_one_message(error, tmp_path, device, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device in error("run", "toy", "--out", str(tmp_path / "run"), "--set", f"device={device}")


def test_loss_that_is_not_finite_is_one_message(error, tmp_path):
    # With both as high as they may be, AdamW makes the weights up to 99 times as large in every step.
    off = [f"finetune.{change}" for change in ("lr=10", "weight_decay=10", "batch_size=4", "epochs=5")]
    said = error("run", "toy", "--out", str(tmp_path / "run"), *SETS, *[part for one in off for part in ("--set", one)])
    assert re.search("loss is nan|not finite", said)
    assert "learning rate" in said


def test_traceback_is_shown_when_asked(monkeypatch):
    monkeypatch.setenv("RELEARN_LENS_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["relearn-lens", "run", "nothing"])
    with pytest.raises(ValueError, match="unknown preset"):
        main()


def test_interrupt_says_that_the_same_command_continues(monkeypatch, capsys, tmp_path):
    def run(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "run", run)
    monkeypatch.setattr(sys, "argv", ["relearn-lens", "run", "toy", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert "stopped; the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["nothing"], ["run", "--nothing"], ["show"]])
def test_unknown_command_or_option_is_refused(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
