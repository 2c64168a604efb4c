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


def gpu_runs():
    """The runs of the two main tables, Table 1's networks at their own rates and section 4.2's; the rates; all runs."""
    rates = pd.read_csv(ROOT / "results" / "rates.csv", index_col="model").own_rate
    every = rh.read_runs(ROOT / "results" / "gpu")
    usual = every[(every.epochs == 15) & ~every.zero_gamma & (every.seed > 0)]
    return (usual[usual.learning_rate == usual.model.map(rates)], usual[~usual.model.isin(rates.index)], rates, every)


def both_tables(runs, rates=None):
    """Validation beside training accuracy, as notebook 4 saves them: numbers (ablation.csv) and Markdown."""
    table, training = rh.ablation_table(runs, rates=rates), rh.ablation_table(runs, "accuracy", rates)
    shown = format_percent(table).join(format_percent(training)[["plain", "residual"]].add_prefix("training: "))
    if rates is not None:
        shown["rates"] = [f"{rates[f'plain{depth}']:g}, {rates[f'resnet{depth}']:g}" for depth in (18, 34, 50)]
    return (table.join(training.drop(columns="seeds").add_prefix("training: ")),
            shown.to_markdown(disable_numparse=True))


def test_the_rates_follow_the_rule():
    """predictions.md: the lowest training loss in the last epoch, seed 0; one further where the largest won."""
    *_, every = gpu_runs()
    own = pd.read_csv(ROOT / "results" / "rates.csv", index_col="model")
    for model, row in own.iterrows():
        runs = every[(every.model == model) & (every.seed == 0) & (every.epochs == 15) & ~every.zero_gamma]
        losses = runs[runs.epoch == 15].set_index("learning_rate").loss
        assert set(losses.index) >= {0.001, 0.003, 0.01} | ({0.0003} if model in ("plain34", "plain50") else set())
        assert row.own_rate == losses.idxmin()
        assert row.own_rate < max(losses.index) or row.own_rate > 0.01  # not the edge of what was tried
        assert row.drop("own_rate").dropna().rename(float).to_dict() == pytest.approx(losses.to_dict(), rel=1e-3)


def test_the_gpu_saw_the_same_images():
    runs, committed = gpu_runs()[-1], every_run()
    for key in ("images_crc32", "labels_crc32"):
        assert set(runs[key]) == set(committed[key].dropna())
    assert set(runs.device) == {"GPU x86_64"} and set(committed.device) == {"CPU x86_64"}
    assert f"{runs.file.nunique()} runs" in (ROOT / "results" / "gpu" / "README.md").read_text()


def markdown_of(name):
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def test_notebook_4_tells_the_committed_runs():
    """Every number in its conclusions, computed from the result files."""
    text, say = markdown_of("04_ablation"), []
    main, small, rates, gpu = gpu_runs()
    tables = []
    for runs, own in ((main, rates), (small, None)):
        table, training = 100 * rh.ablation_table(runs, rates=own), 100 * rh.ablation_table(runs, "accuracy", own)
        tables += [table]
        for depth, row in table.iterrows():
            low, high = interval(row)
            with_, without = (" with shortcuts", " without") if depth == table.index[0] else ("", "")
            start, end = ("Undecided: the", "includes 0") if low < 0 < high else ("The", "leaves out 0")
            say += [f"- **{depth}:** {row.residual:.1f}%{with_} against {row.plain:.1f}%{without}, "
                    f"{row.difference:+.1f} points, and {training.difference[depth]:+.1f} in training. "
                    f"{start} interval from {low:+.1f} to {high:+.1f} {end}"]
        (plain, plain_training), (residual, residual_training) = (
            [part[kind].iloc[-1] - part[kind].iloc[0] for part in (table, training)] for kind in ("plain", "residual"))
        say += [f"plain networks change by {plain:+.1f} points in validation and {plain_training:+.1f} in training, "
                f"residual networks by {residual:+.1f} and {residual_training:+.1f}"]
    table, small_table = tables
    say += [f"there are {main.seed.nunique()} seeds at own rates and {small.seed.nunique()} of section 4.2's networks",
            f"plain accuracy falls by {-plain:.1f} points from 20 to 56 layers and residual accuracy "
            f"by {-residual:.1f}",
            f"the plain ones lose {-plain:.1f} points",
            "{:.1f}, {:.1f} and {:.1f}%. Those of section 4.2 are not: {:.1f}, {:.1f} and {:.1f}%".format(
                *table.residual, *small_table.residual)]
    end = gpu[gpu.epoch == gpu.epochs]
    hour = end[end.epochs == 60].set_index("model").val_accuracy * 100
    slow = end[(end.model == "plain50") & (end.epochs == 45)].iloc[0]
    assert gpu[(gpu.epochs == 45) & (gpu.epoch == 30)].loss.item() > 0.98 * np.log(2)  # "near guessing again"
    loss = main[(main.model == "plain50") & (main.epoch == 15)].loss.mean()
    say += [f"ResNet-56 has {hour.resnet56:.1f}% and ResNet-20 {hour.resnet20:.1f}%",
            f"training loss ends at {loss:.3f}, and guessing has {np.log(2):.3f}. With 45 epochs it reaches "
            f"{slow.loss:.3f} and {100 * slow.val_accuracy:.1f}%"]
    size = {name: rh.create_model(name).count_params() for name in [*rates.index, "resnet20", "resnet56", "plain56"]}
    trained = {name: stage_table(rh.create_model(name)).parameters["total"] for name in rates.index}
    say += [", ".join(f"{trained[f'resnet{d}'] / trained[f'plain{d}'] - 1:.1%} at {d} layers" for d in (18, 34, 50))]
    say += [f"ResNet-20 has {size['resnet34'] / size['resnet20']:.0f} times fewer parameters than ResNet-34 and "
            f"reaches {small_table.residual['20 layers']:.1f}%"]
    assert all(part.plain.is_monotonic_decreasing for part in (table, small_table))
    assert all(rh.ablation_table(runs, "accuracy", own).plain.is_monotonic_decreasing
               for runs, own in ((main, rates), (small, None)))  # "in the plain networks training accuracy falls, too"
    card = (ROOT / "results" / "weights" / "README.md").read_text()
    assert "average {:.1f}% (ResNet-20) and {:.1f}% (ResNet-56)".format(
        *small_table.residual[["20 layers", "56 layers"]]) in card
    assert small_table.residual["20 layers"] > table[["plain", "residual"]].max().max(), "the yardstick is not ahead"
    assert size["resnet56"] == size["plain56"]  # "equal parameters"

    tried = end[(end.seed == 0) & (end.epochs == 15) & ~end.zero_gamma]
    tried = 100 * tried.pivot(index="learning_rate", columns="model", values="val_accuracy")
    tried = tried.loc[[0.001, 0.003, 0.01]]
    gaps = {depth: tried[f"resnet{depth}"] - tried[f"plain{depth}"] for depth in (18, 34, 50)}
    say += ["{:+.1f} at 0.001, {:+.1f} at 0.003 and {:+.1f} at 0.01 with 18 layers, ".format(*gaps[18])
            + "{:+.1f}, {:+.1f} and {:+.1f} with 34, ".format(*gaps[34])
            + "and {:+.1f}, {:+.1f} and {:+.1f} with 50".format(*gaps[50])]
    assert (gaps[34] > 0).all() and (gaps[50] > 0).all()  # "ahead at every rate"
    drop = tried.loc[0.003] - tried.loc[0.01]
    say += [f"plain-34 loses {drop.plain34:.1f} points from 0.003 to 0.01, and ResNet-34 {drop.resnet34:.1f}"]
    losses = pd.read_csv(ROOT / "results" / "rates.csv", index_col="model").loc["resnet34"]
    say += ["ResNet-34's are {:.3f}, {:.3f} and {:.3f} at 0.001, 0.003 and 0.01".format(
        *losses[["0.001", "0.003", "0.01"]])]
    common, every = 100 * rh.ablation_table(committed_runs()), every_run()
    say += [f"at 34 layers is {common.difference['34 layers']:+.1f} at the common rate and "
            f"{table.difference['34 layers']:+.1f} with each network at its own"]
    assert round(common.difference["34 layers"] / table.difference["34 layers"]) == 5  # "five times as large"
    say += [f"ResNet-50 gains {zero_gamma(gpu)['resnet50'].diff().iloc[-1]:.1f} points at 0.001"]
    say += ["".join(second_look(every, rates))]
    last = every[(every.epoch == every.epochs) & (every.seed == 0)].set_index("model")
    padded = last[last.variant == "-shortcut_zero_pad"].val_accuracy * 100
    one = last[last.variant == ""].val_accuracy * 100
    say += [f"{padded.resnet34:.1f} against {one.resnet34:.1f}% at 34 layers and {padded.resnet50:.1f} against "
            f"{one.resnet50:.1f}% at 50"]
    for words in say:
        assert words in text, words


def interval(row):
    """The difference's 95% confidence interval, from a row of `ablation_table`."""
    return row.difference - row["95% half width"], row.difference + row["95% half width"]


def second_look(every, rates):
    """The 34-layer pair with seeds from 4 on, on two cores: accuracies and difference, as the pages put them."""
    again = every[(every.seed > 3) & every.model.isin(["plain34", "resnet34"])]
    row = 100 * rh.ablation_table(again, rates=rates).loc["34 layers"]
    low, high = interval(row)
    assert len(again) == 30 * again.seed.nunique() and low < 0 < high
    return (f"ResNet-34 has {row.residual:.1f}% and plain-34 {row.plain:.1f}%: ",
            f"{row.difference:+.1f} points, with an interval from {low:+.1f} to {high:+.1f}")


def test_the_appendix_tells_the_outcomes():
    """The five predictions, each checked and told; the correlation; the landscapes."""
    text, (main, small, rates, gpu) = markdown_of("appendix_why"), gpu_runs()
    table = 100 * rh.ablation_table(small[small.seed <= 3])
    residual, plain = table.residual, table.plain
    assert residual.min() > plain.max() and plain.is_monotonic_decreasing  # 1
    assert table.difference.min() > 0 and table.difference.is_monotonic_increasing  # 2
    say = ["with {:.1f}, {:.1f} and {:.1f}% above plain-20 with {:.1f}, plain-32 with {:.1f} and plain-56 with {:.1f}"
           .format(*residual, *plain), "leads by {:.1f}, {:.1f} and {:.1f} points".format(*table.difference)]
    first = gpu[(gpu.seed == 0) & (gpu.learning_rate == 0.001) & (gpu.epoch == 15)]
    first = 100 * first.set_index(["model", "zero_gamma"]).val_accuracy
    gains = [first[name, True] - first[name, False] for name in ("resnet34", "resnet50")]
    assert 0 < gains[0] < gains[1]  # 3
    assert all(abs(first[name, True] - first["resnet18", False]) < 1.5 for name in ("resnet34", "resnet50"))
    told = [("resnet34", True), ("resnet34", False), ("resnet50", True), ("resnet50", False), ("resnet18", False)]
    say += ["ResNet-34 has {:.1f}% in place of {:.1f}, ResNet-50 {:.1f} in place of {:.1f}, the larger gain; "
            "ResNet-18, near which both should end, has {:.1f}".format(*(first[network] for network in told))]
    one = every_run().query("seed == 0 and variant == '' and epoch == epochs").set_index("model").val_accuracy * 100
    say += [f"on two cores: {one.resnet34:.1f}, {one.resnet50:.1f} and {one.resnet18:.1f}"]
    own = 100 * rh.ablation_table(main, rates=rates)
    order = own[["residual", "plain"]].to_numpy().ravel()
    assert (np.diff(order) < 0).all() and (own.difference > 0).all()  # 4 and 5
    assert (own.difference < own["95% half width"]).tolist() == [True, True, False]
    say += ["{:.1f}, {:.1f}, {:.1f}, {:.1f}, {:.1f} and {:.1f}%, in the order".format(*order),
            "{:+.1f}, {:+.1f} and {:+.1f} points at 18, 34 and 50 layers".format(*own.difference),
            f"ends {own.difference['34 layers']:.1f} points behind ResNet-34"]
    gamma = zero_gamma(gpu).diff().iloc[-1]
    say += [f"rose by {gamma.resnet34:.1f} and {gamma.resnet50:.1f} points",
            f"ResNet-50 gains {gamma.resnet50:.1f} points"]
    measure = pd.read_csv(ROOT / "results" / "measure.csv", index_col=0)
    say += [f"rank correlation {measure.corr(method='spearman').iloc[0, 1]:.2f}"]
    pairs = [measure.measure[f"resnet{d}"] - measure.measure[f"plain{d}"] for d in (18, 34, 50, 20, 32, 56)]
    assert len(measure) == 12 and min(pairs) > 0  # "picked the better network of each of the six pairs"
    means = pd.concat([own, 100 * rh.ablation_table(small)])
    for name, accuracy in measure["accuracy, %"].items():
        kind = "plain" if name.startswith("plain") else "residual"
        assert accuracy == pytest.approx(means[kind][f"{rh.MODELS[name]} layers"], abs=1e-3)
    loss = pd.read_csv(ROOT / "results" / "landscapes.csv", index_col=["model", "a", "b"]).loss
    middle, below = loss.xs((0, 0), level=["a", "b"]), (loss < np.log(2)).groupby("model").sum()
    assert loss.groupby("model").size().tolist() == [625, 625]
    say += [f"{middle.plain56:.3f} for plain-56 and {middle.resnet56:.3f} for ResNet-56. Of the 625 points "
            f"{below.plain56} and {below.resnet56} have",
            f"plain-56's loss reaches {loss.plain56.max():.1e}, ResNet-56's {loss.resnet56.max():.1e}"]
    for words in say:
        assert words in text, words


def zero_gamma(gpu):
    """Mean validation accuracy of seeds 0 to 2 at 0.001, in percent: without (False) and with (True) zero gamma."""
    runs = gpu[(gpu.learning_rate == 0.001) & gpu.seed.isin([0, 1, 2]) & (gpu.epoch == 15) & (gpu.epochs == 15)]
    runs = runs[runs.model.isin(["resnet34", "resnet50"])]
    assert (runs.groupby(["model", "zero_gamma"]).seed.nunique() == 3).all()
    return 100 * runs.pivot_table(index="zero_gamma", columns="model", values="val_accuracy")


def test_notebook_3_tells_the_committed_runs():
    takeaways, runs = markdown_of("03_training"), committed_runs()
    end = runs[(runs.epoch == runs.epochs) & (runs.seed == 0)].set_index("model").loss
    assert (f"ResNet-34 falls to {end.resnet34:.3f}, of ResNet-50 to {end.resnet50:.3f} and of plain-34 to "
            f"{end.plain34:.3f}: all three learn. plain-50 ends at {end.plain50:.3f}, hardly below guessing "
            f"({np.log(2):.3f})") in takeaways


def test_readme_csv_and_histories_agree():
    main, small, rates, _ = gpu_runs()
    table, markdown = both_tables(main, rates)
    saved = pd.read_csv(ROOT / "results" / "ablation.csv", index_col=0)
    pd.testing.assert_frame_equal(saved, table, check_dtype=False)
    readme = (ROOT / "README.md").read_text()
    (shown,) = TABLE.findall(readme)
    assert shown == markdown == (ROOT / "results" / "ablation.md").read_text().strip()
    numbers, markdown = both_tables(small)
    (shown,) = re.findall(r"<!-- section 4.2 -->\n+(.*?)\n+<!-- /section 4.2 -->", readme, re.S)
    assert shown == markdown == (ROOT / "results" / "section_4_2.md").read_text().strip()
    plain, residual = (100 * (numbers[kind].iloc[0] - numbers[kind].iloc[-1]) for kind in ("plain", "residual"))
    assert f"costs {plain:.1f} points of validation accuracy without shortcuts and {residual:.1f} with them" in readme


def test_readme_tells_the_checks():
    readme = (ROOT / "README.md").read_text()
    main, small, rates, gpu = gpu_runs()
    own, common = 100 * rh.ablation_table(main, rates=rates), 100 * rh.ablation_table(committed_runs())
    say = ["{:+.1f} points at 18 layers, {:+.1f} at 34 and {:+.1f} at 50".format(*common.difference),
           f"{own.difference['34 layers']:+.1f} are left at 34 layers, with an interval that includes 0"]
    assert (own.difference < own["95% half width"]).tolist() == [True, True, False]  # "undecided"
    accuracies, difference = second_look(every_run(), rates)
    assert accuracies + difference in (ROOT / "results" / "predictions.md").read_text().replace("\n", " ")
    say += [f"give {difference}"]
    end = gpu[gpu.epoch == gpu.epochs].set_index("model")
    slow, loss = end[end.epochs == 45].loc["plain50"], main[(main.model == "plain50") & (main.epoch == 15)].loss.mean()
    say += [f"training loss ends at {loss:.3f} (guessing has {np.log(2):.3f}), in 45 at {slow.loss:.3f}, with "
            f"{100 * slow.val_accuracy:.1f}% validation accuracy", f"training loss ends at {loss:.3f} (mean of three"]
    long, gamma = 100 * end[end.epochs == 60].val_accuracy, zero_gamma(gpu).resnet50
    say += [f"({long.resnet56:.1f} and {long.resnet20:.1f}%, one seed)",
            f"ResNet-50 has {gamma[True]:.1f}% in place of {gamma[False]:.1f}% at 0.001"]
    every = every_run()
    last = 100 * every[(every.epoch == every.epochs) & (every.seed == 0)].set_index(["model", "variant"]).val_accuracy
    say += ["ResNet-34 reaches {:.1f}% and ResNet-50 {:.1f}% in place of {:.1f}% and {:.1f}%".format(
        *(last[model, variant] for variant in ("-shortcut_zero_pad", "") for model in ("resnet34", "resnet50")))]
    for words in say:
        assert words in readme, words


def test_readme_shows_the_benchmark():
    (shown,) = re.findall(r"<!-- throughput -->\n+(.*?)\n+<!-- /throughput -->", (ROOT / "README.md").read_text(), re.S)
    assert shown == (ROOT / "results" / "throughput.md").read_text().strip()


def test_readme_pandas_lines_give_the_table(monkeypatch):
    (lines,) = re.findall(r"```python\n(import json.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(lines.strip().splitlines()) <= 10
    monkeypatch.chdir(ROOT)
    scope = {}
    exec(lines, scope)
    main, _, rates, _ = gpu_runs()
    table, ours = scope["table"], rh.ablation_table(main, rates=rates)
    for depth in (18, 34, 50):
        assert table.loc[f"plain{depth}"] == pytest.approx(ours.plain[f"{depth} layers"])
        assert table.loc[f"resnet{depth}"] == pytest.approx(ours.residual[f"{depth} layers"])


def test_readme_lines_for_the_two_tables_give_the_tables(monkeypatch, capsys):
    """With the committed runs in place of training them."""
    (lines,) = re.findall(r"```python\n(import pandas as pd.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(rh, "train_runs", lambda configs, folder: pd.concat(
        rh._run_table(rh.read_run(path), path) for path in (rh.run_path(one, "results/gpu") for one in configs)))
    exec(lines, {})
    main, small, rates, _ = gpu_runs()
    assert capsys.readouterr().out == f"{rh.ablation_table(main, rates=rates)}\n{rh.ablation_table(small)}\n"
