"""README and docs/: their length, their links, and the names that they give to settings."""

import ast
import json
import os
import pathlib
import re

import pytest
import resnet_helpers as rh

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
PAGES = {path: path.read_text() for path in (README, *DOCS)}
LINKED = [README, ROOT / "CONTRIBUTING.md", *DOCS, *NOTEBOOKS,
          *sorted((ROOT / "results").rglob("*.md"))]


def name_of(path):
    return str(path.relative_to(ROOT))


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def markdown_of(path):
    text = path.read_text()
    if path.suffix != ".ipynb":
        return without_code(text)
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells
                       if cell["cell_type"] == "markdown")


# -------------------- length


def test_readme_is_short():
    assert len(PAGES[README].split()) <= 1300  # as wc -w counts


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_a_page_is_short(path):
    assert sum(bool(re.search(r"\w", word)) for word in PAGES[path].split()) <= 700


def test_readme_begins_with_finding_picture_and_table():
    text = PAGES[README]
    places = [text.index(part) for part in (
        "**In 15 epochs", "](results/figures/depth.png)", "<!-- main table -->", "\n## ")]
    assert places == sorted(places)
    assert len(text[:places[2]].split()) < 100


def test_reading_times_follow_the_words():
    """Text and code at 150 words a minute, within five minutes."""
    told = re.findall(r"\]\((notebooks/\w+\.ipynb)\) ?\|.*\| ?(\d+) ?\|$", PAGES[README], re.M)
    assert len(told) == 5
    for name, minutes in told:
        cells = json.loads((ROOT / name).read_text())["cells"]
        words = sum(len("".join(cell["source"]).split()) for cell in cells)
        assert abs(int(minutes) - words / 150) <= 5, name


# -------------------- links


def anchors(path):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)", markdown_of(path), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", markdown_of(path)):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        if not other.exists() or (anchor and anchor not in anchors(other)):
            yield target


@pytest.mark.parametrize("path", LINKED, ids=name_of)
def test_relative_links_lead_somewhere(path):
    assert list(broken_links(path)) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# One, two\n```sh\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md#one-two) [b](other.md#no-heading) [c](nowhere.md) [d](#here)")
    assert list(broken_links(page)) == ["other.md#no-heading", "nowhere.md", "#here"]


def test_every_page_is_reached_from_the_readme():
    assert {path for path in DOCS if f"(docs/{path.name})" in PAGES[README]} == set(DOCS)


# -------------------- settings


def strings_of(code):
    return {node.value for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)}


HELPER = pathlib.Path(rh.__file__).read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
OURS = r"(?:RESNET|TFDS|TF)_[A-Z_]*[A-Z]"
# A variable that code reads is a string of its own there; in a message it is part of one.
READ = {text for text in strings_of(HELPER) if re.fullmatch(OURS, text)}
READ |= set(re.findall(r"RESNET_[A-Z]+", MAKEFILE))


def test_every_variable_that_is_read_is_explained():
    assert len(READ) >= 8
    assert READ <= set(re.findall(rf"`({OURS})[`=]", SETTINGS))
    table = SETTINGS.split("\n## ")[1]
    assert {name for name in READ if name.startswith("RESNET")} <= set(
        re.findall(r"^\| `(\w+)` \|", table, re.M))


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=name_of)
def test_no_page_names_a_variable_that_nobody_reads(path):
    assert set(re.findall(rf"\b{OURS}\b", path.read_text())) <= READ


def code_of(text):
    """What stands in fences and between backticks."""
    fences = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
    return "\n".join([*fences, *re.findall(r"`([^`\n]+)`", without_code(text))])


def test_make_has_the_commands_and_words_of_the_pages():
    code = "\n".join(map(code_of, [*PAGES.values(), (ROOT / "CONTRIBUTING.md").read_text()]))
    commands = set(re.findall(r"\bmake ([a-z]+)", code))
    assert commands >= {"run", "full", "test"}
    assert commands <= set(re.findall(r"^([a-z]+):", MAKEFILE, re.M))
    words = set(re.findall(r"\bmake [a-z]+ ([A-Z]+)=", code))
    assert words == set(re.findall(r"^([A-Z]+) \?=", MAKEFILE, re.M))


def test_every_option_of_a_run_is_explained_with_its_usual_value(monkeypatch):
    monkeypatch.delenv("RESNET_DATASET", raising=False)
    config = rh.make_config("resnet34", "full")
    section = SETTINGS.split("## Options of a run")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| .* \| (`.*?) \|$", section, re.M)
    told = {}
    for entries, usual in rows:
        names, values = re.findall(r"`(\w+)`", entries), re.findall(r"`(.+?)`", usual)
        assert len(names) == len(values)
        told |= dict(zip(names, values))
    assert told == {key: str(value) for key, value in config.items()}
    for name in ("optimizer", "stem", "stride_in"):
        (row,) = [line for line in section.splitlines() if line.startswith(f"| `{name}`")]
        assert all(f"`{choice}`" in row for choice in rh.CHOICES[name])
    assert ", ".join(f"`{choice}`" for choice in rh.SHORTCUTS) in section


def test_every_depth_is_named():
    (table_1,) = re.findall(r"followed by ([\d, or]+) \(the paper's Table 1\)", SETTINGS)
    (small,) = re.findall(r"or by ([\d, or]+) \(its section 4\.2", SETTINGS)
    named = [int(depth) for depth in re.findall(r"\d+", f"{table_1} {small}")]
    assert named == list(rh.DEPTHS)


def test_parameters_of_notebook_3_are_named():
    cells = json.loads((ROOT / "notebooks" / "03_training.ipynb").read_text())["cells"]
    (source,) = ["".join(cell["source"]) for cell in cells
                 if "".join(cell["source"]).startswith("# parameters")]
    section = SETTINGS.split("## Notebook 3")[1].split("\n## ")[0]
    names = set(re.findall(r"^(\w+) =", source, re.M)) - {"profile"}
    assert names == set(re.findall(r"`(\w+)(?: = True)?`", section))


# -------------------- code, files and messages


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_helper_has_what_the_pages_use(path):
    for block in re.findall(r"```python\n(.*?)```", PAGES[path], re.S):
        ast.parse(block)
    names = set(re.findall(r"\brh\.(\w+)", PAGES[path]))
    names |= set(re.findall(r"`((?:build|train|read|plot|process|ablation|make)_\w+)", PAGES[path]))
    names -= set(rh.RECIPE)  # entries of a configuration
    assert [name for name in sorted(names) if not hasattr(rh, name)] == []


def test_everything_in_results_is_explained():
    """And nothing that is not there: those are links."""
    section = (ROOT / "docs" / "files.md").read_text().split("\n## ")[1]
    linked = {target.split("/")[0] for target in re.findall(r"\(\.\./results/([^)]+)\)", section)}
    there = {path.name for path in (ROOT / "results").iterdir() if path.name[0] != "."}
    assert linked == there - {"quick", "test"}  # of runs that are not committed


def test_the_entries_of_a_runs_file_are_those_explained():
    section = (ROOT / "docs" / "files.md").read_text().split("## A run's file")[1].split("\n## ")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", section, re.M))
    runs = [json.loads(path.read_text())
            for path in sorted((ROOT / "results" / "full" / "cats_vs_dogs").glob("*.json"))]
    assert named - {"earlier_environments"} == set.intersection(*map(set, runs))
    assert all(f"`{key}`" in section for key in rh.HISTORY)


OTHERS = {  # messages of Python, pip's packages and protobuf
    "No module named 'importlib_resources'", "No module named 'resnet_helpers'",
    "Detected incompatible Protobuf Gencode/Runtime versions"}


@pytest.mark.parametrize("name, column", [("survival", 1), ("troubleshooting", 0)])
def test_messages_are_those_of_the_code(name, column):
    code = " ".join([*strings_of(HELPER), MAKEFILE])
    rows = re.findall(r"^\| (.*) \| (.*) \|$", (ROOT / "docs" / f"{name}.md").read_text(), re.M)
    quoted = {text for row in rows for text in re.findall(r"`([^`]+)`", row[column])
              if " " in text} - OTHERS
    assert len(quoted) >= 3
    assert [text for text in sorted(quoted)
            if not all(part.strip() in code for part in text.split("..."))] == []


def test_the_pages_say_it_in_our_words():
    for path, text in PAGES.items():
        words = re.sub(r"build_resnet_block", "", text)
        found = re.search(r"in place of|leaves out 0|\bblocks?\b|guessing has", words)
        assert not found, (path.name, found)
        assert not re.search(r"(?<![\w.~$])/(?:work|tmp|root|home)/", text), path.name


def test_the_tests_that_pages_name_are_there():
    for path, text in PAGES.items():
        for name in re.findall(r"tests/\w+\.py", text):
            assert os.path.exists(ROOT / name), (path.name, name)
