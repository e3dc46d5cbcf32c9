"""Bytes that one rank sends for a step, by axis of the layout. Ring algorithms: an all-gather or reduce-scatter of b
bytes over n ranks sends (n - 1) / n b, an all-reduce twice that.

    tensor     per layer and pass two all-reduces of the row's hidden states; with sequence parallelism as many
               all-gathers and reduce-scatters, and in backward the two inputs are gathered again (arXiv 2205.05198,
               section 4.2.2)
    context    per layer and pass an all-to-all of query, key, value and one of the result
    expert     per layer and pass an all-to-all of the chosen tokens' hidden states, there and back; without expert
               ranks the tensor ranks gather the chosen tokens instead, and reduce the results
    pipeline   the row's hidden states to the next stage, their gradient back; for each chunk of the rank
    data       gradients in fp32 (reduce-scatter), weights in their precision (all-gather), once a step
"""

from dataclasses import dataclass

from rpo_megatron.planning.layout import Layout, layers_of, trained_numbers
from rpo_megatron.planning.memory import Row
from rpo_megatron.planning.models import Model


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Of a micro-batch's forward pass, on a rank of the first stage; gradients and weights of a step."""

    tensor: float
    context: float
    expert: float
    neighbour: float
    gradients: float
    weights: float
    backward_share: float
    """Forward and backward together send so many times what forward sends."""

    def of_step(self, microbatches: int, passes: int) -> "Volume":
        """Of a step of `passes` passes (forward, backward, and a reference's forward)."""
        inner = microbatches * (self.backward_share + (passes - 2))
        return Volume(
            tensor=inner * self.tensor,
            context=inner * self.context,
            expert=inner * self.expert,
            neighbour=microbatches * passes * self.neighbour,
            gradients=self.gradients,
            weights=self.weights,
            backward_share=self.backward_share,
        )


def volumes(model: Model, layout: Layout, row: Row, *, width: int) -> Volume:
    shape, layers = model.shape, layers_of(model, layout.pipeline, 0, layout.virtual)
    tokens = row.tokens / layout.context
    hidden = tokens * width * shape.hidden_size
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    value, result = shape.num_kv_heads * shape.value_dim, shape.num_heads * shape.value_dim
    heads = tokens * width * (query + key + value + result) / layout.tensor
    chosen = shape.experts.per_token if shape.experts else 0
    numbers = trained_numbers(model, layout, 0)
    gradients = 4 * (numbers.dense * ring(layout.shards) + numbers.expert * ring(layout.expert_shards))
    inside = 2 * chosen if layout.expert == 1 else 0
    inside += 2 if shape.experts and shape.experts.shared_ffn_size else 0
    again = {"none": 0.0, "mlp": 0.5, "full": 1.0}[layout.recompute]
    gathered = 0.5 if layout.sequence else 0.0
    return Volume(
        tensor=(4 * layers.dense + (2 + inside) * layers.expert) * ring(layout.tensor) * hidden,
        context=layers.total * ring(layout.context) * heads,
        expert=layers.expert * 2 * ring(layout.expert) * chosen * hidden / layout.tensor,
        neighbour=layout.virtual * hidden / (layout.tensor if layout.sequence else 1) if layout.pipeline > 1 else 0.0,
        gradients=gradients,
        weights=gradients * width / 4,
        backward_share=2 + gathered + again,
    )


def ring(size: int) -> float:
    """Share of the bytes that each of `size` ranks sends."""
    return (size - 1) / size
