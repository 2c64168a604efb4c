"""The committed notebooks as a reader meets them, and the same notebooks executed end to end on tiny data."""

import json
import pathlib
import re
import statistics
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import resnet_helpers as rh
from notebook_code import format_percent, stage_table

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:work|tmp|root|home|content|Users)/")
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
        assert len(source.splitlines()) <= 12 and max(map(len, source.splitlines())) <= 100, source
        for output, text in outputs(cell):
            assert output["output_type"] != "error" and output.get("name") != "stderr", text
            assert "\x1b" not in text and not MACHINE_PATH.search(text), text
            assert not any("widget" in kind or "svg" in kind for kind in output.get("data", {}))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_goes_in_small_steps(path):
    cells = json.loads(path.read_text())["cells"]
    code = [i for i, cell in enumerate(cells) if cell["cell_type"] == "code"]
    assert statistics.median(len("".join(cells[i]["source"]).splitlines()) for i in code) <= 5
    assert sum(cells[i - 1]["cell_type"] != "markdown" for i in code) <= len(code) / 4  # without a word before them


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "README.md"], ids=lambda path: path.stem)
def test_relative_links_lead_somewhere(path):
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("http") or (path.parent / target).exists(), target


@pytest.fixture
def papermill(tiny_cats, tmp_path, monkeypatch):
    """The README's command for notebooks, each in a process of its own at the same time, on tiny data."""
    monkeypatch.setenv("RESNET_PROFILE", "test")
    monkeypatch.setenv("RESNET_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # as in the Makefile
    settings = tmp_path / "ipython" / "profile_default" / "ipython_kernel_config.py"
    settings.parent.mkdir(parents=True)
    settings.write_text("c.IPKernelApp.capture_fd_output = False")

    def run(*notebooks):
        """Execute pairs of a notebook's path and parameters, and return the executed copies."""
        outs = [tmp_path / f"{i}-{path.name}" for i, (path, _) in enumerate(notebooks)]
        started = [subprocess.Popen(
            [sys.executable, "-m", "papermill", path, out, "--cwd", path.parent, "-k", "python3",
             "--no-progress-bar", *(["-y", parameters] if parameters else [])],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for out, (path, parameters) in zip(outs, notebooks)]
        for process in started:
            said, _ = process.communicate(timeout=600)
            assert process.returncode == 0, said[-3000:]
        for cell in (cell for out in outs for cell in json.loads(out.read_text())["cells"]):
            assert not [text for output, text in outputs(cell) if output.get("name") == "stderr"]
        return outs

    return run


DATA, MODELS, TRAINING, ABLATION, APPENDIX = NOTEBOOKS


def test_training_and_ablation_run(papermill, tmp_path):
    """Notebook 3 as two machines would run it, at the same time into one results folder; then notebook 4."""
    papermill(*((TRAINING, f"{{networks: [plain34, resnet34], seeds: [{seed}]}}") for seed in (0, 1)))
    [shown] = papermill((ABLATION, ""))
    assert "A SMOKE RUN" in shown.read_text()
    folder = tmp_path / "results" / "test" / "cats_vs_dogs"
    runs = rh.read_runs(folder)
    assert len(runs.groupby(["model", "seed"])) == 4 and len(runs) == 8
    table, markdown = both_tables(runs)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "ablation.csv", index_col=0), table, check_dtype=False)
    saved = (folder / "ablation.md").read_text().strip()
    assert saved == markdown and re.search(r"\| [+-]\d+\.\d \[", saved)  # "+6.0" and not 6


@pytest.mark.parametrize("path", (DATA, MODELS, APPENDIX), ids=lambda path: path.stem)
def test_notebook_runs(papermill, path):
    papermill((path, ""))


def every_run():
    """All committed runs; `variant` is what their files' names have between network and seed, as in notebook 4."""
    runs = rh.read_runs(ROOT / "results" / "full" / "cats_vs_dogs")
    return runs.assign(variant=runs.file.str.extract(r"^[a-z]+\d+(.*)-seed", expand=False))


def committed_runs():
    runs = every_run()
    return runs[runs.variant == ""]


def both_tables(runs):
    """Validation beside training accuracy, as notebook 4 saves them: numbers (ablation.csv) and Markdown."""
    table, training = rh.ablation_table(runs), rh.ablation_table(runs, "accuracy")
    beside = format_percent(training)[["plain", "residual"]].add_prefix("training: ")
    return (table.join(training.drop(columns="seeds").add_prefix("training: ")),
            format_percent(table).join(beside).to_markdown(disable_numparse=True))


def test_notebook_4_tells_the_committed_runs():
    """Every number in its conclusions, computed from the result files."""
    cells = json.loads((ROOT / "notebooks" / "04_ablation.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    every, runs = every_run(), committed_runs()
    table, training = 100 * rh.ablation_table(runs), 100 * rh.ablation_table(runs, "accuracy")
    say = [f"committed runs there are {runs.seed.nunique()} seeds"]
    for depth, row in table.iterrows():
        low, high = row.difference - row["95% half width"], row.difference + row["95% half width"]
        verdict = "includes 0" if low < 0 < high else "leaves out 0"
        say += [f"- **{depth}:** {row.residual:.1f}% with shortcuts against {row.plain:.1f}% without, "
                if depth == "18 layers" else f"- **{depth}:** {row.residual:.1f}% against {row.plain:.1f}%, ",
                f"{row.difference:+.1f} points, and {training.difference[depth]:+.1f} in training",
                f"nterval from {low:+.1f} to {high:+.1f} {verdict}"]
    (plain, plain_training), (residual, residual_training) = (
        [part[kind].iloc[-1] - part[kind].iloc[0] for part in (table, training)] for kind in ("plain", "residual"))
    say += [f"plain networks change by {plain:+.1f} points in validation and {plain_training:+.1f} in training, "
            f"residual networks by {residual:+.1f} and {residual_training:+.1f}"]
    end = runs[runs.epoch == runs.epochs]
    say += [f"training loss ends at {end.loss[end.model == 'plain50'].mean():.3f}, and guessing has {np.log(2):.3f}"]
    size = {name: stage_table(rh.create_model(name)).parameters["total"] for name in set(runs.model)}
    say += [", ".join(f"{size[f'resnet{d}'] / size[f'plain{d}'] - 1:.1%} at {d} layers" for d in (18, 34, 50))]

    last = every[(every.epoch == every.epochs) & (every.seed == 0)].copy()
    padded = last[last.variant == "-shortcut_zero_pad"].set_index("model").val_accuracy * 100
    rates = last[last.variant.str.fullmatch(r"(-learning_rate_[0-9.e-]+)?")]
    rates = 100 * rates.pivot(index="learning_rate", columns="model", values="val_accuracy")
    one = rates.loc[0.001]
    say += [f"{padded.resnet34:.1f} against {one.resnet34:.1f}% at 34 layers and {padded.resnet50:.1f} against "
            f"{one.resnet50:.1f}% at 50"]
    for depth, tried in ((34, (0.0003, 0.001, 0.003)), (18, (0.001, 0.003, 0.01)), (50, (0.001, 0.003))):
        gaps = (rates[f"resnet{depth}"] - rates[f"plain{depth}"]).dropna()
        assert (gaps > 0).all() and set(gaps.index) == set(tried), "notebook 4 tells of other rates"
        is_ = "is " if depth == 34 else ""
        told = [f"{gaps[rate]:+.1f} at {rate}" for rate in tried]
        say += [f"at {depth} layers {is_}" + (", ".join(told[:-1]) + " and " + told[-1])]
    gain = rates.loc[0.003] - one
    say += [f"gain {gain.plain34:.1f} and {gain.plain50:.1f} points, while ResNet-50 loses {-gain.resnet50:.1f}"]
    yardstick = every[(every.variant == "-epochs_5-learning_rate_0.003") & (every.model == "resnet20")].iloc[-1]
    say += [f"reaches {100 * yardstick.val_accuracy:.1f}% after {yardstick.epoch} epochs"]
    assert 100 * yardstick.val_accuracy > table[["plain", "residual"]].max().max(), "the yardstick is not ahead"
    sizes = [rh.create_model(name).count_params() for name in ("resnet34", "resnet20")]
    assert f"{sizes[0] / sizes[1]:.0f} times fewer parameters" in text
    for words in say:
        assert words in text, words


def test_notebook_3_tells_the_committed_runs():
    cells = json.loads((ROOT / "notebooks" / "03_training.ipynb").read_text())["cells"]
    takeaways = next("".join(cell["source"]) for cell in cells if "Key takeaways" in "".join(cell["source"]))
    runs = committed_runs()
    end = runs[(runs.epoch == runs.epochs) & (runs.seed == 0)].set_index("model").loss
    assert (f"ResNet-34 falls to {end.resnet34:.3f}, of ResNet-50 to {end.resnet50:.3f} and of plain-34 to "
            f"{end.plain34:.3f}: all three learn. plain-50 ends at {end.plain50:.3f}, hardly below guessing "
            f"({np.log(2):.3f})") in takeaways


def test_readme_csv_and_histories_agree():
    table, markdown = both_tables(committed_runs())
    saved = pd.read_csv(ROOT / "results" / "ablation.csv", index_col=0)
    pd.testing.assert_frame_equal(saved, table, check_dtype=False)
    (shown,) = TABLE.findall((ROOT / "README.md").read_text())
    opening = (ROOT / "README.md").read_text().split("![")[0]
    assert all(f"{100 * difference:+.1f} " in opening for difference in table.difference), "the prose has old numbers"
    assert shown == markdown == (ROOT / "results" / "ablation.md").read_text().strip()


def test_readme_tells_the_networks_of_section_4_2():
    runs = every_run()
    networks = ["plain20", "resnet20", "plain56", "resnet56"]
    runs = runs[(runs.variant == "-learning_rate_0.003") & runs.model.isin(networks)]
    table, readme = rh.ablation_table(runs), (ROOT / "README.md").read_text()
    assert set(table.seeds) == {1} and "so far with one seed" in readme, "README tells of one seed"
    (low, shallow), (high, deep) = (100 * table).iterrows()
    assert f"{shallow.plain:.1f} and {shallow.residual:.1f}% without and with shortcuts at {low}, " in readme
    assert f"{deep.plain:.1f} and {deep.residual:.1f}% at {high}" in readme


def test_readme_tells_the_checks():
    every = rh.read_runs(ROOT / "results" / "full" / "cats_vs_dogs")
    readme, last = (ROOT / "README.md").read_text(), every[(every.epoch == every.epochs) & (every.seed == 0)]
    accuracy = 100 * last.set_index(["model", "shortcut", "learning_rate"]).val_accuracy
    for rate in (0.0003, 0.001, 0.003):
        gap = accuracy["resnet34", "projection", rate] - accuracy["plain34", "none", rate]
        assert f"{gap:+.1f} at {rate}" in readme
    for rate in (0.001, 0.003):
        gap = accuracy["resnet50", "projection", rate] - accuracy["plain50", "none", rate]
        assert f"{gap:+.1f} at {rate}" in readme
    assert f"({accuracy['plain50', 'none', 0.003]:.1f}%)" in readme
    assert f"({accuracy['resnet50', 'projection', 0.003]:.1f}%)" in readme
    for depth in (34, 50):  # "no smaller" without parameters
        assert accuracy[f"resnet{depth}", "zero_pad", 0.001] >= accuracy[f"resnet{depth}", "projection", 0.001]
        assert f"{accuracy[f'resnet{depth}', 'zero_pad', 0.001]:.1f}%" in readme


def test_readme_shows_the_benchmark():
    (shown,) = re.findall(r"<!-- throughput -->\n+(.*?)\n+<!-- /throughput -->", (ROOT / "README.md").read_text(), re.S)
    assert shown == (ROOT / "results" / "throughput.md").read_text().strip()


def test_readme_pandas_lines_give_the_table(monkeypatch):
    (lines,) = re.findall(r"```python\n(import json.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(lines.strip().splitlines()) <= 10
    monkeypatch.chdir(ROOT)
    scope = {}
    exec(lines, scope)
    table, ours = scope["table"], rh.ablation_table(committed_runs())
    for depth in (18, 34, 50):
        assert table.loc[f"plain{depth}"] == pytest.approx(ours.plain[f"{depth} layers"])
        assert table.loc[f"resnet{depth}"] == pytest.approx(ours.residual[f"{depth} layers"])
