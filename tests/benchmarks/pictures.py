"""`assets/notebooks/NN.png`: the figure that each notebook ends with, as it is on the toy. It needs the extra `png`."""

from __future__ import annotations

from pathlib import Path

import nbformat
import plotly.graph_objects as go
from nbclient import NotebookClient

from relearn_lens.show import plots

ROOT = Path(__file__).parents[2]
PLOTLY = "application/vnd.plotly.v1+json"


def pictures() -> None:
    """Run every notebook, and draw its last figure small."""
    folder = ROOT / "assets" / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, kernel_name="python3", timeout=600).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        *_, last = (output.data[PLOTLY] for output in outputs if PLOTLY in output.get("data", {}))
        figure = go.Figure(data=last["data"], layout=last["layout"])
        file = folder / f"{path.stem[:2]}.png"
        print(plots.save_png(figure, file, width=900, height=int(last["layout"].get("height", 450)), scale=0.5))
