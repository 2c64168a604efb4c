"""The committed notebooks as a reader meets them, and the same executed on tiny data."""

import base64
import functools
import json
import pathlib
import re
import statistics
import subprocess
import sys
import types
import zlib

import keras
import numpy as np
import pandas as pd
import pytest
import resnet_helpers as rh
import scipy.stats
import tensorflow as tf
from notebook_code import format_percent, stage_table
from PIL import Image
from training_runs import predictions

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:work|tmp|root|home|content|Users)/")


def outputs(cell):
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        yield output, "".join([*output.get("text", []), *data.get("text/plain", []),
                               *data.get("text/html", [])])


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
    without_a_word = [i for i in code if cells[i - 1]["cell_type"] != "markdown"]
    assert len(without_a_word) <= len(code) / 4


@pytest.fixture
def papermill(tiny_cats, tmp_path, monkeypatch):
    """The Makefile's command for notebooks, each in a process of its own, on tiny data."""
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


DATA, MODELS, TRAINING, ABLATION, APPENDIX, SOLUTIONS = NOTEBOOKS


def write_run(config, folder):
    """A file as `train_run` writes it, with made-up numbers: always the first class."""
    history = {key: [0.7, 0.6] for key in rh.HISTORY}
    answers = base64.b64encode(zlib.compress(bytes(config["val_images"]))).decode()
    run = {"config": config, "status": "finished", "history": history,
           "environment": rh.environment(rh.load_data()), "val_predictions": answers}
    folder.mkdir(parents=True)
    rh.run_path(config, folder).write_text(json.dumps(run))


def test_training_and_ablation_run(papermill, tmp_path):
    """Notebook 3 trains one run and loads the other; then notebook 4, with a second seed."""
    folder = tmp_path / "results" / "test" / "cats_vs_dogs"
    write_run(rh.make_config("resnet34", "test"), folder)
    [shown] = papermill((TRAINING, "{networks: [plain34, resnet34], seeds: [0]}"))
    assert shown.read_text().count("loaded, not trained again") == 1
    for name in ("plain34", "resnet34"):
        run = rh.read_run(folder / f"{name}-test-seed0.json")
        for key in ("loss", "accuracy", "val_loss", "val_accuracy"):
            run["history"][key][-1] += 1 / 48
        config = rh.make_config(name, "test", seed=1)
        rh.run_path(config, folder).write_text(json.dumps(run | {"config": config}))
    runs = rh.read_runs(folder)
    assert len(runs.groupby(["model", "seed"])) == 4 and len(runs) == 8
    table, markdown = both_tables(runs)
    run = rh.read_run(folder / "resnet34-test-seed0.json")
    for change in ({"learning_rate": 0.01}, {"mirrored": 1}, {"shortcut_scale": 0.5},
                   {"batch_size": 16}, {"optimizer": "sgd"}, {"zero_gamma": True}):
        config = rh.make_config("resnet34", **change)  # more files, which the table leaves out
        rh.run_path(config, folder).write_text(json.dumps(run | {"config": config}))
    [shown] = papermill((ABLATION, ""))
    said = [text for cell in json.loads(shown.read_text())["cells"] for _, text in outputs(cell)]
    assert any(text.startswith("A SMOKE RUN") for text in said)
    numbers = pd.read_csv(folder / "ablation.csv", index_col=0)
    pd.testing.assert_frame_equal(numbers, table, check_dtype=False)
    saved = (folder / "ablation.md").read_text().strip()
    assert saved == markdown and re.search(r"\| [+-]\d+\.\d \[", saved)  # "+6.0" and not 6


@pytest.mark.parametrize("path", (DATA, MODELS, APPENDIX, SOLUTIONS), ids=lambda path: path.stem)
def test_notebook_runs(papermill, path):
    papermill((path, ""))


def test_notebook_1_runs_on_a_folder(papermill, tmp_path, monkeypatch):
    """Three classes, pictures that a camera turned, and hidden files beside them."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("ants", "bees", "cows")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "._0.jpg").write_text("what some systems leave there")
        for i in range(8):
            pixels = rng.integers(0, 90, (64, 40, 3)) + 50 * number
            picture, exif = Image.fromarray(pixels.astype("uint8")), Image.Exif()
            exif[274] = 6  # turned by a quarter
            picture.save(tmp_path / "photos" / name / f"{i}.jpg", exif=exif)
    monkeypatch.setenv("RESNET_DATASET", str(tmp_path / "photos"))
    [shown] = papermill((DATA, ""))
    said = "".join(text for cell in json.loads(shown.read_text())["cells"]
                   for _, text in outputs(cell))
    assert "3 classes: {0: 'ants', 1: 'bees', 2: 'cows'}" in said
    assert "training:   16 images" in said and "validation: 8 images" in said
    assert "(40, 64, 3) uint8" in said  # upright
    assert float(re.search(r"own function: ([\d.]+) steps", said)[1]) < 2


HE = "mirrored == 0 and shortcut_scale == 1 and not zero_gamma"  # start and shortcuts of the paper
USUAL = f"optimizer == 'adam' and {HE}"


@functools.cache  # many tests read them; none may change the table
def runs_in(folder):
    return rh.read_runs(ROOT / "results" / folder)


def every_run():
    """The committed runs from two cores in 15 epochs and the usual start."""
    runs = runs_in("full/cats_vs_dogs")
    return runs.query(f"{USUAL} and epochs == 15")


def committed_runs():
    """Table 1's networks at the common rate, seeds 0 to 2."""
    runs = every_run().query("learning_rate == 0.001 and seed in [0, 1, 2]")
    runs = runs[runs.model.map(rh.MODELS).isin([18, 34, 50]) & (runs.shortcut != "zero_pad")]
    assert runs.file.nunique() == 18
    return runs


def own_rates(runs):
    """Of the rates with all three seeds, each network's with the lowest mean training loss."""
    ends = runs.query("epoch == 15 and seed < 3").groupby(["model", "learning_rate"])
    losses = ends.loss.mean()[ends.seed.nunique() == 3].unstack()
    return losses.idxmin(axis=1)


def main_tables():
    """The runs at own rates, seeds 0 to 2, of Table 1's networks and of section 4.2's."""
    runs = every_run().query("seed < 3")
    first = runs.model.map(rh.MODELS).isin(rh.UNITS)
    runs = runs[~first | (runs.shortcut != "zero_pad")]
    runs = runs[runs.learning_rate == runs.model.map(own_rates(runs))]
    first = runs.model.map(rh.MODELS).isin(rh.UNITS)
    main, small = runs[first], runs[~first]
    assert main.file.nunique() == small.file.nunique() == 18
    return main, small


def gpu_runs():
    """The GPU's Table 1 networks at the rates that seed 0 chose; section 4.2's; all its runs."""
    every = runs_in("gpu")
    usual = every.query(f"{USUAL} and epochs == 15")
    first = usual.query("seed == 0 and epoch == 15").sort_values("loss")
    rates = first.groupby("model").learning_rate.first()
    own = usual[(usual.learning_rate == usual.model.map(rates)) & usual.seed.isin([1, 2, 3])]
    own = own[own.model.map(rh.MODELS).isin(rh.UNITS)]
    small = usual[~usual.model.map(rh.MODELS).isin(rh.UNITS)]
    assert own.file.nunique() == 18 and small.file.nunique() == 30
    return own, small, every


def both_tables(runs):
    """The table as notebook 4 saves it: numbers, and Markdown."""
    table, training = rh.ablation_table(runs), rh.ablation_table(runs, "accuracy")
    shown = format_percent(table)
    end = runs.groupby("file").tail(1)
    for depth in shown.index:
        pair = [end[(end.model == f"{kind}{depth.split()[0]}")] for kind in ("plain", "resnet")]
        shown.loc[depth, "in training"] = ", ".join(f"{100 * p.accuracy.mean():.1f}" for p in pair)
        for kind, part in zip(("plain", "residual"), pair):
            shown.loc[depth, f"{kind} rate"] = f"{part.learning_rate.iloc[0]:g}"
        shown.loc[depth, "seeds"] = ", ".join(str(p.seed.nunique()) for p in pair)
        shown.loc[depth, "hardly learned"] = ", ".join(
            str((~(p.loss < 0.98 * p.guessing_loss)).sum()) for p in pair)
    training = training[[column for column in training
                         if column.split()[-1] not in ("seeds", "rate", "learned")]]
    return table.join(training.add_prefix("training: ")), shown.to_markdown(disable_numparse=True)


def test_the_gpu_tried_the_rates_of_the_rule():
    """predictions.md: 0.001 to 0.01 on seed 0, one rate further where the largest won."""
    *_, every = gpu_runs()
    every = every.query(f"{USUAL} and epochs == 15 and epoch == 15 and seed == 0")
    for model, part in every.groupby("model"):
        losses = part.set_index("learning_rate").loss
        lower = {0.0003} if model in ("plain34", "plain50") else set()
        assert set(losses.index) >= {0.001, 0.003, 0.01} | lower
        assert losses.idxmin() < max(losses.index) or losses.idxmin() > 0.01


def test_the_gpu_saw_the_same_images():
    runs = gpu_runs()[-1]
    committed = runs_in("full/cats_vs_dogs")
    for key in ("images_crc32", "labels_crc32"):
        assert set(runs[key]) == set(committed[key].dropna())
    assert set(runs.device) == {"GPU x86_64"} and set(committed.device) == {"CPU x86_64"}
    assert f"{runs.file.nunique()} runs" in (ROOT / "results" / "gpu" / "README.md").read_text()


def test_the_gpu_page_has_the_means():
    every = gpu_runs()[-1].query("epoch == 15 and epochs == 15")
    text = page("results/gpu/README.md")
    groups = every.groupby(["model", "zero_gamma", "learning_rate"])
    rows = {names: 100 * part.val_accuracy for names, part in groups if part.seed.nunique() > 2}
    assert len(rows) == text.count(" ± ") == 16
    for (model, zero_gamma, rate), accuracy in rows.items():
        name = rh.display_name(model) + ", zero gamma" * zero_gamma
        (found,) = re.findall(rf"\| {name} \| {rate:g} \| \d to \d \| (.*) \|", text)
        assert found == f"{accuracy.mean():.1f} ± {accuracy.std():.1f}"
    rates = gpu_runs()[0].groupby("model").learning_rate.first()
    assert rates.to_dict() == {"plain34": 0.003, "plain50": 0.003, "resnet18": 0.003,
                               "plain18": 0.01, "resnet34": 0.01, "resnet50": 0.01}


def gpu_at_the_rates_of(main):
    """The GPU's runs with 34 and 50 layers, seeds 0 to 2, at the rates of the main table."""
    runs = gpu_runs()[-1].query(f"{USUAL} and epochs == 15 and seed < 3")
    runs = runs[runs.model.map(rh.MODELS).isin([34, 50])]
    return runs[runs.learning_rate == runs.model.map(main.groupby("model").learning_rate.first())]


def fresh_pair(main):
    """The row at 34 layers, in points, of seeds 4 to 6 at the rates of set A, and of all six."""
    rates = main.groupby("model").learning_rate.first()
    runs = every_run().query("model in ['plain34', 'resnet34']")
    runs = runs[(runs.learning_rate == runs.model.map(rates)) & (runs.seed != 3)]
    assert set(runs.seed) == {0, 1, 2, 4, 5, 6}
    return [100 * rh.ablation_table(part).iloc[0] for part in (runs[runs.seed > 3], runs)]


def markdown_of(name):
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def ends_of(runs, model):
    """The last accuracies of a network's runs, in percent."""
    return 100 * runs[(runs.model == model) & (runs.epoch == runs.epochs)].val_accuracy.to_numpy()


def test_notebook_4_tells_the_tables():
    """Every number below its two tables, computed from the result files."""
    text, say = markdown_of("04_ablation"), []
    main, small = main_tables()
    tables = []
    for runs in (main, small):
        table, training = 100 * rh.ablation_table(runs), 100 * rh.ablation_table(runs, "accuracy")
        tables += [table]
        for depth, row in table.iterrows():
            first = depth == table.index[0]
            with_, without = (" with shortcuts", " without") if first else ("", "")
            decided = row.low > 0 or row.high < 0
            start, end = ("The", "excludes 0") if decided else ("Undecided: the", "includes 0")
            say += [f"- **{depth}:** {row.residual:.1f}%{with_} against {row.plain:.1f}%{without}, "
                    f"{row.difference:+.1f} points, and {training.difference[depth]:+.1f} in "
                    f"training. {start} interval {interval(row)} {end}"]
        plain, plain_training, residual, residual_training = (
            part[kind].iloc[-1] - part[kind].iloc[0]
            for kind in ("plain", "residual") for part in (table, training))
        assert max(plain, plain_training, residual) < 0 and residual_training < 0.05
        more = difference(*(ends_of(runs, f"{kind}{table.index[i].split()[0]}")
                            for kind in ("plain", "resnet") for i in (0, -1)))
        say += [f"plain networks lose {-plain:.1f} points in validation and "
                f"{-plain_training:.1f} in training, residual networks {-residual:.1f} and "
                f"{abs(residual_training):.1f}. The plain ones lose more by {more[1:]} points"]
        assert more[0] == more.split("[")[1][0] == "+"
    table, small_table = tables
    drops = [table[kind].iloc[0] - table[kind].iloc[-1] for kind in ("plain", "residual")]
    say += ["from 18 to 50 layers plain accuracy falls by {:.1f} points and residual accuracy by "
            "{:.1f}".format(*drops) + "; in the networks made for images of this size, from 20 to "
            f"56 layers, by {-plain:.1f} and {-residual:.1f}"]
    fell = 100 * rh.ablation_table(main, "accuracy")[["plain", "residual"]]
    say += ["from 18 to 50 layers by {:.1f} points (in the residual ones by {:.1f})".format(
        *(fell.iloc[0] - fell.iloc[-1]))]
    fresh, six = fresh_pair(main)
    assert fresh.low < 0 < six.low  # "do not decide it", "excludes 0"
    say += [f"nearly the same difference, {fresh.difference:+.1f} points, but three of them alone "
            f"do not decide it: the interval {interval(fresh)}",
            f"give {six.difference:+.1f}, and their interval {interval(six)} excludes 0"]
    size = {name: rh.create_model(name).count_params()
            for name in ("resnet34", "resnet20", "resnet56", "plain56")}
    say += [f"ResNet-20 has 1/{size['resnet34'] / size['resnet20']:.0f} of the parameters of "
            f"ResNet-34 and reaches {small_table.residual['20 layers']:.1f}%",
            "ResNet-20 reaches {:.1f}% with {:.2f} million parameters, ResNet-34 {:.1f}% with "
            "{:.0f} million".format(small_table.residual["20 layers"], size["resnet20"] / 1e6,
                             table.residual["34 layers"], size["resnet34"] / 1e6),
            "are level with it ({:.1f} and {:.1f}%)".format(*small_table.residual[1:]),
            f"ResNet-18** ({table.residual['18 layers']:.1f}%)"]
    hardly = rh.ablation_table(main)
    assert hardly["plain hardly learned"].tolist() == [0, 0, 1]  # "one of plain-50's three"
    assert (hardly["residual hardly learned"] == 0).all()
    assert (rh.ablation_table(small)[["plain hardly learned", "residual hardly learned"]] == 0).all(
        axis=None)
    assert (pd.concat(tables).difference > 0).all()  # "no plain network is ahead of its twin"
    assert all(part.plain.is_monotonic_decreasing for part in (table, small_table))
    assert all(rh.ablation_table(runs, "accuracy").plain.is_monotonic_decreasing
               for runs in (main, small))  # "in the plain networks training accuracy falls, too"
    best = table[["plain", "residual"]].max().max()
    assert small_table.residual["20 layers"] > best, "the yardstick is not ahead"
    assert size["resnet56"] == size["plain56"]  # "equal parameters"
    caption = re.search(r"!\[Validation accuracy against depth.*?\]", text).group()
    for part, words in ((table, "falls from {:.0f}% at 18 layers to {:.0f}% at 50, residual from "
                                "{:.0f} to {:.0f}"),
                        (small_table, "falls from {:.0f}% at 20 layers to {:.0f}% at 56, residual "
                                      "stays at {:.0f} and {:.0f}")):
        ends = [part[kind].iloc[i] for kind in ("plain", "residual") for i in (0, -1)]
        assert words.format(*ends) in caption
    for words in say:
        assert words in text, words


def test_notebook_4_tells_the_curves_and_the_paper():
    text, (main, _) = markdown_of("04_ablation"), main_tables()
    means = main.groupby(["model", "epoch"])[["loss", "accuracy"]].mean().unstack(0)
    last = main[main.epoch == 15].groupby("model").loss
    for model, losses in means.loss.items():
        assert losses.iloc[-1] < losses.iloc[0]
        assert (last.get_group(model).max() > 0.9 * np.log(2)) == (model == "plain50")  # "all but"
    deep = 100 * (means.accuracy.resnet50 - means.accuracy.plain50)
    assert (deep > 0).all()  # "from the first epoch on"
    say = [f"by {deep[1]:.1f} points there and {deep[15]:.1f} at the end"]
    losses = means.loss
    behind = losses.index[losses.resnet34 > losses.plain34]
    assert behind[0] == 1  # "begins lower"
    say += ["begins lower, at {:.3f} against {:.3f}, and is higher for good from epoch {} on"
            .format(*losses.loc[1, ["plain34", "resnet34"]], behind[-1] + 1)]
    pair = every_run().query("model == 'resnet34' and learning_rate == 0.003 and seed < 3")
    ended = 100 * pair[pair.epoch == 15].set_index("seed").val_accuracy
    fell = 100 * pair[pair.seed == ended.idxmin()].set_index("epoch").val_accuracy
    assert abs(fell.min() - 50.5) < 0.1  # "falls back to guessing"
    say += ["two seeds end at {:.1f} and {:.1f}%".format(*ended.drop(ended.idxmin()).sort_values()),
            f"in epoch {fell.idxmin()} and ends at {ended.min():.1f}%"]
    ends = every_run().query("epoch == 15 and seed < 3 and shortcut != 'zero_pad'")
    ends = ends.groupby(["model", "learning_rate"])[["val_accuracy", "loss"]].mean()
    accuracy, losses = 100 * ends.val_accuracy, ends.loss
    say += [f"its mean training loss there is {losses.resnet34[0.003]:.3f}, above the "
            f"{losses.resnet34[0.001]:.3f} at 0.001 and the {losses.resnet34[0.01]:.3f} at 0.01"]
    table = 100 * rh.ablation_table(main)
    say += ["residual is ahead by {:.1f} points at 18 layers, which is undecided, {:.1f} at 34 and "
            "{:.1f} at 50".format(*table.difference)]
    assert (table.low > 0).tolist() == [False, True, True]
    percent = 100 * main.groupby(["model", "epoch"]).val_accuracy.mean().unstack(0)
    assert (percent.resnet50 > percent.plain50).all()
    ahead = percent.index[percent.plain34 > percent.resnet34]
    say += [f"in validation plain-34 leads in {len(ahead)} of the 15 epochs, the last time in "
            f"epoch {ahead[-1]}"]
    shown = main[main.model.isin(["plain34", "resnet34", "plain50", "resnet50"])]
    losses = shown.groupby(["model", "epoch"])[["loss", "val_loss"]].mean().max(axis=1)
    cut = 1.5 * main.loss.max()
    assert losses.index[losses > cut].tolist() == [("resnet34", 5), ("resnet50", 1)]
    say += [f"cut at {cut:.2f}: the mean validation losses of ResNet-50 in epoch 1"]
    moved = accuracy.plain34[0.003] - accuracy.plain34[[0.001, 0.01]].min()
    assert moved > table.difference["34 layers"]  # "more than its shortcuts do"
    say += [f"moves plain-34 by up to {moved:.1f} points, more than shortcuts add at own rates "
            f"({table.difference['34 layers']:.1f})"]
    for words in say:
        assert words in text, words
    error = 100 - 100 * main[main.epoch == 15].groupby("model").val_accuracy.mean()
    steps = {"plain18": "plain34", "resnet18": "resnet34", "resnet34": "resnet50"}
    here = [error[after] - error[before] for before, after in steps.items()]
    paper = [28.54 - 27.94, 25.03 - 27.88, 22.85 - 24.52]
    assert [a * b > 0 for a, b in zip(here, paper)] == [True, False, False]  # "two of the five"


def in_a_word(number):
    return ("none", "one", "two", "three", "four", "five")[number]


def listed(numbers, form="{:+.1f}"):
    """Such as "+1.0, +2.0 and +3.0"."""
    *words, last = (form.format(number) for number in numbers)
    return f"{', '.join(words)} and {last}" if words else last


def test_notebook_4_tells_the_rates():
    text, (main, _), say = markdown_of("04_ablation"), main_tables(), []
    ends = every_run().query("epoch == 15 and seed < 3 and shortcut != 'zero_pad'")
    ends = ends[ends.model.map(rh.MODELS).isin(rh.UNITS)]
    tried = ends.groupby(["learning_rate", "model"])[["val_accuracy", "loss"]].agg(["mean", "size"])
    tried = tried[tried.val_accuracy["size"] == 3].unstack().dropna()
    accuracy, table = 100 * tried.val_accuracy["mean"], 100 * rh.ablation_table(main)
    gaps = {depth: accuracy[f"resnet{depth}"] - accuracy[f"plain{depth}"] for depth in (18, 34, 50)}
    (shown,) = cells_of("04_ablation")["gaps"]["outputs"]
    shown = "".join(shown["data"]["text/plain"])
    assert re.findall(r"both at ([\d.]+)", shown) == [f"{rate:g}" for rate in accuracy.index]
    assert re.findall(r"[+-]\d+\.\d", shown) == [
        f"{gap:+.1f}" for depth in (18, 34, 50)
        for gap in (*gaps[depth], table.difference[f"{depth} layers"])]
    (shown,) = cells_of("04_ablation")["costs"]["outputs"]
    own = [table[kind].iloc[-1] - table[kind].iloc[0] for kind in ("plain", "residual")]
    costs = [accuracy[f"{kind}50"] - accuracy[f"{kind}18"] for kind in ("plain", "resnet")]
    assert re.findall(r"[+-]\d+\.\d", "".join(shown["data"]["text/plain"])) == [
        f"{cost:+.1f}" for at_rates, at_own in zip(costs, own) for cost in (*at_rates, at_own)]
    losses = tried.loss["mean"].resnet34
    say += [f"ResNet-34's are {listed(losses, '{:.3f}')} at {listed(losses.index, '{:g}')}"]
    tables = {rate: 100 * rh.ablation_table(part[part.model.map(rh.MODELS).isin([18, 34, 50])])
              for rate, part in ends.groupby("learning_rate") if rate in tried.index}
    undecided = {rate: table.low["34 layers"] < 0 for rate, table in tables.items()}
    assert undecided == {0.001: False, 0.003: True, 0.01: True}
    for table_at in tables.values():  # "decided at each rate at 50 layers, and at none at 18"
        assert table_at.low["50 layers"] > 0 and table_at.low["18 layers"] < 0
        assert table_at.high["18 layers"] > 0
    say += ["The difference is {:+.1f} if both have the optimiser's default rate, 0.001, an "
            "undecided {:+.1f} at 0.003 and an undecided {:+.1f} at 0.01".format(*gaps[34])]
    say += ["{:.1f} points from 18 to 50 layers against {:.1f} at 0.001, {:.1f} against {:.1f} at "
            "0.003, and {:.1f} against {:.1f} at 0.01".format(*(
                -cost[rate] for rate in tried.index for cost in costs[::-1]))]
    fast = ends[(ends.model == "plain34") & (ends.learning_rate == 0.01)].set_index("seed")
    assert (fast.loss > 0.98 * np.log(2)).to_dict() == {0: True, 1: False, 2: False}
    say += ["with seed 0 it hardly learns ({:.1f}%), with seeds 1 and 2 it reaches {:.1f} and "
            "{:.1f}%".format(*100 * fast.val_accuracy.sort_index()),
            f"its mean training loss there is {fast.loss.mean():.3f}, against "
            f"{tried.loss['mean'].plain34[0.003]:.3f} at 0.003",
            f"more than ResNet-34 there ({accuracy.resnet34[0.01]:.1f}% in the mean)",
            f"at own rates, ResNet-34 is ahead by {table.difference['34 layers']:.1f} points"]
    medians = ends.groupby(["learning_rate", "model"]).loss.median().unstack().loc[tried.index]
    rule, other = tried.loss["mean"].idxmin(), medians.idxmin()
    assert other[other != rule].to_dict() == {"plain34": 0.01}  # "no other network"
    middle = 100 * ends[ends.learning_rate == 0.01].groupby("model").val_accuracy.median()
    say += [f"its median accuracy is {middle.plain34:.1f}% and ResNet-34's {middle.resnet34:.1f}%"]
    rates = main.groupby("model").learning_rate.first()
    named = {rate: listed([rh.display_name(f"{kind}{depth}") for kind in ("plain", "resnet")
                           for depth in (18, 34, 50) if rates[f"{kind}{depth}"] == rate], "{}")
             for rate in sorted(set(rates))}
    say += ["at its own rate: " + ", ".join(f"{rate:g} for {x}" for rate, x in named.items()) + ".",
            f"({named[0.01]})"]
    for words in say:
        assert words in text, words


def test_notebook_4_tells_the_checks():
    """The start, the other device, the last epoch, more epochs, parameters."""
    text, (main, small), every, say = markdown_of("04_ablation"), main_tables(), every_run(), []
    gpu, table = gpu_runs()[-1], 100 * rh.ablation_table(main)
    percent = starts().percent
    gamma = [[percent[name, start, 0.001] for start in ("he", "zero gamma")]
             for name in ("resnet34", "resnet50")]
    say += ["ResNet-34 goes from {:.1f} to {:.1f}%, and ResNet-50 from {:.1f} to {:.1f}%".format(
        *gamma[0], *gamma[1])]
    usual = gpu.query(f"{USUAL} and epochs == 15 and epoch == 15")
    ends = every.query("epoch == 15 and seed < 3")
    ends = ends[(ends.shortcut != "zero_pad") | ~ends.model.map(rh.MODELS).isin(rh.UNITS)]
    ends = ends[ends.groupby(["model", "learning_rate"]).seed.transform("size") == 3]
    both = [part.groupby(["model", "learning_rate"]).val_accuracy.mean() for part in (ends, usual)]
    apart = 100 * (both[1] - both[0]).dropna()
    model, rate = apart.abs().idxmax()
    say += [f"these {len(apart)} points the two devices differ by {apart.abs().mean():.1f} points "
            f"on average, and by {apart.abs().max():.1f} at most ({rh.display_name(model)} at "
            f"{rate:g})"]
    named = apart[apart.abs() > 3]
    assert (named > 0).to_dict() == {("resnet34", 0.003): True, ("resnet50", 0.003): True,
                                     ("plain50", 0.01): False}
    there = 100 * rh.ablation_table(usual[~usual.model.map(rh.MODELS).isin(rh.UNITS)])
    same, own = (100 * rh.ablation_table(runs)
                 for runs in (gpu_at_the_rates_of(main), gpu_runs()[0]))
    assert own.low["34 layers"] < 0  # "undecided"
    assert (gpu_runs()[0].groupby("model").learning_rate.first()
            == main.groupby("model").learning_rate.first()).all()  # "the GPU's own rule chose, too"
    ours = 100 * rh.ablation_table(small).difference
    say += [f"is {own.difference['34 layers']:+.1f} points at 34 layers (undecided) and "
            f"{own.difference['50 layers']:+.1f} at 50 with the seeds planned there, 1 to 3; with "
            f"seeds 0 to 2 it is {listed(same.difference)} (here: {listed(table.difference[1:])})",
            f"it is {listed(there.difference.iloc[[0, -1]])} at 20 and 56 layers (five seeds; here "
            f"{listed(ours.iloc[[0, -1]])})",
            f"ResNet-18 ({percent['resnet18', 'he', 0.001]:.1f}% from He's start)"]
    assert percent["resnet50", "zero gamma", 0.001] > percent["resnet18", "he", 0.001]  # "for all"
    fast = 100 * usual[(usual.learning_rate == 0.003) & (usual.seed == 0)].set_index(
        "model").val_accuracy
    on_its_page = [
        f"is {listed(same.difference)} points at 34 and 50 layers here (seeds 0 to 2), and "
        f"{listed(table.difference[1:])} there",
        f"residual minus plain is {listed(there.difference)} here (five seeds), and "
        f"{listed(100 * rh.ablation_table(small).difference)} there",
        f"1 to 3, it is an undecided {own.difference['34 layers']:+.1f} at 34 layers",
        "from {:.1f} to {:.1f}% here, and from {:.1f} to {:.1f}% there".format(
            *zero_gamma(gpu).resnet50, *gamma[1]),
        f"one run, with seed 0: {fast.resnet34:.1f}% (plain-34 with this seed: "
        f"{fast.plain34:.1f}%)"]
    one = seed_0_at_the_common_rate(every)
    say += ["with {:.1f}% at 34 layers (projections {:.1f}, the plain twin {:.1f}) and {:.1f}% at "
            "50 ({:.1f} and {:.1f})".format(*(
                one[pair] for depth in (34, 50) for pair in (
                    (f"resnet{depth}", "zero_pad"), (f"resnet{depth}", "projection"),
                    (f"plain{depth}", "none"))))]
    for words in on_its_page:
        assert words in flat("results/gpu/README.md"), words
    accuracy = main.groupby(["model", "seed"]).val_accuracy
    views = [100 * view.groupby("model").mean() for view in (
        accuracy.last(), accuracy.max(), accuracy.apply(lambda epochs: epochs.tail(3).mean()))]
    say += [listed(view[f"resnet{d}"] - view[f"plain{d}"] for view in views) for d in (18, 34, 50)]
    hour = gpu.query("epochs == 60 and epoch == 60").set_index("model").val_accuracy * 100
    slow = gpu.query("model == 'plain50' and epochs == 45").set_index("epoch")
    assert slow.loss[20:].max() > 0.98 * np.log(2)  # "after falling back to guessing"
    loss = main[(main.model == "plain50") & (main.epoch == 15)].loss.mean()
    hardly = rh.ablation_table(main)["plain hardly learned"]
    assert (hardly[:-1] == 0).all()
    number = in_a_word(hardly.iloc[-1])
    short = gpu.query(f"{USUAL} and model == 'plain50' and epochs == 15 and seed == 1")
    short = short[(short.epoch == 15) & (short.learning_rate == slow.learning_rate.iloc[0])]
    say += [f"ends at {loss:.3f} (guessing scores {np.log(2):.3f}), and {number} of its three",
            f"ResNet-56 has {hour.resnet56:.1f}% and ResNet-20 {hour.resnet20:.1f}%",
            f"training loss ends at {short.loss.item():.3f} (same seed, GPU), where guessing "
            f"scores {np.log(2):.3f}; with 45 it reaches a loss of {slow.loss[45]:.3f} and an "
            f"accuracy of {100 * slow.val_accuracy[45]:.1f}%"]
    size = {name: stage_table(rh.create_model(name)).parameters["total"]
            for name in set(main.model)}
    say += [", ".join(f"{size[f'resnet{d}'] / size[f'plain{d}'] - 1:.1%} at {d} layers"
                      for d in (18, 34, 50))]
    for words in say:
        assert words in text, words


def test_notebook_4_tells_the_images():
    """From the stored answers; without the images the labels are not known."""
    try:
        data = rh.load_data("cats_vs_dogs")
    except FileNotFoundError:
        pytest.skip("cats_vs_dogs is not on this machine")
    main, right = main_tables()[0], {}
    if rh.environment(data)["images_crc32"] != main.images_crc32.iloc[0]:
        pytest.skip("the images here are another copy of cats_vs_dogs")
    for run in main[main.epoch == 15].itertuples():
        answers = predictions(rh.read_run(ROOT / "results" / "full" / "cats_vs_dogs" / run.file))
        right[run.model, run.seed] = answers == data.val_labels
        assert right[run.model, run.seed].mean() == pytest.approx(run.val_accuracy, abs=2e-4)
    shares = {}
    for depth in (34, 50):
        pair = [(right[f"resnet{depth}", seed], right[f"plain{depth}", seed]) for seed in range(3)]
        shares[depth] = [np.mean([a & ~b for a, b in pair]), np.mean([b & ~a for a, b in pair])]
    b, c = shares[34]
    chance = 1.96 * np.sqrt((b + c - (b - c) ** 2) / len(data.val_labels))
    text = markdown_of("04_ablation")
    seeds = [np.mean([right[model, a] != right[model, b] for a, b in ((0, 1), (0, 2), (1, 2))])
             for model in ("plain34", "resnet34")]
    assert seeds[1] + 0.01 < b + c < seeds[0] < b + c + 0.01  # "about as much", "more than"
    for words in (f"same seed ({b + c:.1%}) differ",
                  f"two seeds of plain-34 ({seeds[0]:.1%}), and more than two of ResNet-34 "
                  f"({seeds[1]:.1%})",
                  f"disagree on {b + c:.1%} of the images", f"on {b:.1%} only ResNet-34 is right, "
                  f"on {c:.1%} only plain-34", "lopsided: {:.1%} against {:.1%}".format(
                      *shares[50]), f"about ±{100 * chance:.1f} points at 34 layers"):
        assert words in text, words


def sets_of_notebook_4(monkeypatch):
    """What its cells make of the committed runs, up to the sets."""
    monkeypatch.setenv("RESNET_PROFILE", "full")
    monkeypatch.delenv("RESNET_DATASET", raising=False)
    scope, cells = {"rh": rh, "np": np, "pd": pd}, cells_of("04_ablation")
    for name in ("runs", "columns", "changed", "complete", "own", "sets"):
        exec("".join(cells[name]["source"]), scope)
    return scope


def row_of_the_map(name, use, part):
    """A set's networks, device, rates, seeds and number of runs."""
    depths = sorted(set(part.layers))
    networks = f"{' and '.join(sorted(set(part.kind)))}, {listed(depths, '{}')} layers"
    if len(part) == len(depths):  # a run for each
        networks = listed([part[part.layers == depth].network.item() for depth in depths], "{}")
    rates, seeds = (listed(sorted(set(part[key])), "{:g}") for key in ("learning_rate", "seed"))
    (device,) = set(part.device)
    return f"| {name} | {use} | {networks} | {device} | {rates} | {seeds} | {part.run.nunique()} |"


def test_notebook_4_has_a_map_of_its_sets(monkeypatch):
    shown = marked(markdown_of("04_ablation"), "map")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()]
    assert rows[0] == ["set", "used for", "networks", "device", "rates", "seeds", "runs"]
    sets = sets_of_notebook_4(monkeypatch)["sets"]
    appendix = ends_with_adam()
    appendix = appendix.assign(
        layers=appendix.model.map(rh.MODELS), device="two cores", run=appendix.file,
        kind=np.where(appendix.model.str.startswith("plain"), "plain", "residual"))
    wired_runs = appendix[appendix.file.isin(started().file)]
    first = sets["F"].layers.isin(rh.UNITS)
    sets |= {"F": sets["F"][first], "F, small": sets["F"][~first]}
    sets |= {"G": sets.pop("G")}  # in this order
    sets |= {"appendix, test": wired_runs[wired_runs.learning_rate == wired_runs.layers.map(WIRED)],
             "appendix, doses": appendix.query(
                 "layers == 56 and learning_rate == 0.003 and not zero_gamma and "
                 "(kind == 'plain' or mirrored == 0)")}
    assert [row[0] for row in rows[2:]] == list(sets)
    for (name, use, *_), line in zip(rows[2:], shown.splitlines()[2:]):
        assert line == row_of_the_map(name, use, sets[name])


def test_notebook_4_has_few_tables():
    cells = json.loads(ABLATION.read_text())["cells"]
    shown = [text for cell in cells for output, text in outputs(cell) if "<table" in text]
    written = [cell for cell in cells if cell["cell_type"] == "markdown"
               and re.search(r"^\|.*\|$", "".join(cell["source"]), re.M)]
    assert 3 <= len(shown) + len(written) <= 8


def interval(row):
    """The difference's 95% confidence interval in words, from a row of `ablation_table`."""
    return f"from {row.low:+.1f} to {row.high:+.1f}"


def seed_0_at_the_common_rate(every):
    """The last validation accuracy by network and shortcut, two cores, in percent."""
    last = every.query("epoch == epochs and seed == 0 and learning_rate == 0.001")
    return 100 * last.set_index(["model", "shortcut"]).val_accuracy


def test_the_appendix_tells_the_correlation_and_the_gpu_page_its_predictions():
    """The five first predictions, each checked and told; the correlation and its rival."""
    (main, small, gpu), text = gpu_runs(), flat("results/gpu/README.md")
    table = 100 * rh.ablation_table(small[small.seed <= 3])
    residual, plain = table.residual, table.plain
    assert residual.min() > plain.max() and plain.is_monotonic_decreasing  # 1
    assert table.difference.min() > 0 and table.difference.is_monotonic_increasing  # 2
    say = ["with {:.1f}, {:.1f} and {:.1f}% above plain-20 with {:.1f}, plain-32 with {:.1f} and "
           "plain-56 with {:.1f}".format(*residual, *plain),
           "leads by {:.1f}, {:.1f} and {:.1f} points".format(*table.difference)]
    first = gpu[(gpu.seed == 0) & (gpu.learning_rate == 0.001) & (gpu.epoch == 15)]
    first = 100 * first.set_index(["model", "zero_gamma"]).val_accuracy
    gains = [first[name, True] - first[name, False] for name in ("resnet34", "resnet50")]
    assert 0 < gains[0] < gains[1]  # 3
    assert all(abs(first[name, True] - first["resnet18", False]) < 1.5
               for name in ("resnet34", "resnet50"))
    told = [("resnet34", True), ("resnet34", False), ("resnet50", True), ("resnet50", False),
            ("resnet18", False)]
    say += ["ResNet-34 has {:.1f}% instead of {:.1f}, ResNet-50 {:.1f} instead of {:.1f}, the "
            "larger gain; ResNet-18, near which both should end, has {:.1f}".format(
                *(first[network] for network in told))]
    one = seed_0_at_the_common_rate(every_run()).xs("projection", level="shortcut")
    say += [f"on two cores: {one.resnet34:.1f}, {one.resnet50:.1f} and {one.resnet18:.1f}"]
    own = 100 * rh.ablation_table(main)
    order = own[["residual", "plain"]].to_numpy().ravel()
    assert (np.diff(order) < 0).all() and (own.difference > 0).all()  # 4 and 5
    assert (own.low < 0).tolist() == [False, True, False]
    say += ["{:.1f}, {:.1f}, {:.1f}, {:.1f}, {:.1f} and {:.1f}%, in the order".format(*order),
            "{:+.1f}, {:+.1f} and {:+.1f} points at 18, 34 and 50 layers".format(*own.difference),
            "The signs are right, but the interval at 34 layers includes 0"]
    gamma = zero_gamma(gpu).diff().iloc[-1]
    say += [f"rose by {gamma.resnet34:.1f} and {gamma.resnet50:.1f} points"]
    for words in say:
        assert words in text, words
    text, say = markdown_of("appendix_why"), []
    points = measured_and_reached(*main_tables())
    correlation = points.corr(method="spearman").accuracy
    say += [f"a rank correlation of {correlation.measure:.2f}",
            f"(rank correlation {correlation.measure:.2f})",
            f"towards the input, orders the twelve nearly as well ({correlation.growth:.2f})",
            f"so does the growth of the gradient ({correlation.growth:.2f})"]
    kinds = [points[points.index.str.startswith(kind)].corr(method="spearman").accuracy
             for kind in ("plain", "resnet")]
    assert all(-kind.growth > kind.measure for kind in kinds)  # "even better"
    say += ["(plain {:.2f}, residual {:.2f}; the measure {:.2f} and {:.2f})".format(
        *(kind[key] for key in ("growth", "measure") for kind in kinds))]
    pairs = [points.loc[f"resnet{d}"] - points.loc[f"plain{d}"] for d in (18, 34, 50, 20, 32, 56)]
    assert len(points) == 12  # "twelve networks", "in all six pairs"
    assert all(pair.measure > 0 and pair.accuracy > 0 for pair in pairs)
    say += ["{plain34:.2f} in plain-34 and {plain50:.2f} in plain-50".format(**points.growth),
            "{resnet34:.2f} in ResNet-34 and {resnet50:.2f} in ResNet-50".format(**points.growth)]
    for words in say:
        assert words in text, words


def measured_and_reached(main, small):
    """Measure and growth before training (means over three seeds) beside the mean accuracy."""
    measures = pd.read_csv(ROOT / "results" / "measure.csv")
    assert set(measures.seed) == {0, 1, 2} and len(measures) == 90
    he = measures.query(HE)
    ends = pd.concat([main, small]).query("epoch == 15")
    points = he.groupby("model")[["measure", "growth"]].mean()
    return points.assign(accuracy=100 * ends.groupby("model").val_accuracy.mean())


def ends_with_adam():
    """The last epochs of the runs from two cores in 15 epochs with Adam, seeds 0 to 2."""
    runs = runs_in("full/cats_vs_dogs").query(
        "epoch == 15 and epochs == 15 and seed < 3 and optimizer == 'adam'")
    return runs.assign(hardly=runs.loss > 0.98 * np.log(2))


def started():
    """Of these, the runs at one of three starts."""
    runs = ends_with_adam().query("shortcut_scale == 1 and mirrored in [0, 1]")
    small = ~runs.model.map(rh.MODELS).isin(rh.UNITS)
    runs = runs[small | (runs.shortcut != "zero_pad")]
    start = np.select([runs.zero_gamma, runs.mirrored == 1], ["zero gamma", "mirrored"], "he")
    return runs.assign(start=start, percent=100 * runs.val_accuracy)


def runs_of(model, rate, start):
    runs = started()
    return runs[(runs.model == model) & (runs.learning_rate == rate) & (runs.start == start)]


def starts():
    """Of each network, start and rate with seeds 0 to 2: means, failed runs, each accuracy."""
    groups = started().groupby(["model", "start", "learning_rate"])
    means = groups[["loss", "percent"]].mean().assign(
        hardly=groups.hardly.sum(), seeds=groups.seed.nunique(),
        each=groups.percent.agg(lambda percents: listed(percents, "{:.1f}")))
    return means[means.seeds == 3]


STARTS = ("mirrored", "he")
WIRED = {34: 0.001, 50: 0.001, 56: 0.003}  # depths with and without shortcuts, and their rate


def wired(start):
    """Of one start, by network: the mean accuracy in percent at the depth's rate."""
    percent = starts().percent
    return {f"{kind}{depth}": percent[f"{kind}{depth}", start, rate]
            for kind in ("plain", "resnet") for depth, rate in WIRED.items()
            if (f"{kind}{depth}", start, rate) in percent.index}


def leads(start):
    """Residual minus plain from this start, by depth."""
    percent = wired(start)
    return [percent[f"resnet{depth}"] - percent[f"plain{depth}"] for depth in WIRED]


def percents(row):
    """A row of `compare`, such as "+1.2 [-0.6, +2.9]"."""
    numbers = (100 * row[key] for key in ("difference", "low", "high"))
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*numbers)


def percents_of(model, rate, start):
    """The accuracies of `runs_of` in percent."""
    return 100 * runs_of(model, rate, start).val_accuracy.to_numpy()


def mirrored_plain_minus_usual_residual():
    """At 34 and 50 layers, in points and with its interval; both undecided, as the pages say."""
    pairs = [(runs_of(f"resnet{depth}", 0.001, "he"), runs_of(f"plain{depth}", 0.001, "mirrored"))
             for depth in (34, 50)]
    level = [percents(rh.compare(*pair)) for pair in pairs]
    assert all("[-" in words and ", +" in words for words in level)
    return level


def difference(*groups):
    """First minus second, minus third plus fourth, with Welch's 95% interval."""
    parts = [np.var(group, ddof=1) / len(group) for group in groups]
    freedom = sum(parts) ** 2 / sum(p**2 / (len(g) - 1) for p, g in zip(parts, groups))
    half = scipy.stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts))
    mean = sum(sign * group.mean() for sign, group in zip((1, -1, -1, 1), groups))
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def test_the_appendix_tells_the_test():
    text, means, say = markdown_of("appendix_why"), starts(), []
    he, mirrored, zero = (wired(start) for start in ("he", "mirrored", "zero gamma"))
    assert all(mirrored[name] > he[name] for name in he)
    say += ["gains less, {:+.1f}, {:+.1f} and {:+.1f} points".format(
        *(mirrored[f"resnet{depth}"] - he[f"resnet{depth}"] for depth in WIRED)),
        "ends at {:.1f}, {:.1f} and {:.1f}%".format(*zero.values())]
    assert means.hardly["plain50", "he", 0.001] == 3  # "all three runs of plain-50 hardly learn"
    assert means.hardly["plain56", "mirrored", 0.003] == 1  # "one run never leaves guessing"
    gains = [percents(rh.compare(runs_of(f"plain{depth}", rate, "he"),
                                 runs_of(f"plain{depth}", rate, "mirrored")))
             for depth, rate in WIRED.items()]
    say += ["the gain is decided, {} and {} points".format(*gains[:2]), f"it is not, {gains[2]}:"]
    assert ("lifts plain-34 by {} points and plain-50 by {};".format(
        *(gain.split()[0].lstrip("+") for gain in gains[:2]))) in markdown_of("04_ablation")
    beside = [percents(rh.compare(runs_of(name, rate, "he"),
                                  runs_of(f"plain{name[-2:]}", 0.001, "mirrored")))
              for name, rate in (("plain34", 0.003), ("plain50", 0.003), ("resnet34", 0.01),
                                 ("resnet50", 0.01))]
    rates = main_tables()[0].groupby("model").learning_rate.first()
    assert all(rates[f"{kind}{depth}"] == rate for depth in (34, 50)
               for kind, rate in (("plain", 0.003), ("resnet", 0.01)))  # "at its own rates"
    say += ["still gains {} points on plain-34 and {} on plain-50, and differs by {} from "
            "ResNet-34 and by {} from ResNet-50, again undecided".format(*beside)]
    assert all("[-" in words for words in beside[2:])
    say += [f"plain-56 ends at {means.each['plain56', 'mirrored', 0.003]}% with its three seeds"]
    before, after, tables = leads("he"), leads("mirrored"), []
    for depth, rate in WIRED.items():
        pair = [runs_of(f"{kind}{depth}", rate, "mirrored") for kind in ("plain", "resnet")]
        tables += [rh.compare(*pair)]
    say += ["is {:+.1f}, {:+.1f} and {:+.1f} points at 34, 50 and 56 layers from He's start"
            .format(*before), "it is {}, {} and {} (with".format(*map(percents, tables))]
    np.testing.assert_allclose([100 * row["difference"] for row in tables], after)
    assert all(a < b for a, b in zip(after, before))
    assert all(row["low"] < 0 for row in tables)  # "all three are undecided"
    level = mirrored_plain_minus_usual_residual()
    say += ["with its usual start by {} points, and plain-50 from ResNet-50 by {}: both".format(
        *level)]
    lifted = [f"{he[f'plain{depth}']:.1f} to {mirrored[f'plain{depth}']:.1f}" for depth in WIRED]
    say += [f"lift plain-34 from {lifted[0]}% (ResNet-34 has {he['resnet34']:.1f} from its usual "
            f"start), plain-50 from {lifted[1]} and plain-56 from {lifted[2]}",
            "is {:+.1f}, {:+.1f} and {:+.1f} points at 34, 50 and 56 layers, instead of "
            "{:+.1f}, {:+.1f} and {:+.1f}".format(*after, *before)]
    for words in say:
        assert words in text, words


def test_the_appendix_tells_that_the_start_needs_a_low_rate():
    text, means = markdown_of("appendix_why"), starts()
    slow = runs_of("plain56", 0.001, "mirrored")
    usual = [percents(rh.compare(runs_of(name, 0.003, "he"), slow))
             for name in ("plain56", "resnet56")]
    say = [f"plain-56 has {listed(100 * slow.val_accuracy, '{:.1f}')}% there, {usual[0]} points "
           f"beside He's start at 0.003 and {usual[1]} beside ResNet-56 at 0.003",
           f"At 0.001 mirrored plain-56 reaches {100 * slow.val_accuracy.mean():.1f}%"]
    fell = runs_of("resnet34", 0.003, "he").percent
    assert fell.min() < fell.median() - 5  # "one run of ResNet-34 falls back"
    assert means.hardly["plain50", "he", 0.003] == 1  # "where one hardly learns"
    assert rh.compare(*(runs_of("plain50", 0.003, start) for start in STARTS))["high"] > 0
    assert (slow.loss < 0.9 * np.log(2)).all()  # "at 0.001 every mirrored network learns"
    lower, usual = (runs_of("plain34", 0.003, start) for start in STARTS)
    assert rh.compare(usual, lower)["high"] > 0  # "undecided"
    assert lower.val_accuracy.max() < usual.val_accuracy.min()  # "all three are below all three"
    assert means.hardly["plain34", "mirrored", 0.001] == 0
    assert means.hardly["plain50", "mirrored", 0.001] == 0
    assert means.hardly["plain50", "mirrored", 0.003] == 3
    pairs = {name: [means.percent[name, start, 0.003] for start in STARTS]
             for name in ("plain20", "plain34", "plain50", "resnet56")}
    say += ["all three runs of plain-50 hardly learn ({:.1f}% in the mean; from He's start {:.1f},"
            .format(*pairs["plain50"]),
            "plain-34 has {:.1f}% where He's start has {:.1f}".format(*pairs["plain34"]),
            "({:.1f}% mirrored, {:.1f} from He's start)".format(*pairs["plain20"]),
            "learn at 0.003, {1:.1f}% from He's start and {0:.1f} mirrored".format(
                *pairs["resnet56"])]
    one = [runs_of(name, 0.001, "he").query("seed == 0").percent.item()
           for name in ("plain56", "resnet56")]
    say += ["with seed 0 plain-56 ends at {:.1f}% at 0.001 and ResNet-56 at {:.1f}%".format(*one)]
    assert means.hardly["plain56", "mirrored", 0.003] == 1  # "either learns well or not at all"
    assert (means.hardly.loc["resnet56"].loc[list(STARTS)] == 0).all()  # "all three runs learn"
    for words in say:
        assert words in text, words
    measures = pd.read_csv(ROOT / "results" / "measure.csv").query("mirrored == 1")
    assert (measures.groupby("model").measure.mean().round(2) >= 0.99).all()


SAME_MEASURE = ((0.5, 0.5), (0.8, 0.7), (0.9, 0.8))  # prediction 6: shortcut scale, share


def dose_runs():
    """The runs with 56 layers and a dose, with measure and growth."""
    runs = ends_with_adam().query("learning_rate == 0.003 and not zero_gamma")
    measures = pd.read_csv(ROOT / "results" / "measure.csv").query("not zero_gamma")
    both = runs.merge(measures, on=["model", "seed", "mirrored", "shortcut_scale"])
    both = both.assign(accuracy=100 * both.val_accuracy)
    both = both.query("model == 'plain56' or model == 'resnet56' and mirrored == 0")
    assert (both.groupby("seed").size() == 11).all()
    return both.sort_values("seed")


def doses(runs):
    """Measure, growth, accuracy in percent: means of ResNet-56 by scale, of plain-56 by share."""
    means = runs.groupby(["model", "shortcut_scale", "mirrored"])
    means = means[["measure", "growth", "accuracy"]].mean()
    return means.loc["resnet56"].droplevel("mirrored"), means.loc["plain56"].loc[1]


def rises(dose):
    """Prediction 5: in the order of the measure, of which less than .1 apart counts as equal."""
    points = dose[["measure", "accuracy"]].to_numpy()
    return all(b[1] > a[1] for a in points for b in points if b[0] - a[0] >= 0.1)


def test_the_appendix_judges_the_predictions():
    """Each as it was written down: by means over three seeds."""
    text, means = markdown_of("appendix_why"), starts()
    percent = means.percent
    small, fast = ([percent[name, start, 0.003] for start in STARTS]
                   for name in ("plain20", "plain34"))
    fifty, thin = ([percent[name, start, rate] for start in ("mirrored", "zero gamma", "he")]
                   for name, rate in (("resnet50", 0.001), ("resnet56", 0.003)))
    gains = [[percent[f"{kind}{depth}", "mirrored", rate] - percent[f"{kind}{depth}", "he", rate]
              for kind in ("plain", "resnet")] for depth, rate in WIRED.items()]
    more = [difference(*(percents_of(f"{kind}{depth}", rate, start)
                         for kind in ("plain", "resnet") for start in ("mirrored", "he")))
            for depth, rate in WIRED.items()]
    assert ["[-" in words for words in more] == [False, True, True]  # "at 34 layers alone"
    verdict = {True: "a hit", False: "a miss"}
    deep = percent["plain56", "mirrored", 0.003], percent["plain50", "mirrored", 0.001]
    say = [f"(0.003): {deep[0]:.1f}, {verdict[deep[0] >= 80]}.",
           f"(0.001): {deep[1]:.1f}, {verdict[deep[1] >= 70]}: "
           f"{means.each['plain50', 'mirrored', 0.001]} with the three seeds",
           "{:.1f} instead of {:.1f}, ".format(*small) + verdict[small[0] - small[1] < 2] + ".",
           "{:.1f} instead of {:.1f}, ".format(*fast) + verdict[fast[0] - fast[1] >= 2]
           + ".",
           "mirrored {:.1f} and zero gamma {:.1f} instead of {:.1f}, ".format(*fifty)
           + verdict[min(fifty[:2]) - fifty[2] >= 5 and abs(fifty[0] - fifty[1]) <= 3],
           "mirrored {:.1f} and zero gamma {:.1f} instead of {:.1f}, ".format(*thin)
           + verdict[max(abs(thin[0] - thin[2]), abs(thin[1] - thin[2])) < 1.5],
           "{:+.1f} against {:+.1f} at 34, ".format(*gains[0]),
           "{:+.1f} against {:+.1f} at 50 and ".format(*gains[1]),
           "{:+.1f} against {:+.1f} at 56 layers, ".format(*gains[2])
           + verdict[all(plain > residual for plain, residual in gains)]
           + f". (The difference between the two gains is decided at 34 layers alone, {more[0]}.)",
           f"with zero gamma ResNet-50 gains {fifty[1] - fifty[2]:.1f} points at 0.001 (three "
           "seeds)"]
    assert 70 <= deep[0] < 70.5  # "only just above"
    middle = {True: "In between, as written down", False: "Below 70, as written down"}
    say += [middle[deep[0] >= 70]] if deep[0] < 80 else []
    runs = dose_runs()
    assert runs.seed.unique().tolist() == [0, 1, 2]
    scales, shares = doses(runs)
    learned = doses(runs[~runs.hardly])[1].accuracy
    failed = runs[runs.hardly].sort_values("mirrored")
    assert (failed.model == "plain56").all() and set(failed.seed) == {1}
    assert failed.mirrored.tolist() == [0.8, 1]
    assert (failed.accuracy < runs[~runs.hardly].accuracy.min()).all()  # "below all others"
    say += ["plain-56 with a share of 0.8 ({:.1f}%) and of 1 ({:.1f}%)".format(*failed.accuracy)]
    judged = [rises(dose) for dose in (scales, shares)]
    assert judged == [True, False]  # 5: "ResNet-56 rises with each step, plain-56 does not"
    assert scales.accuracy.is_monotonic_increasing  # "lower with each step"
    say += [f"(measure {shares.measure[0.9]:.2f}) ends at {shares.accuracy[0.9]:.1f}%, ResNet-56 "
            f"with its shortcuts whole ({scales.measure[1]:.2f}) at {scales.accuracy[1]:.1f}%"
            .replace("(measure 0.", "(measure .").replace("(0.", "(.")]
    pairs = [(scales.accuracy[a], shares.accuracy[share]) for a, share in SAME_MEASURE]
    apart = [abs(a - b) for a, b in pairs]
    assert all(a > b for a, b in pairs)  # "ResNet-56 is ahead in each pair"
    for (a, share), points in list(zip(SAME_MEASURE, apart))[:2]:
        for part in (runs.query(f"model == 'resnet56' and shortcut_scale == {a}"),
                     runs.query(f"model == 'plain56' and mirrored == {share}")):
            assert points < np.ptp(part.accuracy)  # "by less than the seeds of one network differ"
    first = doses(runs[runs.seed == 0])
    with_seed_0 = max(abs(first[0].accuracy[a] - first[1].accuracy[share])
                      for a, share in SAME_MEASURE)
    say += ["(0.003): {:.1f} and {:.1f}, {:.1f} and {:.1f}, {:.1f} and {:.1f}, ".format(
                *(number for pair in pairs for number in pair)) + verdict[max(apart) <= 5],
            "beyond a share of 0.7: " + verdict[all(judged)],
            "two are {:.1f} and {:.1f} points apart. The third, with the highest measure, is "
            "{:.1f} apart".format(*apart), f"with seed 0 none is more than {with_seed_0:.1f} apart",
            "ends at {:.1f}, {:.1f}, {:.1f}, {:.1f} and {:.1f}%".format(*scales.accuracy[::-1]),
            "from {:.1f} to {:.1f}% with a share of 0.5 and to {:.1f}% with 0.7, and no further: "
            "{:.1f}, {:.1f} and {:.1f}%".format(*shares.accuracy)
            + f" with 0.8, 0.9 and 1 ({learned[0.8]:.1f} and {learned[1]:.1f}% with 0.8 and 1 ",
            f"ends {scales.accuracy[0.5] - shares.accuracy[0]:.1f} points ahead",
            f"from {scales.accuracy[0.5]:.1f} to {scales.accuracy[1]:.1f}% as ResNet-56's",
            f"from {shares.accuracy[0]:.1f} to {shares.accuracy[0.7]:.1f}% as plain-56 goes from"]
    grown = [(scales.growth[a], shares.growth[share]) for a, share in SAME_MEASURE]
    say += ["growth, too, " + ", ".join("{:.2f} and {:.2f}".format(*pair) for pair in grown) + ",",
            f"{scales.growth[0.5]:.2f} per layer against {shares.growth[0]:.2f}, over 52 layers a "
            f"factor of {(shares.growth[0] / scales.growth[0.5]) ** 52:.0f}",
            f"has a measure of {scales.measure[0.5]:.2f}, hardly more than plain-56 with "
            f"{shares.measure[0]:.2f}, and".replace(" 0.", " .")]
    for words in say:
        assert words in text, words


def sgd_trials():
    """Accuracy in percent and training loss of the trials with SGD, by network, start and rate."""
    trials = runs_in("full/cats_vs_dogs").query(
        "optimizer == 'sgd' and epochs == 5 and epoch == 5 and seed == 0")
    trials = trials.assign(percent=100 * trials.val_accuracy)
    trials = trials.set_index(["model", "mirrored", "learning_rate"]).sort_index()
    return trials[["percent", "loss"]]


def test_the_pages_tell_the_trials_with_sgd():
    trials, text = sgd_trials(), markdown_of("appendix_why")
    assert len(trials) == 12
    losses = trials.groupby("learning_rate").loss.mean()
    assert losses.idxmin() == 0.03  # "the rate with the lower training loss"
    percent = trials.percent.xs(0.03, level="learning_rate")
    networks = [("plain{}", 1), ("resnet{}", 0), ("plain{}", 0)]
    deep, small = ([percent[name.format(depth), start] for name, start in networks]
                   for depth in (56, 20))
    for part in (trials.percent.xs(rate, level="learning_rate") for rate in (0.03, 0.1)):
        assert all(part[f"plain{depth}", 1] > part[f"resnet{depth}", 0] for depth in (20, 56))
    say = [f"({losses[0.03]:.3f} in the mean of the six, {losses[0.1]:.3f} at 0.1)",
           "mirrored plain-56 reaches {:.1f}%, ResNet-56 {:.1f} and plain-56 {:.1f}".format(*deep),
           "mirrored plain-20 {:.1f}, ResNet-20 {:.1f} and plain-20 {:.1f}".format(*small),
           f"gains plain-20 as much as {small[0] - small[2]:.1f} points in these 5 epochs; with "
           "Adam it gains less than 1, but after 15"]
    percent = starts().percent
    assert percent["plain20", "mirrored", 0.003] - percent["plain20", "he", 0.003] < 1
    adam = runs_in("full/cats_vs_dogs").query(f"{USUAL} and epochs == 5 and epoch == 5")
    adam = 100 * adam[adam.learning_rate == 0.003].set_index("model").val_accuracy
    known = f"plain-56 at 0.003: {adam.plain56:.1f}%, mirrored 78.0; ResNet-56 {adam.resnet56:.1f}"
    assert known in flat("results/predictions.md")
    say += [f"ended at 78.0% (mirrored plain-56), {adam.resnet56:.1f}% (ResNet-56) and "
            f"{adam.plain56:.1f}% (plain-56;"]
    for words in say:
        assert words in text, words
    mirrored, residual, plain = deep
    assert (f"plain-56 reaches {plain:.1f}%, mirrored {mirrored:.1f}, ResNet-56 {residual:.1f}"
            in page("README.md"))
    rows = ["| {:g} | {:.1f} | {:.1f} | {:.1f} | {:.1f} | {:.1f} | {:.1f} |".format(
        rate, *(trials.percent[f"{kind}{depth}", mirrored, rate] for depth in (20, 56)
                for kind, mirrored in (("plain", 0), ("plain", 1), ("resnet", 0))))
            for rate in (0.03, 0.1)]
    assert all(row in page("results/predictions.md") for row in rows)
    plan = pd.read_csv(ROOT / "results" / "plan.csv").query("part == 'SGD'")
    assert set(plan.learning_rate) == {0.03} and len(plan) == 18


def test_the_appendix_tells_the_lesions():
    taken = pd.read_csv(ROOT / "results" / "lesions.csv", index_col="unit")
    lost = taken.loc["whole"] - taken.drop("whole")
    assert len(lost) == 24
    cheap = (lost.resnet56 < 1).sum()
    assert cheap == 15 and (lost.resnet56[:9] >= 1).all()  # "the nine that cost more are the first"
    mirrored = lost.plain56_mirrored
    low = (taken.drop("whole") < 55).sum()
    assert (mirrored < 1).sum() == 1  # "only 1 of 24 costs less than a point"
    assert abs(taken.drop("whole")[["plain56", "plain56_mirrored"]].median() - 52).max() < 1
    lowest = taken[["plain56", "plain56_mirrored"]].min()
    assert taken.min().min() > 20  # what the axis shows
    assert lowest.max() < 40  # "far below guessing"
    say = ["lowest bar of plain-56, at {:.1f}%, and that of mirrored plain-56, at {:.1f}%".format(
               *lowest),
           f"{cheap} of 24 units cost less than a point. The nine that cost more, up to "
           f"{lost.resnet56.max():.1f} points",
           f"the median loss is {lost.plain56.median():.1f} points",
           f"without any one of {low.plain56} of the 24 units",
           f"({taken.plain56_mirrored['whole']:.1f}% of these images) and falls as low: below 55% "
           f"without any one of {low.plain56_mirrored} units",
           f"(Its median loss, {mirrored.median():.1f} points"]
    for words in say:
        assert words in markdown_of("appendix_why"), words


def test_the_appendix_tells_when_gradients_shatter(capsys):
    scope = {"np": np}
    for name in ("slopes", "variants", "alike"):
        exec("".join(cells_of("appendix_why")[name]["source"]), scope)
    said = capsys.readouterr().out
    assert said == printed(cells_of("appendix_why")["alike"])
    book, gain, deviation, mean, norm = (float(x.split(": ")[1]) for x in said.splitlines())
    for words in (f"agree less, {gain:.2f} instead of {book:.2f}", f"not at all, {norm:.2f}:",
                  f"dividing by the deviation leaves {deviation:.2f}, subtracting the mean "
                  f"{mean:.2f}"):
        assert words in markdown_of("appendix_why"), words


def test_the_appendix_tells_the_growth():
    said = printed(cells_of("appendix_why")["signals-growth"])
    times = {name: float(x.replace(",", "")) for name, x in re.findall(r"(\S+): ([\d.,]+)", said)}
    assert min(times.values()) > 1 and len(times) == 8  # "no gradient vanishes"
    power = int(np.log10(times["plain-152"]))
    assert f"in plain-152 gradients grow more than 10^{power}-fold" in markdown_of("appendix_why")


def zero_gamma(gpu):
    """Mean validation accuracy at 0.001, seeds 0 to 2, in percent: without and with zero gamma."""
    runs = gpu.query("learning_rate == 0.001 and epoch == 15 and epochs == 15")
    runs = runs.query("mirrored == 0 and shortcut == 'projection'")
    runs = runs[runs.seed.isin([0, 1, 2])]
    runs = runs[runs.model.isin(["resnet34", "resnet50"])]
    assert (runs.groupby(["model", "zero_gamma"]).seed.nunique() == 3).all()
    return 100 * runs.pivot_table(index="zero_gamma", columns="model", values="val_accuracy")


def cells_of(name):
    """The code cells of a notebook by their id."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    return {cell["id"]: cell for cell in cells if cell["cell_type"] == "code"}


def printed(cell):
    return "".join(text for _, text in outputs(cell))


def test_notebook_2_shows_equal_networks():
    cells = cells_of("02_models")
    lines = re.findall(r"^(\d+) pixels, (\S+): largest output (\S+), largest difference (\S+)$",
                       printed(cells["equal-code"]), re.M)
    names = ["plain-34", "ResNet-34", "plain-50", "ResNet-50"]
    assert [line[:2] for line in lines] == [(size, x) for size in ("256", "32") for x in names]
    apart = [float(difference) / float(largest) for *_, largest, difference in lines]
    assert max(apart[:4]) == 0 < max(apart[4:]) < 1e-5  # "equal", "equal to rounding"
    assert re.findall(r"equal: (\w+)", printed(cells["parameters-code"])) == ["True", "True"]


def test_notebook_3_tells_the_committed_runs():
    told, runs = markdown_of("03_training"), committed_runs()
    runs = runs[(runs.seed == 0) & runs.model.isin(["plain34", "resnet34", "plain50", "resnet50"])]
    end = runs[runs.epoch == runs.epochs].set_index("model").loss
    assert (f"ResNet-34 falls to {end.resnet34:.3f}, of ResNet-50 to {end.resnet50:.3f} and of "
            f"plain-34 to {end.plain34:.3f}: all three learn. plain-50 ends at {end.plain50:.3f}, "
            f"hardly below guessing ({np.log(2):.3f})") in told
    assert (end <= 0.98 * np.log(2)).to_dict() == {
        "plain34": True, "resnet34": True, "plain50": False, "resnet50": True}
    by_epoch = runs.pivot(index="epoch", columns="model", values="loss")
    assert (by_epoch.loc[15] < by_epoch.loc[1]).all()  # "the loss falls in all four"
    ahead = [by_epoch.index[by_epoch[f"plain{d}"] < by_epoch[f"resnet{d}"]] for d in (34, 50)]
    assert [list(epochs) for epochs in ahead] == [[1], [1, 2, 3]]
    assert ("plain-34 is ahead of ResNet-34 in the first epoch and plain-50 ahead of ResNet-50 in "
            "the first three") in told
    by_epoch = runs.pivot(index="epoch", columns="model", values="val_loss")
    ahead = [by_epoch.index[by_epoch[f"plain{d}"] < by_epoch[f"resnet{d}"]] for d in (34, 50)]
    assert not len(ahead[1])
    assert 1 not in ahead[0]
    assert ("ResNet-34 is ahead in the first epoch, and plain-34 only in epochs "
            f"{listed(ahead[0], '{}')}.") in told
    last = 100 * runs[runs.epoch == 15].set_index("model").val_accuracy
    assert (f"gaps on this page, {last.resnet34 - last.plain34:.1f} points at 34 layers and "
            f"{last.resnet50 - last.plain50:.1f} at 50 (before rounding),") in told
    rates = main_tables()[0].groupby("model").learning_rate.first()
    assert (rates[["plain34", "plain50"]] == 0.003).all()
    assert (rates[["resnet34", "resnet50"]] == 0.01).all()
    weights = page("results/weights/README.md")
    assert "with a validation accuracy of {}%".format(
        re.search(r"\| ResNet-56 \| ([\d.]+) ", weights)[1]) in told
    first = (100 * runs[runs.epoch == 1].set_index("model").val_accuracy).map("{:.1f}".format)
    assert (f"{first.resnet34} against {first.plain34}% in validation with 34 layers, "
            f"{first.resnet50} against {first.plain50}% with 50") in told
    for key in ("accuracy", "val_accuracy"):  # "lead from the first epoch"
        by_epoch = runs.pivot(index="epoch", columns="model", values=key)
        assert all((by_epoch[f"resnet{d}"] > by_epoch[f"plain{d}"]).all() for d in (34, 50))
    assert printed(cells_of("03_training")["ahead"]) == (
        "plain-34 is ahead in epochs: [1]\nplain-50 is ahead in epochs: [1, 2, 3]\n")


def test_notebook_3_shows_two_networks_that_learn():
    cells = cells_of("03_training")
    ends = re.findall(r"([\w-]+): ([\d.]+)%", printed(cells["ends"]))
    accuracy = {name: float(percent) for name, percent in ends}
    assert accuracy["ResNet-20"] > 65 and accuracy["plain-20"] > 60
    assert accuracy["ResNet-20"] > accuracy["plain-20"]  # "ResNet-20 is ahead"
    for name in ("fit", "twin"):
        for key in ("loss", "val_loss"):
            losses = [float(x) for x in re.findall(rf" {key}: ([\d.]+)", printed(cells[name]))]
            assert len(losses) == 3 and losses[-1] < min(losses[0], 0.95 * np.log(2))


def test_notebook_3_knows_every_part_of_the_plan():
    scope = {}
    exec("".join(cells_of("03_training")["plan-parts"]["source"]), scope)
    assert set(scope["WHAT"]) == set(pd.read_csv(ROOT / "results" / "plan.csv").part)


def solved(part, **given):
    """What the solutions of one notebook define."""
    answers = {"rh": rh, "keras": keras, "np": np, "pd": pd, **given}
    for name, cell in cells_of("solutions").items():
        if name.startswith(f"{part}-"):
            exec("".join(cell["source"]), answers)
    return answers


def check_exercises(notebook, given, answers, wrong, capsys):
    """The exercises' cells with the solutions' answers, with wrong ones, and with none."""
    exercises = cells_of(notebook)
    for source, verdict in ((answers, "{} is right"), (wrong, "{} is not right yet"),
                            (dict.fromkeys(wrong), "put your answer into {}")):
        capsys.readouterr()
        scope = given | {name: source[name] for name in wrong}
        for name in ("def-check", *(name for name in exercises if name.startswith("exercise-"))):
            lines = "".join(exercises[name]["source"]).splitlines()
            exec("\n".join(x for x in lines if not re.match(r"[\w =]+ = None\b", x)), scope)
        said = dict.fromkeys(capsys.readouterr().out.splitlines())  # some are checked twice
        assert list(said) == [verdict.format(name) for name in wrong]


def test_each_exercise_has_its_solution_under_its_name():
    names = ("01_data", "02_models", "03_training", "04_ablation", "appendix_why")
    exercises = re.findall(r"^\*\*(\d\. [\w ]+)\.", "\n".join(map(markdown_of, names)), re.M)
    assert len(exercises) >= 3 * len(names)
    assert re.findall(r"^### (\d\. [\w ]+):", markdown_of("solutions"), re.M) == exercises


def test_solutions_are_right_by_the_checks_of_notebook_1(capsys, tiny_cats):
    answers = solved("data")
    wrong = {"batches_and_last": [1, 100], "mean_image": answers["mean_image"].mean(axis=(0, 1)),
             "first_labels": answers["first_labels"][::-1]}
    given = {"rh": rh, "np": np, "data": answers["data"]}
    check_exercises("01_data", given, answers, wrong, capsys)


def test_solutions_are_right_by_the_checks_of_notebook_2(capsys):
    """On the networks that the notebook builds by hand."""
    given, cells = {"keras": keras, "stage_table": stage_table}, cells_of("02_models")
    given |= {"rh": rh, "np": np, "tf": tf}
    for name in ("def-conv-bn", "def-pair", "def-my-unit", "def-my-stage", "def-my-resnet"):
        exec("".join(cells[name]["source"]), given)
    answers = solved("models", tf=tf)
    given |= {name: answers[name] for name in ("images", "value", "x")}
    wrong = {"weight_layers": 30, "probability_of_dog": 0.0, "arrays_with_gradient": 2,
             "my_zero_pad": lambda x, *rest: answers["my_zero_pad"](x[:, ::-1], *rest)}
    check_exercises("02_models", given, answers, wrong, capsys)


def test_solutions_are_right_by_the_checks_of_notebook_3(capsys, monkeypatch):
    monkeypatch.setattr(rh, "read_runs", functools.cache(rh.read_runs))  # time
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype="uint8")
    data = types.SimpleNamespace(
        class_names=["cat", "dog"], train_images=noise, train_labels=np.arange(64) % 2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    given = {"rh": rh, "keras": keras, "np": np, "data": data, "x": rh.normalize(noise),
             "y": data.train_labels, "loss": loss}
    answers = solved("training", data=data)
    wrong = {"number_of_steps": 3810, "highest_at": 126,
             "losses_before": answers["losses_before"][::-1], "spread": 0.7,
             "gap": 5.8, "my_schedule": lambda step: answers["my_schedule"](step + 1)}
    check_exercises("03_training", given, answers, wrong, capsys)


def test_solutions_are_right_by_the_checks_of_notebook_4(capsys, monkeypatch):
    """On the notebook's own sets, made by its cells."""
    monkeypatch.setattr(rh, "read_runs", functools.cache(rh.read_runs))  # time
    given = sets_of_notebook_4(monkeypatch)
    answers = solved("ablation")
    wrong = {"lower_loss": [18], "interval": [13.0, 25.0], "how_many": 3}
    check_exercises("04_ablation", given, answers, wrong, capsys)


def test_solutions_are_right_by_the_checks_of_the_appendix(capsys):
    measures = pd.read_csv(rh.COMMITTED / "measure.csv")
    he = measures.query(HE)
    given = {"rh": rh, "keras": keras, "np": np, "pd": pd, "he": he}
    answers = solved("appendix")
    wrong = {"how_many": 3, "times": 52 * 1.15, "my_mirror": lambda kernel: -kernel}
    check_exercises("appendix_why", given, answers, wrong, capsys)


def page(name):
    return (ROOT / name).read_text()


def flat(name):
    """A page without its line breaks."""
    return " ".join(page(name).split())


def marked(text, name):
    """What stands between the comments of this name."""
    (found,) = re.findall(rf"<!-- {name} -->\n+(.*?)\n+<!-- /{name} -->", text, re.S)
    return found


def test_csv_tables_and_histories_agree():
    main, small = main_tables()
    numbers = both_tables(pd.concat([main, small]))[0]
    saved = pd.read_csv(ROOT / "results" / "ablation.csv", index_col=0)
    pd.testing.assert_frame_equal(saved, numbers, check_dtype=False)
    assert page("results/ablation.md").strip() == both_tables(main)[1]
    assert page("results/section_4_2.md").strip() == both_tables(small)[1]


def test_readme_shows_the_required_and_the_small_networks():
    rows = []
    for runs, depths, label in zip(main_tables(), ((18, 34, 50), (20, 56)), ("", ", for 32x32")):
        table = format_percent(rh.ablation_table(runs))[["plain", "residual", "difference"]]
        rows += [table.loc[[f"{depth} layers" for depth in depths]]]
        rows[-1].index += label
    shown = marked(page("README.md"), "main table")
    assert shown == pd.concat(rows).to_markdown(disable_numparse=True)


def test_readme_tells_the_finding_and_the_why():
    main, small = main_tables()
    own, small_table = 100 * rh.ablation_table(main), 100 * rh.ablation_table(small)
    plain, residual = (small_table[kind].iloc[0] - small_table[kind].iloc[-1]
                       for kind in ("plain", "residual"))
    drops = [own[kind].iloc[0] - own[kind].iloc[-1] for kind in ("plain", "residual")]
    say = ["from 18 to 50 layers (and to bottlenecks) costs {:.1f} percentage points of validation "
           "accuracy without shortcuts and {:.1f} with them".format(*drops)
           + f"; in networks for 32x32 images, from 20 to 56 layers, {plain:.1f} and "
           f"{residual:.1f}"]
    assert all(rh.ablation_table(runs, "accuracy").plain.is_monotonic_decreasing
               for runs in (main, small))  # "training accuracy falls with depth, too"
    means, mirrored = starts(), wired("mirrored")
    for depth, rate in WIRED.items():
        runs = [100 * runs_of(f"{kind}{depth}", rate, start).val_accuracy
                for kind in ("plain", "resnet") for start in ("he", "mirrored")]
        assert all(len(part) == 3 for part in runs)
        row = "|".join(f"{part.mean():.1f} ± {part.std():.1f}" for part in runs)
        say += [f"|{depth}, {rate:g}|{row}|"]
    say += ["from a mirrored start ({:+.1f}, {:+.1f} and {:+.1f}, undecided)".format(
        *leads("mirrored"))]
    say += ["mirrored plain-34 ends lower ({:.1f} instead of {:.1f}, undecided)".format(
        *(means.percent["plain34", start, 0.003] for start in STARTS))]
    gains = [rh.compare(*(runs_of(f"plain{depth}", 0.001, start) for start in ("he", "mirrored")))
             for depth in (34, 50)]
    assert all(gain["low"] > 0 for gain in gains)  # "both decided"
    say += ["it lifts plain-34 by {:.1f} points and plain-50 by {:.1f}, both decided".format(
        *(100 * gain["difference"] for gain in gains))]
    level = mirrored_plain_minus_usual_residual()
    say += ["to about ResNet-34 and ResNet-50 at this rate ({} and {}, undecided)".format(
        *(words.split()[0] for words in level))]
    assert means.hardly["plain50", "mirrored", 0.003] == 3  # "hardly learns"
    assert mirrored["plain56"] < 80
    assert means.hardly["plain56", "mirrored", 0.001] == 0
    say += [f"(at 0.001 none does: {means.percent['plain56', 'mirrored', 0.001]:.1f}%)"]
    assert not rises(doses(dose_runs())[1])  # "not rising with each mirrored share"
    assert means.hardly["plain56", "mirrored", 0.003] == 1  # "never leaves guessing"
    misses = re.findall(r"^[1-9]\. \*.*a miss", markdown_of("appendix_why"), re.M)
    assert [miss[0] for miss in misses] == ["1", "4", "5", "6"]
    say += [f"Of nine [predictions](results/predictions.md) {in_a_word(len(misses))} failed"]
    points = measured_and_reached(main, small)
    assert len(points) == 12  # "twelve networks"
    both = points.corr(method="spearman").accuracy
    say += [f"(rank correlation {both.measure:.2f}; with the gradient's growth from layer to layer "
            f"{both.growth:.2f})"]
    training = 100 * rh.ablation_table(main, "accuracy")
    say += ["plain networks lose {:.1f} points of *training* accuracy, residual ones {:.1f}".format(
        *(training[kind].iloc[0] - training[kind].iloc[-1] for kind in ("plain", "residual")))]
    counts = json.loads(page("notebooks/01_data.ipynb"))["cells"]
    (share,) = {found for cell in counts for _, text in outputs(cell)
                for found in re.findall(r"validation +\d+ +\d+ +([\d.]+)%", text)}
    say += [f"guessing scores {share}"]
    assert own.residual.idxmax() == "18 layers"  # "are behind ResNet-18 here"
    for words in say:
        assert words in page("README.md"), words


def test_readme_tells_the_checks():
    (main, small), gpu = main_tables(), gpu_runs()[-1]
    common, every = 100 * rh.ablation_table(committed_runs()), every_run()
    rates = main.groupby("model").learning_rate.first()
    assert (rates[["plain34", "plain50"]] == 0.003).all()
    assert (rates[["resnet34", "resnet50"]] == 0.01).all()
    assert (rates.plain18, rates.resnet18) == (0.01, 0.003)  # "with 18 layers the reverse"
    assert (small.learning_rate == 0.003).all()
    tables = [common]
    for rate in (0.003, 0.01):
        at_rate = every[(every.learning_rate == rate) & (every.seed < 3)]
        at_rate = at_rate[at_rate.model.map(rh.MODELS).isin([18, 34, 50])]
        tables += [100 * rh.ablation_table(at_rate)]
    undecided = [table.low["34 layers"] < 0 for table in tables]
    assert undecided == [False, True, True]  # "an undecided ..."
    assert tables[2]["plain hardly learned"]["34 layers"] == 100  # "one of three"
    plain = at_rate.query("model == 'plain34' and epoch == 15").sort_values("seed").val_accuracy
    fresh, six = fresh_pair(main)
    say = ["With both networks at 0.001 it is {:+.1f}, at 0.003 an undecided {:+.1f}, at 0.01 an "
           "undecided {:+.1f}".format(*(x.difference["34 layers"] for x in tables)),
           "three fresh seeds give {:+.1f} [{:+.1f}, {:+.1f}], all six {:+.1f} [{:+.1f}, {:+.1f}]"
           .format(*(x[key] for x in (fresh, six) for key in ("difference", "low", "high"))),
           "hardly learns, and the others reach {:.1f} and {:.1f}%, more than ResNet-34 ({:.1f})"
           .format(*100 * plain[1:], tables[2].residual["34 layers"])]
    assert 100 * plain[1:].min() > tables[2].residual["34 layers"]
    drops = [[table[kind].iloc[0] - table[kind].iloc[-1] for kind in ("plain", "residual")]
             for table in tables]
    assert all(plain > residual for plain, residual in drops)  # "less at each rate"
    end = gpu[gpu.epoch == gpu.epochs].set_index("model")
    slow = end[end.epochs == 45].loc["plain50"]
    short = end.loc[["plain50"]].query(f"epochs == 15 and seed == {slow.seed} and mirrored == 0")
    short = short[short.learning_rate == slow.learning_rate]
    say += [f"training loss ends at {short.loss.item():.3f} after 15 epochs (guessing scores "
            f"{np.log(2):.3f}) and at {slow.loss:.3f} after 45 "
            f"({100 * slow.val_accuracy:.1f}% validation).",
            f"{in_a_word(rh.ablation_table(main)['plain hardly learned'].iloc[-1])} of its "
            "three runs hardly learned"]
    long = 100 * end[end.epochs == 60].val_accuracy
    say += [f"({long.resnet56:.1f} and {long.resnet20:.1f}%, one seed, GPU)"]
    percent = starts().percent
    say += ["ResNet-50 reaches {:.1f}% instead of {:.1f} (three seeds, 0.001)".format(
        *(percent["resnet50", start, 0.001] for start in ("zero gamma", "he")))]
    same = 100 * rh.ablation_table(gpu_at_the_rates_of(main)).difference
    own = 100 * rh.ablation_table(gpu_runs()[0])
    assert own.low["34 layers"] < 0
    say += ["the gap is {:+.1f} at 34 layers (undecided) and {:+.1f} at 50 with the seeds planned "
            "there, 1 to 3; with seeds 0 to 2 {:+.1f} and {:+.1f}.".format(
                *own.difference[1:], *same)]
    plan = pd.read_csv(ROOT / "results" / "plan.csv")
    trained = runs_in("full/cats_vs_dogs").file.nunique()
    assert trained > len(plan) / 2  # "most are here"
    say += [f"lists {len(plan)} runs, about {plan.minutes.sum() / 60:.0f} hours on two "
            "idle AVX-512 cores"]
    for words in say:
        assert words in page("README.md"), words


def test_the_predictions_tell_the_pair_on_two_cores():
    again = every_run().query("epoch == 15 and seed in [4, 5, 6]")
    again = again[again.learning_rate == again.model.map({"plain34": 0.003, "resnet34": 0.01})]
    assert len(again) == 6
    row = 100 * rh.ablation_table(again).loc["34 layers"]
    by_seed = again.set_index(["model", "seed"]).val_accuracy
    pairs = 100 * (by_seed["resnet34"] - by_seed["plain34"])
    ends = scipy.stats.ttest_1samp(pairs, 0).confidence_interval()
    predictions = page("results/predictions.md").replace("\n", " ")
    for words in (f"ResNet-34 has {row.residual:.1f}% and plain-34 {row.plain:.1f}%: "
                  f"{row.difference:+.1f} points, with an interval from {ends[0]:+.1f} to "
                  f"{ends[1]:+.1f}", interval(row)):
        assert words in predictions, words


@pytest.mark.parametrize("kind", ["avx512", "avx2"])
def test_the_page_of_speed_shows_the_benchmark(kind):
    shown = marked(page("docs/speed.md"), f"throughput {kind}")
    assert shown == page(f"results/throughput-{kind}.md").strip()


@pytest.mark.parametrize("kind", ["avx512", "avx2"])
def test_the_page_of_speed_says_how_much_faster_than_the_fastest_pytorch(kind):
    table = pd.read_csv(ROOT / "results" / f"throughput-{kind}.csv")
    torch = table[table.contender.str.startswith("PyTorch")]
    lead = torch.groupby("net")["this project / contender"].min()
    words = "{:.2f} (ResNet-34) and {:.2f} times (ResNet-50) as fast as the fastest PyTorch"
    assert words.format(*lead) in page("docs/speed.md")


def code_of(name, begin):
    """The block of Python on a page that begins with this."""
    (lines,) = re.findall(rf"```python\n({begin}.*?)```", page(name), re.S)
    return lines


def test_the_pandas_lines_give_the_table(monkeypatch):
    lines = code_of("docs/files.md", "import json")
    assert len(lines.strip().splitlines()) <= 10
    monkeypatch.chdir(ROOT)
    scope = {}
    exec(lines, scope)
    runs = every_run().query("learning_rate == 0.003 and seed < 3")
    table, ours = scope["table"], rh.ablation_table(runs)
    assert len(table) == 12
    for depth in (18, 34, 50, 20, 32, 56):
        assert table.loc[f"plain{depth}"] == pytest.approx(ours.plain[f"{depth} layers"])
        assert table.loc[f"resnet{depth}"] == pytest.approx(ours.residual[f"{depth} layers"])
    exec(code_of("docs/files.md", "import base64"), scope)
    assert set(scope["answers"]) <= {0, 1}
    assert len(scope["answers"]) == scope["runs"][0]["config"]["val_images"]


def test_the_lines_that_draw_a_run_again_load_it_and_draw(monkeypatch, tmp_path):
    (tmp_path / "results").symlink_to(ROOT / "results", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code_of("docs/files.md", "import resnet_helpers as rh"), scope)
    assert set(scope["runs"].file) == {"plain34-seed0.json", "resnet34-seed0.json"}
    assert (tmp_path / "curves.png").stat().st_size > 10_000
