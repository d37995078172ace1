"""The part `tests`: the tests that need a GPU; without a GPU, a few of those that simulate one."""

import collections
import importlib.util
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

from common import PROJECT

# The one that fills the device's memory runs alone
ON_A_GPU = [["tests/test_gpu.py", "--gpu", "-k", "not others_hold"], ["tests/test_gpu.py", "--gpu", "-k", "others_hold"]]
WITHOUT = [["tests/test_captured.py", "-k", "fails or rare"]]
WORKERS = 4


def rows(device, tiny):
    for chosen in ON_A_GPU if device == "cuda" else WITHOUT:
        tests = collections.defaultdict(list)
        for case in run_pytest(chosen):
            tests[case.get("name").partition("[")[0]].append(case)
        for name, cases in tests.items():
            problems = [child for case in cases for child in case if child.tag in ("failure", "error", "skipped")]
            yield {
                "test": name,
                "passed": len(cases) - len(problems),
                "of": len(cases),
                "seconds": sum(float(case.get("time", 0)) for case in cases),
                "why": re.sub(r"\s+", " ", problems[0].get("message", ""))[:200] if problems else None,
            }


def run_pytest(chosen):
    """The test cases of a report in JUnit's format. Prints those that fail."""
    parallel = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else []
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report.name}"]
        done = subprocess.run([*command, *parallel, *chosen], cwd=PROJECT, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            sys.exit(f"pytest cannot run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        if done.returncode:
            print(done.stdout[-3000:])
        return list(ElementTree.parse(report.name).iter("testcase"))


def decisions(rows):
    bad = [row["test"] for row in rows if row["passed"] < row["of"]]
    passed, of = (sum(row[name] for row in rows) for name in ("passed", "of"))
    yield f"{passed} of {of} passed" + (f"; mend first: {', '.join(bad)}" if bad else "")
