"""Every row of METHODS trains on real data under tensor parallelism, through the same training code.

Needs the optional shared/ folder; skipped, with the reason, where there is none.
"""

import gzip
import json
import re
from pathlib import Path

import pytest

from rpo_megatron.config import RunConfig
from rpo_megatron.config_io import load, write
from rpo_megatron.objectives.methods import METHODS
from tests.parallel import launch
from tests.parallel.test_runs import run_ok

STEPS = 20
NUM_GROUPS = 4
OWN = ("text_davinci_001", "alpaca-7b", "falcon-7b-instruct")
"""Models of the real data that stand for the policy's own samples; the others are WRPO's sources."""
SLOW = "optimizer.lr=1e-5"
"""For losses of unscaled sums of log-ratios, which overshoot at 1e-4."""
SETTINGS = {
    "ipo": [SLOW],
    "brain": [SLOW],
    "rebel": [SLOW],
    "wrpo": ["data.source_column=foreign"],
    "steerlm2": ["rewards.columns=[reward, logp]", SLOW],
    "pessimistic_unconfirmed": ["rewards.columns=[reward, brevity]"],
    "reward_regression": ["rewards.standardise=dataset"],
}
"""What a method needs besides its name: columns, as a user would say them."""


@pytest.fixture(scope="module")
def data(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few real groups with four short responses each and three further columns."""
    directory = tmp_path_factory.mktemp("methods")
    rows = []
    with gzip.open(shared / "data" / "alpaca_eval_multi.train.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            short = [item for item in row["responses"] if 10 < len(item["text"]) < 150]
            own = [item for item in short if item["model"] in OWN]
            foreign = [item for item in short if item["model"] not in OWN]
            if len(own) < 2 or len(foreign) < 2 or len({item["reward"] for item in own[:2]}) < 2:
                continue
            chosen = [*own[:2], *foreign[:2]]
            for item in chosen:
                item |= {"foreign": item["model"] not in OWN, "brevity": -len(item["text"]) / 100}
            rows.append({"prompt": row["prompt"], "responses": chosen})
    (directory / "raw.jsonl").write_text("\n".join(map(json.dumps, rows[:NUM_GROUPS])))
    model = shared / "models" / "stories260K"
    columns = ["columns.extra.foreign=foreign", "columns.extra.brevity=brevity"]
    run_ok(
        "prepare", f"input={directory}/raw.jsonl", f"tokenizer={model}", f"output_prefix={directory}/train", *columns
    )
    write(config(directory, model, "dpo"), directory / "run.yaml")
    run_ok("score", f"{directory}/run.yaml", "--with", "logp", "score.checkpoint=start")
    return directory


def config(directory: Path, model: Path, method: str, *overrides: str) -> RunConfig:
    """Full batches, so that the loss of a step can be compared with the first."""
    base = [
        f"run_dir={directory / method}",
        f"model.path={model}",
        f"data.train={directory / 'train'}",
        f"objective.method={method}",
        "optimizer.lr=1e-4",
        f"train.steps={STEPS}",
        f"train.groups_per_step={NUM_GROUPS}",
        "precision=fp32",
        "logging.tensorboard=false",
    ]
    return load(RunConfig, None, [*base, *overrides])


@pytest.mark.parallel
def test_every_method_trains(data: Path, shared: Path, tmp_path: Path) -> None:
    """Catches a row that only works in the unit tests: a column that no part of the pipeline delivers, a loss that does
    not fall, a gradient that is not finite."""
    model = shared / "models" / "stories260K"
    configs = [config(data, model, name, "parallel.tensor=2", *SETTINGS.get(name, [])) for name in METHODS]
    losses = launch.run("tests.parallel.jobs:train_losses", processes=2, directory=tmp_path, configs=configs)[0]
    assert losses.keys() == METHODS.keys()
    for name, curve in losses.items():
        print(f"{name:<24} loss {curve[0]:10.5f} -> {curve[-1]:10.5f}")
    for name, curve in losses.items():
        assert len(curve) == STEPS
        assert curve[-1] < curve[0], name


def test_training_does_not_know_methods() -> None:
    """Catches a special case for one method anywhere but in its row."""
    package = Path(__file__).resolve().parents[2] / "rpo_megatron"
    quoted = re.compile("|".join(rf"""["']{name}["']""" for name in METHODS))
    wrong = [
        f"{path.relative_to(package)}: {found[0]}"
        for folder in ("training", "model", "data")
        for path in (package / folder).rglob("*.py")
        if (found := quoted.search(path.read_text(encoding="utf-8")))
    ]
    assert not wrong, wrong
