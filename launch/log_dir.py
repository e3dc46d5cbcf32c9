"""The folder for the logs of a command, RUN_DIR/logs: `python3 launch/log_dir.py train run.yaml run_dir=runs/a`.

The words are those of `rpo`. Those that rpo will refuse, and verbs that have no run_dir, log to ./rpo-logs.
"""

import sys

from rpo_megatron import config_io
from rpo_megatron.cli import VERBS
from rpo_megatron.config import RunConfig
from rpo_megatron.errors import UserError


def log_dir(words: list[str]) -> str:
    verb = VERBS.get(words[0])
    if verb is None or verb.config is not RunConfig:
        return "rpo-logs"
    file = next((word for word in words if word.endswith((".yaml", ".yml")) and "=" not in word), None)
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    try:
        return f"{config_io.load(RunConfig, file, overrides).run_dir}/logs"
    except UserError:
        return "rpo-logs"


if __name__ == "__main__":
    print(log_dir(sys.argv[1:]))
