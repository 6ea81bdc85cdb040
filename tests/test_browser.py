"""Swagger UI in a real browser: opens, executes a request, shows the answer."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import element_to_be_clickable
from selenium.webdriver.support.wait import WebDriverWait

from tests.process import server

pytestmark = pytest.mark.full

DEMO = "sentence-transformers/all-MiniLM-L6-v2"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --window-size=1200,2000"
    # Nothing but this machine can be reached: the page must work without the internet.
    " --host-resolver-rules=MAP\u00a0*\u00a0~NOTFOUND,EXCLUDE\u00a0127.0.0.1"
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chrome]:
    """A headless chromium with an empty profile."""
    driver = shutil.which("chromedriver")
    assert driver, "install the packages chromium and chromium-driver"
    options = ChromeOptions()
    for flag in FLAGS.split(" "):
        options.add_argument(flag.replace("\u00a0", " "))
    options.add_argument(f"--user-data-dir={tmp_path}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options, ChromeService(driver))
    yield browser
    browser.quit()


def test_swagger_ui_executes_a_request(browser: Chrome) -> None:
    """The page tries out `/api/embed` and shows the vector."""
    with server("--demo") as client:
        client.until("/health/ready")
        browser.get(f"{client.base_url}/swagger-ui")
        wait = WebDriverWait(browser, 20)

        def click(selector: str) -> None:
            wait.until(element_to_be_clickable((By.CSS_SELECTOR, selector))).click()

        operation = "#operations-native-post_api_embed"
        click(f"{operation} .opblock-summary-control")
        click(f"{operation} .try-out__btn")
        body = browser.find_element(By.CSS_SELECTOR, f"{operation} textarea.body-param__text")
        body.clear()
        body.send_keys('{"model": "' + DEMO + '", "text": "hello"}')
        click(f"{operation} .execute")
        live = (By.CSS_SELECTOR, f"{operation} .live-responses-table .response")
        wait.until(lambda page: page.find_elements(*live))
        shown = browser.find_element(*live).text
        assert shown.startswith("200")
        assert f'"model": "{DEMO}"' in shown
        assert '"dimensions": 384' in shown
        log = browser.get_log("browser")  # type: ignore[no-untyped-call]
        assert [entry for entry in log if entry["level"] == "SEVERE"] == []
