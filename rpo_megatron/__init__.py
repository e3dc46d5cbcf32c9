"""rpo_megatron: reward-aware preference optimization of language models on Megatron-core."""

__version__ = "0.1.0"
