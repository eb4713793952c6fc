"""Several processes at one run: what two find is what one finds, and only one of them writes."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from relearn_lens.models import processes
from relearn_lens.runs.store import load_run
from tests.interruptions import difference
from tests.processes import KINDS, study_and_run
from tests.spare import PLAIN, ours

TORCHRUN = [*PLAIN.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
CLOSE = 1e-4
"""Of the largest number in a tensor. Sums of float32 in another order, through the steps of AdamW, which divides by the
size of the gradient."""
ROOT = Path(__file__).parents[2]


def ran(command: list[str]) -> None:
    """A command that must end well; its processes are no forks of this one, which would have what tests left in it."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as started:
        try:
            _, err = started.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            started.terminate()  # the launcher ends those that it started, each in a session of its own
            raise
    assert started.returncode == 0, err[-3000:]


def apart(one: Tensor, other: Tensor) -> float:
    """Largest difference, as a share of the largest number."""
    largest = one.double().nan_to_num().abs().max().clamp(min=1e-12)
    return float((one.double() - other.double()).nan_to_num().abs().max() / largest)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folders `one`, of this process (in two parts a step), and `two`, of two."""
    folder = tmp_path_factory.mktemp("processes")
    study_and_run(folder / "one", 2)
    ran([*TORCHRUN, *ours().python, "-m", "tests.processes", str(folder / "two")])
    return folder


@pytest.fixture(scope="module")
def studies(made) -> dict[str, list[dict[str, Tensor]]]:
    """By family, what one process found and what two did."""
    return {kind: [load_file(made / n / f"{kind}.safetensors") for n in ("one", "two")] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_find_what_one_finds(studies, kind):
    one, two = studies[kind]
    one, two = ({k: v for k, v in side.items() if "rows" not in k} for side in (one, two))
    assert one.keys() == two.keys()
    assert {name.split("/")[0] for name in one} >= {"weights", "mean", "probeless", "auroc", "conductance", "f1"}
    worst = {name: apart(one[name], two[name]) for name in one}
    assert max(worst.values()) < CLOSE, sorted(worst.items(), key=lambda entry: -entry[1])[:5]
    for name, value in one.items():
        assert torch.equal(value.isnan(), two[name].isnan()), name
        if not value.is_floating_point():
            assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_share_the_work(studies, kind):
    one, two = studies[kind]
    for name in {"rows", "language/rows"} & one.keys():
        # The first batch, of long sentences, holds fewer of them: the halves are not quite even.
        assert one[name].item() == pytest.approx(two[name].sum().item(), rel=0.03)
        assert two[name].min() > 0.4 * two[name].sum()


def test_a_run_in_two_processes_is_that_of_one(made):
    one, two = load_run(made / "one" / "run"), load_run(made / "two" / "run")
    assert two.manifest["processes"] == 2
    (here,), (there,) = one.arms["concept"], two.arms["concept"]
    assert here.stages == there.stages
    assert here.removed == there.removed
    for stage in here.stages:
        shown = [arm[stage].scores.shown(one.label) for arm in (here, there)]
        assert shown[0] == pytest.approx(shown[1], abs=1e-6)
        assert apart(here[stage].saliency.score, there[stage].saliency.score) < CLOSE


def test_a_run_in_two_processes_goes_on_wherever_it_stopped_to_the_bit(made):
    assert difference(made / "two" / "run", made / "two" / "stopped") == ""
    assert (made / "two" / "stops").read_text() == "4"


def test_alone_there_is_nothing_to_share():
    assert (processes.size(), processes.rank(), processes.is_first()) == (1, 0, True)
    batches, x = list(range(5)), torch.arange(3.0)
    assert processes.share(batches) is batches
    assert not processes.is_shared(5)
    assert processes.agreed(x) is x
    processes.sum_(x)
    processes.sum_many_([x])
    processes.wait()
    assert x.tolist() == [0.0, 1.0, 2.0]
