"""The committed notebooks as a reader meets them, and the same notebooks executed end to end on tiny data."""

import json
import pathlib
import re
import subprocess
import sys

import pandas as pd
import pytest
import resnet_helpers as rh

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:work|tmp|root|home|content|Users)/")
# What TensorFlow prints when it is loaded and when it looks for a GPU; no setting stops it.
NATIVE = re.compile(r"WARNING: All log messages before absl|[IWE]0000 \d|To enable the following|^\s*$")
TABLE = re.compile(r"<!-- ablation -->\n+(.*?)\n+<!-- /ablation -->", re.S)


def outputs(cell):
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        yield output, "".join([*output.get("text", []), *data.get("text/plain", []), *data.get("text/html", [])])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_one_clean_run(path):
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 1_000_000 and "widgets" not in notebook["metadata"]
    for cell in code:
        source = "".join(cell["source"])
        assert len(source.splitlines()) <= 20 and max(map(len, source.splitlines())) <= 110, source
        for output, text in outputs(cell):
            assert output["output_type"] != "error" and output.get("name") != "stderr", text
            assert "\x1b" not in text and not MACHINE_PATH.search(text), text
            assert not any("widget" in kind or "svg" in kind for kind in output.get("data", {}))


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "README.md"], ids=lambda path: path.stem)
def test_relative_links_lead_somewhere(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (path.parent / target).exists(), target


def papermill(path, out, parameters=""):
    """Start the README's command for one notebook in a process of its own."""
    command = [sys.executable, "-m", "papermill", path, out, "--cwd", path.parent, "-k", "python3", "--no-progress-bar"]
    return subprocess.Popen([*map(str, command), *(["-y", parameters] if parameters else [])],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_notebooks_run_end_to_end(tiny_cats, tmp_path, monkeypatch):
    """The series on tiny data; notebook 3 as two machines would run it, at the same time into one results folder."""
    monkeypatch.setenv("RESNET_PROFILE", "test")
    monkeypatch.setenv("RESNET_RESULTS", str(tmp_path / "results"))
    data, models, training, ablation, _ = NOTEBOOKS  # the appendix takes minutes; its committed page is checked above
    stages = [[(data, "", "1")], [(models, "", "2")],
              [(training, "{networks: [plain34, resnet34], seeds: [0]}", "3a"),
               (training, "{networks: [plain50, resnet50], seeds: [0]}", "3b")], [(ablation, "", "4")]]
    for stage in stages:
        started = [papermill(path, tmp_path / f"{name}.ipynb", parameters) for path, parameters, name in stage]
        for process in started:
            said, _ = process.communicate(timeout=600)
            assert process.returncode == 0, said[-3000:]
    runs = rh.read_runs(tmp_path / "results" / "test" / "cats_vs_dogs")
    assert sorted(runs.model.unique()) == ["plain34", "plain50", "resnet34", "resnet50"] and len(runs) == 8
    table = pd.read_csv(tmp_path / "results" / "test" / "cats_vs_dogs" / "ablation.csv", index_col=0)
    pd.testing.assert_frame_equal(table, both_tables(runs)[0], check_dtype=False)
    assert "A SMOKE RUN" in (tmp_path / "4.ipynb").read_text()
    for path in tmp_path.glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            said = [text for output, text in outputs(cell) if output.get("name") == "stderr"]
            assert not [line for line in "".join(said).splitlines() if not NATIVE.match(line)], path.name


def committed_runs():
    runs = rh.read_runs(ROOT / "results" / "full" / "cats_vs_dogs")
    return runs[runs.variant == ""]


def both_tables(runs):
    """Validation beside training accuracy, as notebook 4 saves them: numbers (ablation.csv) and Markdown."""
    table, training = rh.ablation_table(runs), rh.ablation_table(runs, "accuracy")
    beside = rh.format_percent(training)[["plain", "residual"]].add_prefix("training: ")
    return (table.join(training.drop(columns="seeds").add_prefix("training: ")),
            rh.format_percent(table).join(beside).to_markdown())


def test_readme_csv_and_histories_agree():
    table, markdown = both_tables(committed_runs())
    saved = pd.read_csv(ROOT / "results" / "ablation.csv", index_col=0)
    pd.testing.assert_frame_equal(saved, table, check_dtype=False)
    (shown,) = TABLE.findall((ROOT / "README.md").read_text())
    opening = (ROOT / "README.md").read_text().split("![")[0]
    assert all(f"{100 * difference:+.1f} " in opening for difference in table.difference), "the prose has old numbers"
    assert shown == markdown == (ROOT / "results" / "ablation.md").read_text().strip()


def test_readme_tells_the_checks():
    every = rh.read_runs(ROOT / "results" / "full" / "cats_vs_dogs")
    readme, last = (ROOT / "README.md").read_text(), every[(every.epoch == every.epochs) & (every.seed == 0)]
    accuracy = 100 * last.set_index(["model", "shortcut", "learning_rate"]).val_accuracy
    for rate in (0.0003, 0.001, 0.003):
        gap = accuracy["resnet34", "projection", rate] - accuracy["plain34", "none", rate]
        assert f"{gap:+.1f} at {rate}" in readme
    for depth in (34, 50):  # "no smaller" without parameters
        assert accuracy[f"resnet{depth}", "zero_pad", 0.001] >= accuracy[f"resnet{depth}", "projection", 0.001]
        assert f"{accuracy[f'resnet{depth}', 'zero_pad', 0.001]:.1f}%" in readme


def test_readme_shows_the_benchmark():
    (shown,) = re.findall(r"<!-- throughput -->\n+(.*?)\n+<!-- /throughput -->", (ROOT / "README.md").read_text(), re.S)
    assert shown == (ROOT / "results" / "throughput.md").read_text().strip()


def test_readme_pandas_lines_give_the_table(monkeypatch):
    (lines,) = re.findall(r"```python\n(import json.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(lines.strip().splitlines()) <= 12
    monkeypatch.chdir(ROOT)
    scope = {}
    exec(lines, scope)
    table, ours = scope["table"], rh.ablation_table(committed_runs())
    for depth in (18, 34, 50):
        assert table.loc[f"plain{depth}"] == pytest.approx(ours.plain[f"{depth} layers"])
        assert table.loc[f"resnet{depth}"] == pytest.approx(ours.residual[f"{depth} layers"])
