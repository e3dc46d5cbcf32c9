"""`rpo methods`: as text, for one method, and as the table of the README."""

import re

import pytest

from rpo_megatron.cli import main
from rpo_megatron.config_verbs import MethodsConfig
from rpo_megatron.errors import UserError
from rpo_megatron.objectives.methods import METHODS
from rpo_megatron.objectives.show import details, markdown, print_methods, table


def test_table_has_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    """`rpo methods` that misses a row, or one of formula, paper, columns and knobs with defaults; the knobs of the
    anchor, which most rows have, are said once at the end."""
    print_methods(MethodsConfig())
    lines = capsys.readouterr().out.splitlines()
    entries, end = lines[:-2], lines[-1]
    assert [line for line in entries if not line.startswith(" ")] == list(METHODS)
    assert len(entries) == 4 * len(METHODS)
    start = entries.index("cdpo")
    assert entries[start + 1].strip() == METHODS["cdpo"].formula
    assert entries[start + 2].strip() == METHODS["cdpo"].source
    knobs = "beta=0.1, label_smoothing=0.1, pair=best_random, log_ratio=sum"
    assert entries[start + 3].strip() == f"reads ref_logp, reward; knobs {knobs}"
    anchored = [name for name, method in METHODS.items() if "nll_weight" in method.knobs]
    assert end == f"knobs nll_weight, nll_on besides: {', '.join(anchored)}"


def test_one_method_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    """`rpo methods NAME` without a knob, its range or who recommends it."""
    print_methods(MethodsConfig(name="cdpo", format="markdown"))
    text = capsys.readouterr().out
    assert "label_smoothing = 0.1  (in [0, 0.5); the share of labels believed to be wrong" in text
    assert "nll_on = best  (one of best, all, weighted; used while nll_weight is not 0)" in text
    with pytest.raises(UserError, match="did you mean 'cdpo'"):
        print_methods(MethodsConfig(name="cdop"))


@pytest.mark.parametrize("name", METHODS)
def test_every_knob_is_shown_once(name: str) -> None:
    """A knob that is off by default and is therefore not found by those who look for it."""
    for key in METHODS[name].knobs:
        assert len(re.findall(rf"^  {key}(?: =|: not set)", details(name), re.MULTILINE)) == 1
    if "gamma" in METHODS[name].knobs:
        assert "gamma: not set (in [0, inf); in place of gamma_beta_ratio)" in details(name)


def test_markdown_is_a_table() -> None:
    """A `|` of a formula that opens a new cell, a missing row, a header that does not fit."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown().splitlines()]
    assert {len(row) for row in rows} == {5}
    assert [row[0].strip(" `") for row in rows[2:]] == list(METHODS)
    assert [cell.strip() for cell in rows[0]] == ["method", "loss of one group", "source", "reads", "knobs"]
    assert set("".join(rows[1])) == {"-"}
    sft = next(row for row in rows if row[0].strip() == "`sft`")
    assert [cell.strip() for cell in sft[3:]] == ["length, reward", "`responses=best`"]
    assert sft[1].strip().replace("\\|", "|") == METHODS["sft"].formula


def test_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A verb that does not reach the printer: bare, with a name, with a format, with a name that is none."""
    assert main(["methods"]) == 0
    assert capsys.readouterr().out == table() + "\n"
    assert main(["methods", "rloo"]) == 0
    assert capsys.readouterr().out == details("rloo") + "\n"
    assert main(["methods", "format=markdown"]) == 0
    assert capsys.readouterr().out == markdown() + "\n"
    assert main(["methods", "ploo"]) == 2
    assert "there is no method 'ploo'; did you mean 'rloo'?" in capsys.readouterr().err
