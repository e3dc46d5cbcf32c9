"""The benchmarks run, in sizes that say nothing about speed; what they write has what the README's table needs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.launch import ROOT, environment
from tools.bench import plots, report
from tools.bench.common import Data, Report, Spread, close, ratio, real_tokens
from tools.bench.growth import exponent

COLUMNS = {
    "step": {"vocab", "responses", "prompt", "real_tokens", "cpu_seconds", "peak_mib"},
    "head": {"rows", "vocab", "precision", "ranks", "cpu_seconds", "peak_mib", "weight_gradient_mib", "unavailable"},
    "shared_prompt": {"vocab", "responses", "prompt", "tokens", "faster", "share", "cpu_seconds"},
    "growth": {"quantity", "value", "cpu_seconds", "peak_mib"},
}


@pytest.fixture(scope="module", params=list(COLUMNS))
def document(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a benchmark's tiny run wrote."""
    output = tmp_path_factory.mktemp("bench") / f"{request.param}.json"
    command = [sys.executable, "-m", f"tools.bench.{request.param}", str(output), "--tiny"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.mark.parallel
def test_writes_what_it_measured(document: dict[str, Any]) -> None:
    """Catches a benchmark that no longer runs against the model as it is, one whose variants do not agree with ours
    (it then fails by itself), and a file without the fields that others read."""
    assert COLUMNS[document["benchmark"]] <= document["results"][0].keys()
    assert document["summary"]
    assert {"cores", "cpu", "memory_gib"} <= document["machine"].keys()
    ours, written = (version.split("+")[0] for version in (torch.__version__, document["versions"]["torch"]))
    assert written == ours  # either may leave out +cu130


@pytest.mark.parallel
def test_readme_and_plot(document: dict[str, Any], tmp_path: Path) -> None:
    """Catches a table or figure that cannot be made of what the benchmark writes."""
    name = document["benchmark"]
    (written,) = plots.draw({name: document}, tmp_path)
    assert written.stat().st_size > 1000
    text = report.markdown({name: document})
    assert document["title"] in text
    assert text.count("\n|") == 2 + len(document["summary"])


def test_ratio_is_taken_round_by_round() -> None:
    """Catches the ratio of two medians, which mixes rounds that the machine ran at different speeds."""
    assert ratio([2.0, 40.0, 9.0], [1.0, 10.0, 9.0]) == Spread(median=2.0, low=1.0, high=4.0)


def test_variants_that_disagree_are_not_compared() -> None:
    """Catches figures of two variants that compute different things, or nothing (NaN)."""
    wanted = torch.tensor([1.0, 2.0])
    close(wanted + 1e-7, wanted, relative=1e-6, what="equal")
    for found in (wanted + 0.1, wanted * float("nan")):
        with pytest.raises(RuntimeError, match="nothing to compare"):
            close(found, wanted, relative=1e-3, what="other")


def test_exponent_of_a_power() -> None:
    """Catches a fit that is not in logarithms: y = 3 x^2 grows with exponent 2."""
    assert exponent([1, 2, 8], [3.0, 12.0, 192.0]) == pytest.approx(2.0)


def test_tokens_count_the_prompt_with_every_response() -> None:
    """Catches speed in tokens that are not TRL's: those of a shared prompt counted once."""
    groups = Data(groups=2, responses=3, prompt=5, shortest=4, longest=4).make(vocab=50)
    assert real_tokens(groups) == 2 * 3 * (5 + 4)


def test_figures_of_other_benchmarks(tmp_path: Path) -> None:
    """Catches a table of a benchmark with a file of its own form: its results are shown, without nested ones."""
    (tmp_path / "data_path.json").write_text('{"results": [{"dp": 8, "useful": 0.98765, "each": [1, 2]}]}')
    text = report.markdown(report.read(tmp_path))
    assert "| dp | useful |\n| --- | --- |\n| 8 | 0.988 |" in text


def test_report_has_the_command(tmp_path: Path) -> None:
    """Catches a file from which the README could not say how its figures are made."""
    Report(name="step", title="t", settings={}, results=[{"a": 1}], summary=[{"a": 1}]).write(tmp_path / "x.json")
    assert "tools.bench.step" in json.loads((tmp_path / "x.json").read_text())["command"]
