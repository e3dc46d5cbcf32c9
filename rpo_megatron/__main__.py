"""`python -m rpo_megatron VERB ...` is `rpo VERB ...`; torchrun needs it in this form."""

from rpo_megatron.cli import entry

if __name__ == "__main__":
    entry()
