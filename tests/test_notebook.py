"""The notebook runs from the first cell to the last, at smoke size, as a fresh kernel does it."""

from __future__ import annotations

import math
import os
import queue
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.smoke_runs import ROOT, write_fashion

NOTEBOOK = ROOT / "experiments" / "colab.ipynb"
# A kernel without a terminal, and sockets that its client leaves to the garbage collector.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def run(notebook: Any, folder: Path, **parameters: Any) -> list[Any]:
    """All outputs, executed in ``folder`` with other values of the first code cell's variables."""
    first = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    names = {line.partition(" =")[0] for line in notebook.cells[first].source.splitlines()}
    assert names >= set(parameters)
    lines = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(lines))
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.on_notebook_start = lambda notebook: look_again(client)
    client.execute(cwd=str(folder), env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def look_again(client: NotebookClient) -> None:
    """Makes the client look for replies every second, whether or not it was told of one.

    Of an Output widget's changes nbclient tells the kernel on the socket whose replies it awaits,
    which may swallow the notice of a reply: it would then sleep until its timeout.
    """
    assert client.kc is not None
    channel: Any = client.kc.shell_channel
    get = channel.get_msg

    async def get_msg(timeout: float | None = None) -> Any:
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return await get(timeout=1)
            except queue.Empty:
                if time.monotonic() > end:
                    raise

    channel.get_msg = get_msg


def drawn_by_sliders(notebook: Any) -> list[list[Any]]:
    """Outputs of every interactive function; an exception in one would be such an output."""
    widgets = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]
    return [
        widget["state"]["outputs"]
        for widget in widgets.values()
        if widget["model_name"] == "OutputModel"
    ]


@pytest.mark.slow
def test_from_training_to_samples(notebook, tmp_path):
    os.symlink(ROOT, tmp_path / "ar_jax_project")
    source = write_fashion(tmp_path / "images")
    outputs = run(notebook, tmp_path, MODE="smoke", SOURCE=source, NUM_IMAGES=20)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    # Reconstructions, samples while training, edits, four of the report.
    assert len(pictures) == 7
    interactive = drawn_by_sliders(notebook)
    assert [len(drawn) for drawn in interactive] == [1, 1]
    assert all("image/png" in drawn[0].get("data", {}) for drawn in interactive)
    tables = [output["data"].get("text/markdown", "") for output in outputs if "data" in output]
    assert sum("| generation: frechet_ratio |" in table for table in tables) == 1
    evaluation = tmp_path / "notebook_runs" / "var" / "evaluation"
    assert (evaluation / "report.md").exists() and (evaluation / "samples.npz").exists()


def test_it_is_stored_without_results(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    nbformat.validate(notebook)
    assert "tensorflow" not in "".join(cell.source for cell in code).lower()
