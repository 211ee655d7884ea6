# SPDX-License-Identifier: Apache-2.0
"""The built site in a browser: pages, links, search, and the planner's tables."""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
BROWSERS = "chromium", "chromium-browser", "google-chrome"
WIDTHS = 390, 1280
SECONDS = 20


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the site, built with warnings as errors."""
    pytest.importorskip("sphinx", reason="needs the extra browser")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "docs", out]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    handler = functools.partial(Quiet, directory=str(out))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="extra browser")
    programs = [shutil.which(name) for name in BROWSERS]
    driver = shutil.which("chromedriver")
    if not (any(programs) and driver):
        pytest.skip("no Chromium: install chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, programs))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    made = webdriver.Chrome(options=options, service=service)
    made.set_page_load_timeout(SECONDS)
    yield made
    made.quit()


def pages() -> list[str]:
    found = sorted((ROOT / "docs").rglob("*.md"))
    return [str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in found]


def resize(browser: Any, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1}
    command = "Emulation.setDeviceMetricsOverride"
    browser.execute_cdp_cmd(command, metrics | {"mobile": width < 500})


def wait(browser: Any, script: str) -> Any:
    """What the script returns, as soon as it returns something."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if found := browser.execute_script(script):
            return found
        time.sleep(0.1)
    return pytest.fail(f"nothing of {script!r} in {SECONDS} s at {browser.current_url}")


def complaints(browser: Any) -> list[str]:
    return [x["message"] for x in browser.get_log("browser") if x["level"] == "SEVERE"]


@pytest.mark.parametrize("width", WIDTHS)
def test_every_page_renders(site: str, browser: Any, width: int) -> None:
    resize(browser, width)
    for page in pages():
        browser.get(f"{site}/{page}")
        assert browser.execute_script("return document.querySelector('h1') !== null")
        assert complaints(browser) == [], page
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, f"{page} is wider than the window"
        broken = browser.execute_script(
            "return [...document.images].filter(x => x.complete && !x.naturalWidth)"
            ".map(x => x.src)"
        )
        assert broken == [], page


def test_no_link_is_broken(site: str, browser: Any) -> None:
    targets: dict[str, set[str]] = {}
    links: set[str] = set()
    for page in pages():
        browser.get(f"{site}/{page}")
        script = "return [...document.querySelectorAll('[id]')].map(x => x.id)"
        targets[f"{site}/{page}"] = set(browser.execute_script(script))
        script = "return [...document.querySelectorAll('a[href]')].map(x => x.href)"
        links |= set(browser.execute_script(script))
    inside = {link for link in links if link.startswith(site)}
    assert len(inside) > 100
    for link in inside:
        address, _, anchor = link.partition("#")
        address = address.partition("?")[0]
        if address.endswith("/"):
            address += "index.html"
        known = address in targets or Path(
            urllib.parse.urlparse(address).path
        ).name in (*("genindex.html", "search.html", "py-modindex.html"),)
        assert known, link
        assert not anchor or anchor in targets.get(address, {anchor}), link
    others = {urllib.parse.urlparse(link).netloc for link in links - inside}
    assert others <= {"arxiv.org", "www.sphinx-doc.org", "github.com", "pradyunsg.me"}


def test_search_finds_describe(site: str, browser: Any) -> None:
    browser.get(f"{site}/search.html?q=describe")
    script = (
        "return [...document.querySelectorAll('#search-results li a')].map(x => x.href)"
    )
    found = wait(browser, script)
    assert any("api/reports.html#galore_optax.describe" in link for link in found)


def test_maths_are_drawn_without_a_script(site: str, browser: Any) -> None:
    browser.get(f"{site}/api/transformations.html")
    script = "return [...document.querySelectorAll('math')].map(x => x.clientWidth)"
    sizes = browser.execute_script(script)
    assert len(sizes) > 10
    assert min(sizes) > 0
    script = (
        "return [...document.querySelectorAll('div.math')]"
        ".map(x => x.scrollHeight - x.clientHeight)"
    )
    assert max(browser.execute_script(script)) <= 1, "cut off, but for rounding"


def test_the_planners_page_says_what_the_planner_says(site: str, browser: Any) -> None:
    from galore_optax import memory

    query = {
        **{"model": "llama-3.2-1b", "card": "t4", "share": "0.75"},
        **{"method": "galore_adamw8bit", "rank": "256", "way": "layerwise"},
        **{"work": "1x1024", "dtype": "bfloat16"},
    }
    browser.get(f"{site}/fit.html?{urllib.parse.urlencode(query)}")
    said = wait(browser, "return document.getElementById('fit-answer').textContent")
    setting = memory.Setting(1024, remat=True, layerwise=True)
    method = memory.Method("galore_adamw8bit", (("rank", 256),))
    plan = memory.plan("llama-3.2-1b", method, setting)
    assert f"A step holds {plan.total / 1e9:.2f} GB" in said
    assert f"JAX has {0.75 * 15 * 2**30 / 1e9:.2f} GB" in said
    assert "It fits" in said
    link = browser.execute_script("return document.getElementById('fit-link').href")
    assert dict(urllib.parse.parse_qsl(link.partition("?")[2])) == query
    rows = "return document.querySelectorAll('#fit-list tbody tr').length"
    assert wait(browser, rows) > 3


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"model": "8t"}, "model=8t"),
        ({"card": "abacus", "dtype": "int1"}, "card=abacus, dtype=int1"),
        ({"rank": "9999"}, "rank=9999: of 7b 256, 512, 1024, 2048 are planned"),
        ({"rank": "many", "model": "smollm2-135m"}, "rank=many: of smollm2-135m 64,"),
    ],
)
def test_an_address_that_asks_for_what_is_not_known(
    site: str, browser: Any, asked: dict[str, str], told: str
) -> None:
    browser.get(f"{site}/fit.html?{urllib.parse.urlencode(asked)}")
    script = "return (document.querySelector('.fit-warning') || {}).textContent"
    assert told in wait(browser, script)
    said = wait(browser, "return document.getElementById('fit-answer').textContent")
    assert "A step holds" in said


@pytest.mark.parametrize(
    ("card", "share", "told"),
    [
        ("rtx4090", "0.95", True),
        ("rtx4090", "0.75", False),  # JAX does that by itself
        ("v6e", "0.95", False),  # all of it is a program's anyway
    ],
)
def test_a_share_says_how_to_get_it(
    site: str, browser: Any, card: str, share: str, told: bool
) -> None:
    browser.get(f"{site}/fit.html?card={card}&share={share}")
    said = wait(browser, "return document.getElementById('fit-answer').textContent")
    assert (f"XLA_PYTHON_CLIENT_MEM_FRACTION={share}." in said) == told


def test_what_does_not_fit_is_said(site: str, browser: Any) -> None:
    query = {"model": "13b", "card": "rtx3060", "method": "adamw", "way": "plain"}
    browser.get(f"{site}/fit.html?{urllib.parse.urlencode(query)}")
    said = wait(browser, "return document.getElementById('fit-answer').textContent")
    assert "It does not fit" in said
    found = wait(browser, "return document.getElementById('fit-list').textContent")
    assert "take a larger card" in found
    query |= {"method": "adamw", "way": "never"}
    browser.get(f"{site}/fit.html?{urllib.parse.urlencode(query)}")
    said = wait(browser, "return document.getElementById('fit-answer').textContent")
    assert "choose another way" in said


def test_every_table_of_the_planner_is_there(site: str, browser: Any) -> None:
    browser.get(f"{site}/fit.html")
    script = "return document.forms.fit.elements.model.options.length"
    wait(browser, script)
    names = browser.execute_script(
        "return [...document.forms.fit.elements.model.options].map(x => x.value)"
    )
    assert {"7b", "llama-3.2-3b", "gemma-3-1b", "qwen3-4b", "smollm2-135m"} <= set(
        names
    )
    for name in names:
        browser.get(f"{site}/_static/fit/{name}.js")
        text = browser.execute_script("return document.body.textContent")
        assert json.loads(text[text.index("{") : text.rindex(")")])["name"] == name
