"""A chapter as a reader has it: opened in JupyterLab in a browser, run, and its slider moved."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

import mergekit_lite as mkl
from tests.test_repository import ROOT

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
PATIENCE = 420  # seconds; the whole chapter is run, on a machine that may be busy

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="needs a browser: chromium and chromedriver (Debian: apt install chromium chromium-driver)",
)


def wait_for(what, condition, patience=PATIENCE):
    """The first true value of a condition."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.5)
    pytest.fail(f"waited {patience} s in vain for {what}")


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab that serves a copy of the first chapter."""
    shutil.copy(ROOT / "notebooks" / "11_first_merge.ipynb", tmp_path)
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    # By default cells outside the window are not in the page.
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    places = {
        name: str(tmp_path / name.lower()) for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")
    }
    environment = {**os.environ, **places, "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "TQDM_DISABLE": "1"}
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--port=0",
        "--allow-root",
        "--expose-app-in-browser",
    ]
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(
            [*command, f"--ServerApp.root_dir={tmp_path}", "--IdentityProvider.token=secret"],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        running = (tmp_path / "jupyter_runtime_dir").glob
        [info] = wait_for("JupyterLab", lambda: list(running("jpserver-*.json")), 120)
        yield json.loads(info.read_text())["url"] + "lab/tree/11_first_merge.ipynb?reset&token=secret"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1400,1200"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_a_reader_moves_the_slider(lab, browser, suite):
    from selenium.webdriver import ActionChains

    def words():
        """What the explorer says about its setting, such as (0.2, 0.478)."""
        shown = browser.execute_script(
            "return [...document.querySelectorAll('.jp-OutputArea-output')].map(o => o.innerText).join('\\n')"
        )
        found = re.findall(r"λ = ([\d.]+): average accuracy ([\d.]+) on validation images", shown)
        return tuple(map(float, found[-1])) if found else None

    def kernel_is_idle():
        return browser.execute_script(
            "return window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'"
        )

    browser.get(lab)
    wait_for("the chapter and its kernel", kernel_is_idle, 120)
    browser.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    at_first = wait_for("the explorer's first result", words)
    errors = browser.execute_script("return document.querySelectorAll('[data-mime-type*=\"error\"]').length")
    assert errors == 0

    handle = browser.execute_script("return document.querySelector('.noUi-handle')")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)
    ActionChains(browser).click_and_hold(handle).move_by_offset(90, 0).release().perform()
    scale, accuracy = wait_for("another result", lambda: (now := words()) != at_first and now)

    assert scale > at_first[0], "to the right means a larger λ"
    merged = mkl.task_arithmetic(suite.task_vectors, scale=scale)
    assert accuracy == pytest.approx(suite.evaluate(merged, split="validation").average, abs=0.002)

    # The exercises stand below, with their hints folded away and a verdict under each.
    page = wait_for(
        "the verdicts", lambda: "1.1.4" in (text := browser.execute_script("return document.body.innerText")) and text
    )
    assert "not answered yet" in page
