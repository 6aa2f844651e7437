"""The filters that `compare` prints, typed into the MLflow UI in a real browser."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.logged_runs import log_run
from mlflow import MlflowClient
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support import expected_conditions
from selenium.webdriver.support.ui import WebDriverWait

from simsiam_dali.evaluation.compare_report import mlflow_filters
from simsiam_dali.evaluation.compare_runs import select
from simsiam_dali.tracking.client import experiment_runs

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on PATH (Debian: chromium, chromium-driver)"
)
SECONDS = 60
"""What a page, or a change of the page, may take; on a busy two-core machine it took up to 5."""

EXPERIMENT = "seen in a browser"
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    "--window-size=1400,1000",
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """Chromium without a window, with an empty profile (the UI keeps filters there); it waits for nothing for ever."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        chrome.set_page_load_timeout(SECONDS)
        chrome.set_script_timeout(SECONDS)
        yield chrome
    finally:
        chrome.quit()


@pytest.fixture(scope="module")
def experiment_id(mlflow_uri: str) -> str:
    """Two runs of each type, named `TYPE-N`, the second of them the better."""
    client = MlflowClient(mlflow_uri)
    for encoder_type in ("simsiam", "simple"):
        for number in (1, 2):
            name: dict[str, Any] = {"mlflow.runName": f"{encoder_type}-{number}"}
            log_run(client, EXPERIMENT, encoder_type, {"knn/artist": number / 10}, **name)
    found: str = client.get_experiment_by_name(EXPERIMENT).experiment_id
    return found


@pytest.fixture
def runs_page(browser: webdriver.Chrome, mlflow_uri: str, experiment_id: str) -> webdriver.Chrome:
    """The experiment's runs, before any filter."""
    browser.get(f"{mlflow_uri}/#/experiments/{experiment_id}/runs")
    wait_for_runs(browser, {"simsiam-1", "simsiam-2", "simple-1", "simple-2"})
    return browser


def shown(browser: webdriver.Chrome) -> set[str]:
    """Names of the runs in the table, read at one instant."""
    links = "return [...document.querySelectorAll('a[href*=\"/runs/\"]')].map(link => link.textContent.trim())"
    return set(browser.execute_script(links))


def wait_for_runs(browser: webdriver.Chrome, names: set[str]) -> None:
    """Wait until the table holds exactly these runs."""
    try:
        WebDriverWait(browser, SECONDS).until(lambda _: shown(browser) == names)
    except Exception as e:
        text = browser.find_element(By.TAG_NAME, "body").text
        raise AssertionError(f"wanted {sorted(names)}, the page shows {sorted(shown(browser))}: {text[:1000]}") from e


def search(browser: webdriver.Chrome, text: str) -> None:
    """Type into the search box above the table, then Enter."""
    box = WebDriverWait(browser, SECONDS).until(
        expected_conditions.element_to_be_clickable((By.CSS_SELECTOR, "input[data-testid='search-box']"))
    )
    box.click()
    box.send_keys(text)
    assert box.get_property("value") == text
    box.send_keys(Keys.ENTER)


def test_the_filters_of_a_comparison_show_the_compared_runs(runs_page: webdriver.Chrome, mlflow_uri: str) -> None:
    runs = experiment_runs(mlflow_uri, EXPERIMENT)
    comparison = select(runs, None, 1, include_trials=False, shard_set=None, reads=lambda *_: True)
    search(runs_page, mlflow_filters(comparison)[0])
    wait_for_runs(runs_page, {"simsiam-2", "simple-2"})


@pytest.mark.parametrize("number", [1, 2])
def test_the_filter_of_a_type_shows_its_runs_and_no_others(
    runs_page: webdriver.Chrome, mlflow_uri: str, number: int
) -> None:
    runs = experiment_runs(mlflow_uri, EXPERIMENT)
    comparison = select(runs, None, 0, include_trials=False, shard_set=None, reads=lambda *_: True)
    search(runs_page, mlflow_filters(comparison)[number])
    encoder_type = ("simsiam", "simple")[number - 1]
    wait_for_runs(runs_page, {f"{encoder_type}-1", f"{encoder_type}-2"})
