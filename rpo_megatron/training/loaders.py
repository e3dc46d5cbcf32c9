"""The Loader of a store, as a run's config and this process's place in its layout ask for it."""

from rpo_megatron.data.cost import CostModel, transformer_cost
from rpo_megatron.data.loader import Loader
from rpo_megatron.data.store import Store
from rpo_megatron.distributed import Groups
from rpo_megatron.model.shape import ModelShape, padded_vocab
from rpo_megatron.training.resolve import Plan


def make_loader(plan: Plan, store: Store, groups: Groups) -> Loader:
    config = plan.config
    return Loader(
        store,
        seed=config.seed,
        groups_per_step=config.train.groups_per_step,
        tokens_per_microbatch=config.data.tokens_per_microbatch,
        packing=config.data.packing,
        share_prompt=config.data.share_prompt,
        cost=cost_model(plan.shape),
        dp_rank=groups.dp.rank,
        dp_size=groups.dp.size,
        multiple=plan.row_multiple,
        least_rows=groups.pp.size if groups.virtual > 1 else 1,
    )


def cost_model(shape: ModelShape) -> CostModel:
    """What the model's shape makes of lengths."""
    return transformer_cost(
        layers=shape.num_layers,
        hidden=shape.hidden_size,
        ffn=shape.ffn_size,
        query_width=shape.num_heads * shape.head_dim,
        key_width=shape.num_kv_heads * shape.head_dim,
        output_width=padded_vocab(shape) if shape.head == "lm" else 0,
    )
