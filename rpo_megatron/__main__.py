"""`python -m rpo_megatron VERB ...` is `rpo VERB ...`; torchrun needs it in this form."""

import sys

from rpo_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
