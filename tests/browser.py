"""The notebooks in a real browser: JupyterLab, headless Chromium, Run All in the quick profile.

    .venv/bin/pip install playwright
    .venv/bin/python tests/browser.py [--profile quick] [folder of pictures]

Works on a copy, so that committed notebooks and results stay as they are. Takes a picture while
notebook 3 trains and one at the end of every notebook, and fails at any error output, or at a code
cell that was not executed. Not a part of `make test`: it needs a browser, and trains what
`make run` trains.
"""

import argparse
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

from playwright.sync_api import sync_playwright

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = ("01_data", "02_models", "03_training", "04_ablation")


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def kernels(url):
    with urllib.request.urlopen(f"{url}/api/kernels", timeout=30) as answer:
        return json.load(answer)


def answers(url):
    try:
        return kernels(url) == []
    except OSError:
        return False


def wait_until(condition, what, seconds):
    end = time.time() + seconds
    while not condition():
        if time.time() > end:
            raise TimeoutError(f"{what}: not within {seconds} s")
        time.sleep(1)


def wait_for_the_end(page, url, name, pictures):
    """Wait until the kernel is idle; take a picture of the figure that grows in notebook 3."""
    start, idle_since = time.time(), None
    while idle_since is None or time.time() - idle_since < 5:
        if time.time() - start > 3600:
            raise TimeoutError(f"{name} still runs after an hour")
        time.sleep(1)
        busy = any(kernel["execution_state"] == "busy" for kernel in kernels(url))
        idle_since = None if busy else idle_since or time.time()
        growing = page.locator(".jp-CodeCell", has_text="rh.train_runs(").locator("img")
        picture = pictures / f"{name}-training.png"
        if name == "03_training" and busy and growing.count() and not picture.exists():
            for _ in range(2):  # JupyterLab lays out what comes into view, which moves it once more
                growing.last.evaluate("image => image.scrollIntoView({block: 'center'})")
                page.wait_for_timeout(1000)
            page.screenshot(path=picture)


def run_all(page, url, copy, name, pictures):
    page.goto(f"{url}/lab/tree/notebooks/{name}.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
    wait_until(lambda: [k for k in kernels(url) if k["execution_state"] == "idle"], "a kernel", 120)
    page.wait_for_timeout(2000)
    news = page.get_by_role(
        "button", name="No", exact=True
    )  # "Would you like to get notified ...?"
    if news.count():
        news.first.click()
    page.locator(".lm-MenuBar-itemLabel", has_text="Edit").first.click()
    page.get_by_text(
        "Clear Outputs of All Cells", exact=True
    ).click()  # so that no picture shows a committed output
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.get_by_text("Run All Cells", exact=True).click()
    start = time.time()
    wait_for_the_end(page, url, name, pictures)
    page.keyboard.press("Control+s")
    path = copy / "notebooks" / f"{name}.ipynb"
    code = []

    def saved():
        try:
            code[:] = [
                cell
                for cell in json.loads(path.read_text())["cells"]
                if cell["cell_type"] == "code"
            ]
        except ValueError:  # just being written
            return False
        return all(cell["execution_count"] for cell in code)

    wait_until(saved, f"{name}: all cells executed and saved", 60)
    errors = [
        output for cell in code for output in cell["outputs"] if output["output_type"] == "error"
    ]
    page.screenshot(path=pictures / f"{name}-end.png")
    print(
        f"{name}: {len(code)} code cells, {time.time() - start:.0f} s, {len(errors)} errors",
        flush=True,
    )
    assert not errors, errors[0]["traceback"]
    for kernel in kernels(url):  # one notebook's memory at a time
        request = urllib.request.Request(f"{url}/api/kernels/{kernel['id']}", method="DELETE")
        urllib.request.urlopen(request, timeout=60)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "pictures", nargs="?", default=str(ROOT / "build" / "browser"), type=pathlib.Path
    )
    parser.add_argument("--chromium", default=shutil.which("chromium"))
    parser.add_argument("--profile", default="quick")
    options = parser.parse_args()
    pictures = pathlib.Path(options.pictures).absolute()
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob("*.png"):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("notebooks", "results", "resnet_helpers.py"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        settings = copy / "ipython" / "profile_default" / "ipython_kernel_config.py"
        settings.parent.mkdir(parents=True)
        settings.write_text("c.IPKernelApp.capture_fd_output = False\n")  # as in the Makefile
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        environment = os.environ | {
            "RESNET_PROFILE": options.profile,
            "RESNET_RESULTS": str(copy / "results"),
            "IPYTHONDIR": str(copy / "ipython"),
        }
        with open(pictures / "jupyter.log", "w") as log:
            server = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "jupyter",
                    "lab",
                    "--no-browser",
                    f"--port={port}",
                    "--allow-root",
                    "--IdentityProvider.token=",
                    "--ServerApp.password=",
                    "--ServerApp.disable_check_xsrf=True",
                    f"--ServerApp.root_dir={copy}",
                ],
                env=environment,
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(lambda: answers(url), "JupyterLab", 60)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(
                    executable_path=options.chromium, args=["--no-sandbox"]
                )
                page = browser.new_page(viewport={"width": 1400, "height": 1000})
                for name in NAMES:
                    run_all(page, url, copy, name, pictures)
                browser.close()
        finally:
            server.terminate()
            server.wait(30)
    print("Pictures:", pictures)


if __name__ == "__main__":
    main()
