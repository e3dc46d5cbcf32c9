"""Raw preference data to a store, with flags: a door to `rpo prepare`, which does the work.

python tools/preprocess_data.py --input raw.jsonl --output-prefix data/train --tokenizer-model tokenizer.model
"""

import sys

from rpo_megatron.cli import leave, main
from rpo_megatron.flags import flags_to_overrides

if __name__ == "__main__":
    leave(main(["prepare", *flags_to_overrides(sys.argv[1:], aliases={"tokenizer-model": "tokenizer"})]))
