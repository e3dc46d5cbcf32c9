"""Hugging Face weights to a checkpoint and back, with Megatron's flags: a door to `rpo import` and `rpo export`.

    python tools/convert_checkpoint.py --loader hf --saver mcore --load-dir llama/ --save-dir checkpoint/
    python tools/convert_checkpoint.py --loader mcore --saver hf --load-dir run/ --save-dir export/ --max-shard-gb 2

A checkpoint of ours loads under any layout, so there is no layout to convert to. --target-tensor-parallel-size and
--target-pipeline-parallel-size say how many processes share the conversion, for a model too large for one:

    torchrun --nproc-per-node 2 tools/convert_checkpoint.py ... --target-tensor-parallel-size 2

All other knobs: `rpo import --help`, `rpo export --help`.
"""

import sys

from rpo_megatron import cli
from rpo_megatron.flags import HELP, flags_to_overrides

VERBS = {("hf", "mcore"): "import", ("mcore", "hf"): "export"}
ALIASES = {
    "load-dir": "load",
    "save-dir": "save",
    "target-tensor-parallel-size": "tensor",
    "target-pipeline-parallel-size": "pipeline",
}


def main(argv: list[str]) -> int:
    """Returns the exit code of the verb that --loader and --saver choose."""
    if any(word in HELP for word in argv):
        print(__doc__)
        return 0
    words = flags_to_overrides(argv, aliases=ALIASES)
    ends = dict(word.split("=", 1) for word in words if word.startswith(("loader=", "saver=")))
    verb = VERBS.get((ends.get("loader", ""), ends.get("saver", "")))
    if verb is None:
        print("error: give --loader hf --saver mcore, or --loader mcore --saver hf", file=sys.stderr)
        return 2
    return cli.main([verb, *(word for word in words if not word.startswith(("loader=", "saver=")))])


if __name__ == "__main__":
    cli.leave(main(sys.argv[1:]))
