"""A person opens the run's page in a browser and sees its metrics."""

import os
import shutil
import subprocess

import pytest
import stack as servers

pytestmark = pytest.mark.slow


@pytest.fixture
def browser():
    servers.install("chromium")
    path = shutil.which("chromium")
    if path is None:
        reason = "NO BROWSER: chromium is not installed. On Debian: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def test_the_page_of_a_run_shows_its_metrics(stack, open_recorder, browser, tmp_path):
    with open_recorder() as record:
        for step in range(1, 6):
            record.metrics("policy", step, {"td_error_mean": step / 10, "weight_entropy": 1.0})
        (page,) = record.where()
    login = f"http://{servers.USER}:{stack.password}@"

    shown = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/browser"),
            *("--virtual-time-budget=20000", "--dump-dom", page.replace("http://", login)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout

    for text in ("td_error_mean", "weight_entropy", "Finished"):
        assert text in shown
