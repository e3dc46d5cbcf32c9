"""Which layouts a model can be split over, which layers each pipeline stage gets, which kinds of layers it can have.

No torch and no numpy: `rpo config` checks a layout before anything is loaded.
"""

import math
from collections.abc import Mapping

from rpo_megatron.errors import UserError
from rpo_megatron.model.shape import ModelShape, padded_vocab


def check_layout(
    shape: ModelShape,
    *,
    tensor: int,
    pipeline: int,
    virtual: int = 1,
    context: int = 1,
    expert: int = 1,
    sequence: bool | None = None,
) -> None:
    """Raise UserError, with the nearest sizes that work, if the model cannot be split over tensor x pipeline x context
    ranks, `virtual` chunks of layers on each. `sequence` is parallel.sequence where the model is to be run, None where
    its weights are only passed on."""
    split = {
        "heads": shape.num_heads,
        "kv heads": shape.num_kv_heads,
        "feed-forward columns": shape.ffn_size,
        "rows of the padded vocabulary": padded_vocab(shape),
    }
    count = 1 if shape.experts is None else shape.experts.count
    if count % expert:
        what = "has no experts" if shape.experts is None else f"has {count} experts in a layer"
        raise UserError(f"parallel.expert={expert} does not divide the experts: the model {what}")
    if shape.experts is not None:
        split["feed-forward columns of an expert"] = shape.experts.ffn_size
        if shape.experts.shared_ffn_size:
            split["feed-forward columns of the shared expert"] = shape.experts.shared_ffn_size
        if tensor > 1 and sequence is False:
            raise UserError("a model with experts needs parallel.sequence=true where parallel.tensor is more than 1")
    _check_divides("parallel.tensor", tensor, split)
    _check_divides("parallel.context", context, {"heads of a tensor rank": shape.num_heads // tensor})
    kv_heads = shape.num_kv_heads // tensor
    if kv_heads % context and context % kv_heads:
        raise UserError(
            f"parallel.context={context} and the {kv_heads} kv heads of a tensor rank: one must be a multiple of the "
            f"other; take another parallel.context or parallel.tensor"
        )
    if not 1 <= pipeline <= shape.num_layers:
        raise UserError(f"parallel.pipeline={pipeline} must be from 1 to the model's {shape.num_layers} layers")
    if pipeline * virtual > shape.num_layers:
        raise UserError(
            f"parallel.pipeline={pipeline} x parallel.virtual={virtual} is more than the model's {shape.num_layers} "
            f"layers; with this pipeline, parallel.virtual can be at most {shape.num_layers // pipeline}"
        )


def check_engine_knows(shape: ModelShape) -> None:
    """Raise UserError for a model that cannot have Transformer Engine's layers, which FP8 needs."""
    if shape.latent is not None or shape.biases:
        raise UserError(
            f"{shape.family}: Transformer Engine's layers (kernels.layers=transformer_engine, fp8.recipe) are not "
            f"supported with {'biases' if shape.biases else 'latent attention'}; set kernels.layers=megatron and "
            f"fp8.recipe=none"
        )


def stage_layers(shape: ModelShape, pipeline: int) -> tuple[int, ...]:
    """Layers of each pipeline stage. When they cannot be equal, all stages between the first and the last are (which is
    what megatron offers), the slowest stage is as small as possible, and the last, which also has the output layer, is
    the smallest."""

    def split(middle: int) -> tuple[int, ...]:
        ends = shape.num_layers - (pipeline - 2) * middle
        return (ends - ends // 2, *[middle] * (pipeline - 2), ends // 2)

    if pipeline == 1:
        return (shape.num_layers,)
    candidates = [split(middle) for middle in range(1, shape.num_layers + 1)]
    return min((stages for stages in candidates if min(stages) > 0), key=lambda stages: (max(stages), stages[-1]))


def chunk_layers(shape: ModelShape, pipeline: int, virtual: int) -> tuple[int, ...]:
    """Layers of each chunk, in the order of the layers: chunk i is on pipeline rank i % pipeline. With one chunk for
    each rank, those of its stage; of several, the first ones have one more where they cannot be equal."""
    if virtual == 1:
        return stage_layers(shape, pipeline)
    count = pipeline * virtual
    return tuple(shape.num_layers // count + (i < shape.num_layers % count) for i in range(count))


def _check_divides(key: str, size: int, counts: Mapping[str, int]) -> None:
    broken = [f"{count} {what}" for what, count in counts.items() if size < 1 or count % size]
    if not broken:
        return
    common = math.gcd(*counts.values())
    works = [n for n in range(1, common + 1) if common % n == 0]
    below, above = [n for n in works if n < size][-1:], [n for n in works if n > size][:1]
    raise UserError(
        f"{key}={size} does not divide the model's {', '.join(broken)}; "
        f"nearest that works: {' or '.join(map(str, below + above))}"
    )
