"""The mathematics of our training step in plain torch: what it would cost without a framework.

A Llama in fp32 on packed rows with shared prompts, DPO on the first and the last response of each group. Written for
speed, for one process, one model family and one loss: fused projections, two flash-attention passes merged by their
log-sum-exp, an output layer that never holds all logits. It shares no code with rpo_megatron's model.

Shapes: T tokens of the row, h heads, d numbers per head, H hidden, N scored positions, V vocabulary, G groups, K
responses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rpo_megatron.data.store import Group
from tools.bench.common import Size
from tools.bench.ours import BETA

TILE = 1024, 8192
"""Rows and words of the logits that exist at a time."""
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Where a group lies in the row."""

    prompt: slice
    responses: list[slice]

    @property
    def all_responses(self) -> slice:
        return slice(self.responses[0].start, self.responses[-1].stop)


@dataclass(frozen=True, kw_only=True)
class Packed:
    tokens_T: torch.Tensor
    position_T: torch.Tensor
    predictor_N: torch.Tensor
    label_N: torch.Tensor
    length_R: torch.Tensor
    """Of all responses, group by group."""
    spans: list[Spans]


def pack(groups: Sequence[Group]) -> Packed:
    tokens, positions, predictors, spans, end = [], [], [], [], 0
    for group in groups:
        prompt = slice(end, end + group.prompt.size)
        end = prompt.stop
        responses = []
        tokens.append(torch.from_numpy(group.prompt))
        positions.append(torch.arange(group.prompt.size))
        for response in group.responses:
            responses.append(slice(end, end + response.size))
            tokens.append(torch.from_numpy(response))
            positions.append(torch.arange(group.prompt.size, group.prompt.size + response.size))
            predictors += [torch.tensor([prompt.stop - 1]), torch.arange(end, end + response.size - 1)]
            end += response.size
        spans.append(Spans(prompt=prompt, responses=responses))
    return Packed(
        tokens_T=torch.cat(tokens),
        position_T=torch.cat(positions),
        predictor_N=torch.cat(predictors),
        label_N=torch.cat([torch.from_numpy(response) for group in groups for response in group.responses]),
        length_R=torch.tensor([response.size for group in groups for response in group.responses]),
        spans=spans,
    )


class PlainLlama:
    def __init__(self, directory: Path, size: Size) -> None:
        self.size = size
        stored = load_file(directory / "model.safetensors")

        def weight(*names: str) -> torch.Tensor:
            return torch.cat([stored[f"{name}.weight"] for name in names]).requires_grad_()

        self.embedding, self.last_norm, self.head = (
            weight("model.embed_tokens"),
            weight("model.norm"),
            weight("lm_head"),
        )
        self.layers = [
            {
                "norm": weight(f"{at}.input_layernorm"),
                "qkv": weight(*(f"{at}.self_attn.{part}_proj" for part in "qkv")),
                "out": weight(f"{at}.self_attn.o_proj"),
                "ffn_norm": weight(f"{at}.post_attention_layernorm"),
                "gate_up": weight(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"),
                "down": weight(f"{at}.mlp.down_proj"),
            }
            for at in (f"model.layers.{i}" for i in range(size.layers))
        ]

    def parameters(self) -> list[torch.Tensor]:
        return [self.embedding, self.last_norm, self.head, *(w for layer in self.layers for w in layer.values())]

    def response_logps(self, row: Packed) -> torch.Tensor:
        """Summed log-probabilities of all responses, fp64 [R]."""
        hidden_NH = self.hidden(row)[row.predictor_N]
        token_N: torch.Tensor = _LogProbs.apply(hidden_NH, self.head, row.label_N)
        sums: torch.Tensor = torch.segment_reduce(token_N.double(), "sum", lengths=row.length_R)
        return sums

    def hidden(self, row: Packed) -> torch.Tensor:
        """[T, H]."""
        width, eps = (self.size.hidden,), 1e-5
        head_dim = self.size.hidden // self.size.heads
        frequency = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle_Td = torch.outer(row.position_T.float(), frequency).repeat(1, 2)
        rotation = angle_Td.cos(), angle_Td.sin()
        x = F.embedding(row.tokens_T, self.embedding)
        for layer in self.layers:
            qkv = F.linear(F.rms_norm(x, width, layer["norm"], eps), layer["qkv"]).unflatten(1, (-1, head_dim))
            x = x + F.linear(self.attend(qkv.transpose(0, 1), rotation, row.spans), layer["out"])
            gate, up = F.linear(F.rms_norm(x, width, layer["ffn_norm"], eps), layer["gate_up"]).chunk(2, dim=1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return F.rms_norm(x, width, self.last_norm, eps)

    def attend(
        self, qkv: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], spans: list[Spans]
    ) -> torch.Tensor:
        """Heads of queries, keys and values [h + 2 kv heads, T, d] to [T, H]."""
        heads, kv_heads = self.size.heads, self.size.kv_heads
        query, key = _rotate(qkv[: heads + kv_heads], rotation).split([heads, kv_heads])
        out_hTd = _Attention.apply(query, key, qkv[heads + kv_heads :], spans)
        return out_hTd.transpose(0, 1).flatten(1)


def step(policy: PlainLlama, groups: Sequence[Group], *, reference: PlainLlama | None = None) -> float:
    """The loss; gradients are left in the policy. Without `reference`, the groups hold its log-probabilities."""
    for parameter in policy.parameters():
        parameter.grad = None
    row = pack(groups)
    if reference is None:
        reference_R = torch.cat([torch.as_tensor(group.ref_logp) for group in groups])
    else:
        with torch.no_grad():
            reference_R = reference.response_logps(row)
    ratio_GK = (policy.response_logps(row) - reference_R).view(len(groups), -1)
    loss = -F.logsigmoid(BETA * (ratio_GK[:, 0] - ratio_GK[:, -1])).mean()
    loss.backward()
    return loss.item()


def _rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos_Td, sin_Td = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos_Td + torch.cat((-second, first), dim=-1) * sin_Td


class _Attention(torch.autograd.Function):
    """Prompts attend causally to themselves; responses to all of their prompt and causally to themselves."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: list[Spans]
    ) -> torch.Tensor:
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:2])
        parts = query, *_for_every_query_head(query, key, value)
        for span in spans:
            out[:, span.prompt], lse[:, span.prompt] = _one(parts, span.prompt, span.prompt, causal=True)
            out_p, lse_p = _one(parts, span.all_responses, span.prompt, causal=False)
            first = span.all_responses.start
            for at in span.responses:
                mine = slice(at.start - first, at.stop - first)
                out_r, lse_r = _one(parts, at, at, causal=True)
                lse[:, at] = torch.logaddexp(lse_p[:, mine], lse_r)
                of_prompt = (lse_p[:, mine] - lse[:, at]).exp()[..., None]
                out[:, at] = out_r.lerp_(out_p[:, mine], of_prompt)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.spans = spans
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        keys, values = _for_every_query_head(query, key, value)
        by_query, by_key, by_value = torch.zeros_like(query), torch.zeros_like(keys), torch.zeros_like(values)

        def add(queries: slice, keys_at: slice, *, causal: bool) -> None:
            given = grads[0][:, queries], query[:, queries], keys[:, keys_at], values[:, keys_at], out[:, queries]
            found = _flash_backward(*(x[None] for x in (*given, lse[:, queries])), 0.0, causal)
            for total, at, part in zip((by_query, by_key, by_value), (queries, keys_at, keys_at), found, strict=True):
                total[:, at] += part[0]

        for span in ctx.spans:
            add(span.prompt, span.prompt, causal=True)
            add(span.all_responses, span.prompt, causal=False)
            for at in span.responses:
                add(at, at, causal=True)
        shared = key.shape[0], -1
        return by_query, by_key.unflatten(0, shared).sum(1), by_value.unflatten(0, shared).sum(1), None


def _for_every_query_head(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    times = query.shape[0] // key.shape[0]
    return key.repeat_interleave(times, dim=0), value.repeat_interleave(times, dim=0)


def _one(
    parts: tuple[torch.Tensor, ...], queries: slice, keys: slice, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = parts
    out, lse = _flash(query[None, :, queries], key[None, :, keys], value[None, :, keys], 0.0, causal)
    return out[0], lse[0]


class _LogProbs(torch.autograd.Function):
    """log softmax(hidden weight^T)[label] by tiles, which backward makes again."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, label_N: torch.Tensor) -> torch.Tensor:
        lse_N = hidden_NH.new_full((len(hidden_NH),), -math.inf)
        picked_N = hidden_NH.new_zeros(len(hidden_NH))
        for rows, words in _tiles(hidden_NH, weight_VH):
            logits = hidden_NH[rows] @ weight_VH[words].T
            column, inside = _columns(label_N[rows], words)
            picked_N[rows] += torch.where(inside, logits.gather(1, column[:, None])[:, 0], 0.0)
            top = logits.amax(1)
            lse_N[rows] = torch.logaddexp(lse_N[rows], top + logits.sub_(top[:, None]).exp_().sum(1).log())
        ctx.save_for_backward(hidden_NH, weight_VH, label_N, lse_N)
        return picked_N - lse_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, weight_VH, label_N, lse_N = ctx.saved_tensors
        by_hidden, by_weight = torch.zeros_like(hidden_NH), torch.zeros_like(weight_VH)
        for rows, words in _tiles(hidden_NH, weight_VH):
            grad = grads[0][rows]
            logits = hidden_NH[rows] @ weight_VH[words].T
            by_logits = logits.sub_(lse_N[rows, None]).exp_().mul_(-grad[:, None])
            column, inside = _columns(label_N[rows], words)
            by_logits.scatter_add_(1, column[:, None], torch.where(inside, grad, 0.0)[:, None])
            by_hidden[rows].addmm_(by_logits, weight_VH[words])
            by_weight[words].addmm_(by_logits.T, hidden_NH[rows])
        return by_hidden, by_weight, None


def _tiles(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> list[tuple[slice, slice]]:
    starts = [range(0, len(tensor), size) for tensor, size in zip((hidden_NH, weight_VH), TILE, strict=True)]
    return [(slice(i, i + TILE[0]), slice(j, j + TILE[1])) for i in starts[0] for j in starts[1]]


def _columns(label_N: torch.Tensor, words: slice) -> tuple[torch.Tensor, torch.Tensor]:
    column_N = label_N - words.start
    inside_N = (column_N >= 0) & (column_N < words.stop - words.start)
    return torch.where(inside_N, column_N, 0), inside_N
