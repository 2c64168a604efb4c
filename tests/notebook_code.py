"""Functions that the notebooks define, for tests of their numbers."""

import json
import math
import pathlib

import numpy as np
import pandas as pd
import resnet_helpers as rh

NOTEBOOKS = pathlib.Path(__file__).resolve().parents[1] / "notebooks"


def from_notebook(name, *definitions):
    """Run the cells that begin with these, such as "def count_layer"; return the last function."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {"rh": rh, "np": np, "pd": pd, "math": math}
    for definition in definitions:
        exec(next(source for source in sources if source.startswith(definition)), names)
    return names[definitions[-1].split()[-1]]


stage_table = from_notebook("02_models", "STAGES", "def count_layer", "def stage_table")
format_percent = from_notebook("04_ablation", "def format_percent")
