"""The page and the pictures, looked at by a real browser."""

import base64
import html.parser
import itertools
import json
import os
import pathlib
import re
import struct
import subprocess

import matplotlib
import numpy as np
import pytest
from helpers import make_trial

import collect_results
from federated.domains import Choice, Fixed, LogUniform, Uniform, log_base
from federated.reporting import charts, plots
from federated.reporting.collect import collect
from federated.reporting.report import Report
from federated.settings import Settings
from federated.trial import Trial


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
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def point(self, element, *events):
        """Send the mouse's `events` to the middle of an element."""
        middle = f"""(element => {{
            element.scrollIntoView({{block: "center"}})
            const {{x, y, width, height}} = element.getBoundingClientRect()
            return [x + width / 2, y + height / 2]
        }})({element})"""
        x, y = self.value(middle)
        for event in events:
            self.ask("Input.dispatchMouseEvent", type=event, x=x, y=y, button="left", clickCount=1)

    def click(self, element):
        self.point(element, "mousePressed", "mouseReleased")

    def press(self, key):
        for event in ("rawKeyDown", "keyUp"):
            code = {"Enter": 13, "ArrowLeft": 37, "ArrowUp": 38}[key]
            self.ask("Input.dispatchKeyEvent", type=event, key=key, code=key, windowsVirtualKeyCode=code)
        if key == "Enter":
            self.ask("Input.dispatchKeyEvent", type="char", key=key, text="\r")

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


@pytest.fixture
def shown(browser, tmp_path):
    """The browser, as it shows the page of make_sweeps in a window of 1280 pixels."""
    make_sweeps(tmp_path / "out")
    browser.show(make_page(tmp_path / "out", tmp_path / "page.html"), 1280)
    return browser


def make_page(out, page, *options):
    assert collect_results.main(["--output_dir", str(out), "--html", str(page), *options]) == 0
    return page


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
    page = make_page(tmp_path / "out", tmp_path / "page.html", "--target", "0.5")
    for width in (390, 1280):
        browser.show(page, width)
        assert browser.value("window.innerWidth") == width
        assert browser.value("document.documentElement.scrollWidth") <= width
        overflowing = (
            "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth).length"
        )
        assert browser.value(overflowing) == 0
        pictures = """[...document.querySelectorAll(".chart")].map(chart => {
            const {width, height} = chart.getBoundingClientRect()
            return width > 300 && height > 50 && chart.getAttribute("aria-label") != ""
        })"""
        assert browser.value(pictures) == [True] * 6
        assert "Fedper" in browser.value("document.querySelector('table').innerText")
        headings = "[...document.querySelectorAll('h2')].map(heading => heading.innerText)"
        assert browser.value(headings) == ["Results", "Curves", "Hyper-parameters", "Job statistics", "Provenance"]
        if kept := os.environ.get("SCREENSHOTS"):
            browser.screenshot(pathlib.Path(kept) / f"page_{width}.png")
    broken_words = """[...document.querySelectorAll('th, td')].filter(cell => {
        const range = document.createRange()
        range.selectNodeContents(cell.querySelector('button') ?? cell)
        return !cell.innerText.includes(' ') && range.getClientRects().length > 1
    }).length"""
    assert browser.value(broken_words) == 0
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in browser.requests) == 2


TABLE = "[...document.querySelectorAll('table')].find(table => table.textContent.includes('Validation Accuracy'))"
COLUMN = f"[...{TABLE}.tBodies[0].rows].map(row => row.cells[%d].textContent)"


@pytest.mark.slow
@pytest.mark.network
def test_tables_sort_by_a_click_or_a_key(shown):
    heads = shown.value(f"[...{TABLE}.tHead.rows[0].cells].map(th => th.textContent)")
    place = heads.index("batch_size")
    before = shown.value(COLUMN % place)
    button, head = f"{TABLE}.tHead.rows[0].cells[{place}].querySelector('button')", f"{TABLE}.tHead.rows[0].cells[{place}]"
    shown.click(button)
    assert shown.value(f"{head}.getAttribute('aria-sort')") == "descending"
    falling = sorted(before, key=float, reverse=True)
    assert shown.value(COLUMN % place) == falling and falling not in (before, sorted(before, reverse=True))
    shown.value(f"{button}.focus()")
    shown.press("Enter")
    assert shown.value(f"{head}.getAttribute('aria-sort')") == "ascending"
    assert shown.value(COLUMN % place) == falling[::-1]
    shown.click(f"{TABLE}.tHead.rows[0].cells[0].querySelector('button')")
    assert shown.value(f"{TABLE}.querySelectorAll('[aria-sort]').length") == 1
    assert shown.value(COLUMN % 0) == ["4", "3", "2", "1"]


FIGURE = "document.querySelector('figure')"
READING = f"{FIGURE}.querySelector('.reading').textContent"


@pytest.mark.slow
@pytest.mark.network
def test_a_curve_is_hidden_by_its_name_and_read_off_by_pointing_or_by_keys(shown):
    for number, other in ((0, 1), (1, 0)):
        place = f"[...{FIGURE}.querySelectorAll('.curve')]"
        last = f"{place}[{number}].querySelector('use:last-of-type')"
        shown.point(last, "mouseMoved")
        said = shown.value(READING)
        assert said == ("Fedavg, round 4: 0.6350", "Fedper, round 4: 0.6450 ± 0.0100")[number]
        button = f"{FIGURE}.querySelectorAll('.legend button')[{number}]"
        shown.click(button)
        assert shown.value(f"{button}.getAttribute('aria-pressed')") == "false"
        visible = f"{place}.map(curve => curve.getClientRects().length > 0)"
        assert shown.value(visible) == [number != 0, number != 1]
        shown.value(f"{FIGURE}.querySelector('.chart').focus()")
        shown.press("ArrowLeft")
        assert shown.value(READING).startswith(f"{('Fedavg', 'Fedper')[other]}, round 3: ")
        shown.press("ArrowUp")  # there is no other to go to
        assert shown.value(READING).startswith(f"{('Fedavg', 'Fedper')[other]}, round 3: ")
        shown.click(button)
        assert shown.value(visible) == [True, True]


@pytest.mark.slow
@pytest.mark.network
def test_parallel_coordinates_say_what_each_setting_was(shown):
    figure = "document.querySelector('details figure')"
    shown.point(f"{figure}.querySelector('.best text, .best polyline')", "mouseMoved")
    shown.value(f"{figure}.querySelector('.chart').focus()")
    row = f"[...{TABLE}.tBodies[0].rows[0].cells].map(cell => [cell.dataset.label, cell.textContent])"
    best = dict(shown.value(row))
    shown.press("ArrowUp")
    said = f"{figure}.querySelector('.reading').textContent"
    for _ in range(4):
        if shown.value(said).startswith("Rank 1: "):
            break
        shown.press("ArrowUp")
    name, _, values = shown.value(said).partition(": ")
    assert name == "Rank 1"
    read = dict(each.rsplit(" ", 1) for each in values.split(", "))
    assert read.pop("validation accuracy") == best["Validation Accuracy"]
    assert read and read == {name: best[name] for name in read}


@pytest.mark.slow
@pytest.mark.network
def test_the_page_reads_without_a_script_and_in_the_dark(browser, tmp_path):
    make_sweeps(tmp_path / "out")
    page = make_page(tmp_path / "out", tmp_path / "page.html")
    brightness = "getComputedStyle(document.body).%s.match(/\\d+/g).map(Number).reduce((sum, each) => sum + each)"
    for scheme, is_dark in (("light", False), ("dark", True)):
        browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        browser.show(page, 1280)
        assert (browser.value(brightness % "backgroundColor") < browser.value(brightness % "color")) == is_dark
        assert browser.value("document.querySelectorAll('button').length") > 0
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    browser.show(page, 1280)
    document = browser.ask("DOM.getDocument", depth=-1)["root"]
    names = [node["nodeName"] for node in flattened(document)]
    assert "BUTTON" not in names and names.count("TABLE") > 4 and names.count("polyline") > 8
    assert "Fedper" in [node["nodeValue"] for node in flattened(document)]


def flattened(node):
    yield node
    for child in node.get("children", ()):
        yield from flattened(child)


HOSTILE = (
    """</script><script>document.title="taken"</script><img src="http://x.invalid" onerror='document.title="taken"'>&amp;"""
)


@pytest.mark.slow
@pytest.mark.network
def test_names_and_reasons_are_shown_and_never_obeyed(browser, tmp_path):
    out = tmp_path / HOSTILE.replace("/", "")
    make_sweeps(out)
    failed = make_trial(out, 5, 0, [[0.5] * 4] * 2, [0.5] * 4, Settings(), done=False)
    Trial(Settings(), {}, 0, 0, failed).record_failure("server", f"{HOSTILE}\ud800")
    (make_trial(out, 6, 0, [[0.5] * 4] * 2, [0.5] * 4, done=False) / "failed.json").write_text('{"log": 1, "earlier": []}')
    for path in out.glob("*/*/*/results.json"):
        results = json.loads(path.read_text())
        results["provenance"] |= {
            "data_dir": HOSTILE,
            "torch": HOSTILE,
            "numpy": "\ud800",
            "runs": [{"code": HOSTILE, "time": HOSTILE}],
        }
        path.write_text(json.dumps(results))
    browser.show(make_page(out, tmp_path / "page.html"), 1280)
    assert browser.value("document.title") == "Fedavg, Fedper on digits"
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}
    cells = "[...document.querySelectorAll('#failed-trials ~ .table td')].map(cell => cell.textContent)"
    assert {f"server {HOSTILE}?", "a process failed"} <= set(browser.value(cells))
    provenance = browser.value("document.querySelector('#provenance + ul').textContent")
    assert f"Data from {HOSTILE}." in provenance and f"torch {HOSTILE}" in provenance
    assert browser.value("document.querySelectorAll('img, iframe, main script:not([type])').length") == 0


def test_names_in_pictures_are_escaped():
    curve = charts.Curve(HOSTILE, 0, np.arange(3), np.arange(3) / 4, np.ones(3) / 8)
    scale = charts.Scale([1, 2], 0, 100)
    drawn = [
        charts.lines([curve], HOSTILE, HOSTILE, HOSTILE),
        charts.boxes([(HOSTILE, np.ones((2, 2)))], HOSTILE, HOSTILE, 10),
        charts.parallel([(HOSTILE, scale, ["1", HOSTILE])], HOSTILE, 0, 10),
    ]
    for text in drawn:
        found = Elements(text)
        drawn_by = "figure figcaption script ul li span svg g path text title use polygon polyline"
        assert found.tags <= set(drawn_by.split())
        assert found.texts.count(HOSTILE) >= 2
    data = [json.loads(data) for text in drawn for data in re.findall('<script type="application/json">(.*?)</script>', text)]
    assert data[0]["curves"][0]["name"] == data[0]["x"] == HOSTILE
    assert data[1]["axes"] == [HOSTILE] and data[1]["curves"][0]["y"] == [HOSTILE]


class Elements(html.parser.HTMLParser):
    """The tags and the texts of a piece of HTML."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts = set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_has_the_numbers_of_the_printed_tables_and_the_same_bytes_each_time(tmp_path, capsys):
    make_sweeps(tmp_path / "out")
    for alpha in (0.1, 0.5):
        settings = Settings(algorithm="fedPROX", partition="dirichlet", partition_alpha=alpha)
        make_trial(tmp_path / "out", 0, 0, [[0.5] * 4] * 2, [alpha / 3] * 4, settings)
    capsys.readouterr()
    texts = Elements(make_page(tmp_path / "out", tmp_path / "page.html").read_text()).texts
    printed = capsys.readouterr().out
    pivoted = ["--columns", "partition", "partition_alpha"]
    assert collect_results.main(["--output_dir", str(tmp_path / "out"), *pivoted]) == 0
    printed += capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    cells = [cell.strip(" *") for line in rows for cell in line.strip("|").split("|")]
    assert len(rows) > 10
    assert {cell for cell in cells if cell and "=" not in cell} <= set(texts)
    assert "mlp digits, partition=dirichlet, partition_alpha=0.1" in texts and "fedPROX" in texts
    again = make_page(tmp_path / "out", tmp_path / "again.html")
    assert again.read_bytes() == (tmp_path / "page.html").read_bytes()


@pytest.mark.slow
def test_a_page_of_a_hundred_sweeps_is_below_two_megabytes(tmp_path):
    """Of 200 rounds, with 8 sets of 2 trials each."""
    random = np.random.default_rng(0)
    algorithms = ("Fedavg", "Fedprox", "Fedavgm", "Fedadam", "Scaffold")
    for alpha, algorithm in itertools.product(range(1, 21), algorithms):
        settings = Settings(algorithm=algorithm, partition="dirichlet", partition_alpha=alpha / 20, local_optimizer="sgd")
        for hparams_seed, trial in itertools.product(range(8), range(2)):
            curve = random.random(200)
            make_trial(tmp_path / "out", hparams_seed, trial, [curve] * 2, curve, settings)
    page = make_page(tmp_path / "out", tmp_path / "page.html")
    assert page.stat().st_size < 2_000_000
    assert page.read_text().count("<details>") == 100


def width_of(path):
    """The width of a picture in inches."""
    content = path.read_bytes()
    if path.suffix == ".png":
        (pixels,) = struct.unpack(">I", content[16:20])
        return pixels / 300
    if path.suffix == ".svg":
        return float(re.search(rb'<svg [^>]*width="([0-9.]+)pt"', content).group(1)) / 72
    assert b"CreationDate" not in content and b"/Subtype /Type3" not in content
    return float(re.search(rb"/MediaBox \[ 0 0 ([0-9.]+) ", content).group(1)) / 72


@pytest.mark.slow
def test_pictures_have_the_widths_of_a_paper_and_the_same_bytes_each_time(tmp_path):
    make_sweeps(tmp_path / "out")
    arguments = ["--output_dir", str(tmp_path / "out"), "--plots", str(tmp_path / "plots" / "new")]
    assert collect_results.main(arguments) == 0
    names = {"learning_curves_mlp_digits", "accuracy_by_bytes_mlp_digits", "clients_mlp_digits", "expected_best_mlp_digits"}
    names |= {f"hparams_mlp_digits_{algorithm}" for algorithm in ("Fedavg", "Fedper")}
    written = {path: path.read_bytes() for path in (tmp_path / "plots" / "new").glob("*/*")}
    places = itertools.product(("column", "full"), names, ("pdf", "png", "svg"))
    assert {f"{path.parent.name}/{path.name}" for path in written} == {f"{place}/{name}.{form}" for place, name, form in places}
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    assert all(content.startswith(starts[path.suffix]) for path, content in written.items())
    for path in written:
        assert width_of(path) == pytest.approx({"column": 3.3, "full": 6.9}[path.parent.name], abs=0.01), path
    assert collect_results.main(arguments) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "plots" / "new").glob("*/*")} == written


@pytest.mark.parametrize("width", plots.WIDTHS.values())
def test_pictures_have_a_papers_fonts_no_title_and_the_axes_of_domains(tmp_path, width):
    """Algorithms are written as the user wrote them."""
    for seed in range(8):
        make_trial(tmp_path, seed, 0, [[0.5 + seed / 20]] * 2, [0.5], Settings(algorithm="FEDprox", local_optimizer="sgd"))
    with matplotlib.rc_context(plots.STYLE):
        figures = dict(plots.pictures(Report(collect([tmp_path]), "validation"), width))
        for name, figure in figures.items():
            figure.draw_without_rendering()
            texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip() and text.get_visible()]
            assert {text.get_fontsize() for text in texts} <= {8, 9}, name
            assert not any(axes.get_title() for axes in figure.axes) and figure._suptitle is None
            drawn = figure.get_tightbbox()  # in inches
            assert drawn.min.min() >= 0 and (drawn.max <= figure.get_size_inches()).all(), name
    assert [text.get_text() for text in figures["learning_curves_mlp_digits"].legends[0].get_texts()] == ["FEDprox"]
    by_name = figures["hparams_mlp_digits_FEDprox"].axes
    scales = {axes.get_xlabel(): axes.get_xscale() for axes in by_name if axes.axison}
    assert scales == {
        "batch_size": "log", "dropout_rate": "linear", "learning_rate": "log", "momentum": "linear", "weight_decay": "linear",
        "mu": "log",
    }  # fmt: skip


def test_an_axis_is_logarithmic_if_the_domain_is():
    wide, narrow = Choice((0.1, 1.0, 10.0)), Choice((1, 5, 10))
    domains = (LogUniform(1, 2, base=2), LogUniform(1, 2), wide, narrow, Choice((0.0, 1e-3, 1.0)), Uniform(1e-3, 1), Fixed(3))
    assert [log_base(domain) for domain in domains] == [2, 10, 10, None, None, None, None]


def test_every_client_is_a_point_and_their_extremes_the_whiskers(tmp_path):
    """Where clients have no test samples they are left out, and an algorithm where none has."""
    of_trials = {"Fedavg": ([0.5, 0.7], [0.9, 0.8]), "Fedper": ([0.6, None], [0.4, 0.3]), "Fedbn": ([None, None],) * 2}
    for algorithm, trials in of_trials.items():
        for trial, local in enumerate(trials):
            make_trial(tmp_path, 0, trial, [[0.5]] * 2, [0.5], Settings(algorithm=algorithm), local=[[each] for each in local])
    (axes,) = dict(plots.pictures(Report(collect([tmp_path]), "validation"), 3.3))["clients_mlp_digits"].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Fedavg", "Fedper"]
    lines = [(line.get_marker(), np.unique(line.get_ydata())) for line in axes.lines if len(line.get_ydata())]
    accuracies = [[0.5, 0.7, 0.8, 0.9], [0.3, 0.4, 0.6]]
    assert [values for marker, values in lines if marker == "o"] == [pytest.approx(each) for each in accuracies]
    caps = [values for marker, values in lines if marker != "o" and len(values) == 1]  # and the medians
    assert caps == [pytest.approx([value]) for value in (0.5, 0.9, 0.75, 0.3, 0.6, 0.4)]


def test_curves_differ_by_more_than_their_colour():
    looks = [plots.style(place) for place in range(19)]  # as many as there are algorithms
    assert len({(look["linestyle"], look["marker"]) for look in looks}) == 19
    of_page = [(place % len(charts.MARKS), re.sub('color:[^;"]*', "", charts._style(place))) for place in range(14)]
    assert len(set(of_page)) == 14
