"""The README's code does what it says, on the real model and text."""

import re
from pathlib import Path

import pytest

from relearn_lens import sources

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.artefacts
def test_the_readmes_code_cuts_a_concept_and_sees_it_return(capsys):
    for name in ("minilm", "bsb-names"):
        if not sources.is_cached(name):
            pytest.skip(f"not in the cache: relearn-lens fetch {name}")
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    space: dict = {}
    exec(code, space)
    path, place = space["path"], space["place"].name
    assert path["pruned"].f1[place] < 0.2 * path["base"].f1[place]
    assert path[path.stages[-1]].f1[place] >= 0.8 * path["base"].f1[place]
    assert path["pruned"].f1["person"] > 0.8 * path["base"].f1["person"]
    assert "Grafts(margin" in capsys.readouterr().out
