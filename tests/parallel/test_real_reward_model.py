"""A reward model on real input: trained on real judged responses under tensor parallelism, judged on held-out prompts,
exported to transformers; and the implicit reward of a policy measured beside it.

Needs the optional shared/ folder; skipped, with the reason, where there is none.
"""

import json
from pathlib import Path

import pytest

from tests.parallel.test_reward_models import assert_equal, column, transformers_values
from tests.parallel.test_runs import records, run_ok

TP = ["parallel.tensor=2", "parallel.sequence=true"]
SAME_NUMBERS = {"accuracy", "best_of_n", "reward_mean", "reward_max", "kendall_tau", "brier", "calibration_error"}


@pytest.mark.parallel
def test_above_chance_on_held_out_prompts(shared: Path, tmp_path: Path) -> None:
    """Catches a value head that fits what it sees and knows nothing of what it does not, an export that scores
    differently in transformers, and evaluations of explicit and implicit rewards that cannot be compared."""
    model = shared / "models" / "stories260K"
    for name in ("train", "valid"):
        source = shared / "data" / f"alpaca_eval_multi.{name}.jsonl.gz"
        run_ok("prepare", f"input={source}", f"tokenizer={model}", f"output_prefix={tmp_path / name}", "max_length=384")
    (tmp_path / "rm.yaml").write_text(
        f"""
run_dir: {tmp_path}/rm
model: {{path: {model}}}
data: {{train: {tmp_path}/train, valid: {tmp_path}/valid, tokens_per_microbatch: 8192}}
objective: {{method: bradley_terry}}
optimizer: {{lr: 1e-3, schedule: cosine, warmup_steps: 5}}
train: {{epochs: 1, groups_per_step: 16}}
evaluation: {{every: 100}}
logging: {{tensorboard: false}}
precision: fp32
"""
    )
    yaml = str(tmp_path / "rm.yaml")
    run_ok("train", yaml, *TP, processes=2)
    before, after = (record for record in records(tmp_path / "rm") if record["kind"] == "valid")
    for record in (before, after):
        print({name: round(record[name], 4) for name in sorted(SAME_NUMBERS | {"length_correlation"})})
    assert after["accuracy"] > 0.6, "chance is 0.5"
    assert after["best_of_n"] > 1.2 * after["reward_mean"]

    run_ok("score", yaml, *TP, "--with", "value", processes=2)
    run_ok("export", str(tmp_path / "rm"), f"save={tmp_path / 'hf'}")
    values = column(tmp_path / "valid", "value")
    assert_equal(values[:20], transformers_values(tmp_path / "hf", tmp_path / "valid", limit=20), tolerance=1e-4)

    policy = [yaml, "objective.method=dpo", f"run_dir={tmp_path / 'dpo'}", "optimizer.lr=1e-4", "train.epochs=0.5"]
    run_ok("train", *policy, *TP, "evaluation.every=0", processes=2)
    implicit = json.loads(run_ok("eval", *policy).splitlines()[-1])
    print({name: round(implicit[name], 4) for name in sorted(SAME_NUMBERS | {"length_correlation"})})
    assert implicit.keys() >= SAME_NUMBERS
    assert implicit["reward_max"] == pytest.approx(after["reward_max"]), "measured on the same responses"
