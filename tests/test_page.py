"""The page and the pictures, looked at by a real browser."""

import base64
import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
from helpers import make_trial

import collect_results
from federated.settings import Settings


class Browser:
    """Headless Chromium, told what to do through a pair of pipes (its --remote-debugging-pipe)."""

    def __init__(self, program, profile):
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()

        def as_it_wants_them():  # 3 and 4, which may be these pipes' own numbers
            ours = os.dup(commands), os.dup(answers)
            for number, mine in zip((3, 4), ours):
                os.dup2(mine, number)

        options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
        self._process = subprocess.Popen(
            [program, *options, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            close_fds=False, preexec_fn=as_it_wants_them,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self._number, self._buffer, self._session, self.requests = 0, b"", {}, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.ask("Network.enable")
        self.ask("Page.enable")

    def ask(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self):
        while b"\0" not in self._buffer:
            more = os.read(self._answers, 1 << 20)
            assert more, "the browser has ended"
            self._buffer += more
        text, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        self.has_loaded |= message.get("method") == "Page.loadEventFired"
        return message

    has_loaded = False

    def show(self, path, width):
        """Open a file in a window of that many CSS pixels."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.has_loaded = False
        self.ask("Page.navigate", url=path.as_uri())
        while not self.has_loaded:
            self._next()

    def value(self, expression):
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def screenshot(self, path):
        height = self.value("document.documentElement.scrollHeight")
        width = self.value("window.innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)


@pytest.fixture
def browser(tmp_path, need_programs):
    need_programs(["chromium"], ["chromium"])
    browser = Browser("chromium", tmp_path / "profile")
    yield browser
    browser.close()


def make_sweeps(out):
    """Two algorithms with 4 settings each, one of which is personal."""
    for shift, algorithm in enumerate(("Fedavg", "Fedper")):
        for hparams_seed in range(4):
            for trial in range(3):
                curve = [0.3 + 0.1 * round + 0.02 * hparams_seed + 0.01 * trial * shift for round in range(4)]
                local = [curve, [accuracy - 0.1 for accuracy in curve]]
                make_trial(out, hparams_seed, trial, [curve] * 2, curve, Settings(algorithm=algorithm), local=local)


@pytest.mark.slow
@pytest.mark.network
def test_the_page_fits_every_screen_and_asks_for_nothing(browser, tmp_path):
    make_sweeps(tmp_path / "out")
    page = tmp_path / "page.html"
    assert collect_results.main(["--output_dir", str(tmp_path / "out"), "--html", str(page), "--target", "0.5"]) == 0
    for width in (390, 1280):
        browser.show(page, width)
        assert browser.value("window.innerWidth") == width
        assert browser.value("document.documentElement.scrollWidth") <= width
        overflowing = (
            "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth).length"
        )
        assert browser.value(overflowing) == 0
        pictures = "[...document.images].map(image => image.complete && image.naturalWidth > 0 && image.alt != '')"
        assert browser.value(pictures) == [True] * 6
        assert "Fedper" in browser.value("document.querySelector('table').innerText")
        last = "[...document.querySelectorAll('h2')].at(-1)"
        assert browser.value(f"[{last}.innerText, {last}.nextElementSibling.tagName]") == ["Job statistics", "TABLE"]
        if kept := os.environ.get("SCREENSHOTS"):
            browser.screenshot(pathlib.Path(kept) / f"page_{width}.png")
    broken_words = """[...document.querySelectorAll('th, td')].filter(cell => {
        const range = document.createRange()
        range.selectNodeContents(cell)
        return !cell.innerText.includes(' ') && range.getClientRects().length > 1
    }).length"""
    assert browser.value(broken_words) == 0
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in browser.requests) == 2


@pytest.mark.slow
def test_pictures_are_written_as_png_and_svg(tmp_path):
    make_sweeps(tmp_path / "out")
    arguments = ["--output_dir", str(tmp_path / "out"), "--plots", str(tmp_path / "plots" / "new")]
    assert collect_results.main(arguments) == 0
    names = {"learning_curves_mlp_digits", "accuracy_by_bytes_mlp_digits", "clients_mlp_digits", "expected_best_mlp_digits"}
    names |= {f"hparams_mlp_digits_{algorithm}" for algorithm in ("Fedavg", "Fedper")}
    written = {path.name: path.read_bytes() for path in (tmp_path / "plots" / "new").iterdir()}
    assert set(written) == {f"{name}.{form}" for name in names for form in ("png", "svg")}
    assert all(content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml") for name, content in written.items())
    assert collect_results.main(arguments) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "plots" / "new").iterdir()} == written


def test_every_client_is_a_point_and_their_extremes_the_whiskers(tmp_path):
    """Where clients have no test samples they are left out, and an algorithm where none has."""
    from federated.reporting import plots
    from federated.reporting.collect import collect
    from federated.reporting.report import Report

    of_trials = {"Fedavg": ([0.5, 0.7], [0.9, 0.8]), "Fedper": ([0.6, None], [0.4, 0.3]), "Fedbn": ([None, None],) * 2}
    for algorithm, trials in of_trials.items():
        for trial, local in enumerate(trials):
            make_trial(tmp_path, 0, trial, [[0.5]] * 2, [0.5], Settings(algorithm=algorithm), local=[[each] for each in local])
    _, figure = plots.pictures(Report(collect([tmp_path]), "validation"))["clients_mlp_digits"]
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Fedavg", "Fedper"]
    lines = [(line.get_marker(), np.unique(line.get_ydata())) for line in axes.lines if len(line.get_ydata())]
    accuracies = [[0.5, 0.7, 0.8, 0.9], [0.3, 0.4, 0.6]]
    assert [values for marker, values in lines if marker == "o"] == [pytest.approx(each) for each in accuracies]
    caps = [values for marker, values in lines if marker != "o" and len(values) == 1]  # and the medians
    assert caps == [pytest.approx([value]) for value in (0.5, 0.9, 0.75, 0.3, 0.6, 0.4)]


def test_curves_differ_by_more_than_their_colour():
    from federated.reporting import plots

    looks = [plots.style(place) for place in range(19)]  # as many as there are algorithms
    assert len({(look["linestyle"], look["marker"]) for look in looks}) == 19
