"""The mechanical translation of flags into overrides."""

import pytest

from rpo_megatron.flags import flags_to_overrides


@pytest.mark.parametrize(
    ("argv", "overrides"),
    [
        (["--output-prefix", "x", "--workers", "4"], ["output_prefix=x", "workers=4"]),
        (["--columns.prompt=y z"], ["columns.prompt=y z"]),
        (["--a=b=c"], ["a=b=c"]),
        (["--some-switch", "--other", "1"], ["some_switch=true", "other=1"]),
        (["--last"], ["last=true"]),
        (["--shift", "-1.5"], ["shift=-1.5"]),
        (["--tokenizer-model", "t.model"], ["tokenizer=t.model"]),
        (["run.yaml", "key=value", "-h"], ["run.yaml", "key=value", "-h"]),
        (["--switch", "--help"], ["switch=true", "--help"]),
        (["--empty="], ["empty="]),
    ],
)
def test_flags(argv: list[str], overrides: list[str]) -> None:
    """A value taken for a flag, or a flag that swallows the next one, sets the wrong knob."""
    assert flags_to_overrides(argv, aliases={"tokenizer-model": "tokenizer"}) == overrides
