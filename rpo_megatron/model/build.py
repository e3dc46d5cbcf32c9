"""Policy, reference and reward model as megatron-core GPT models: this rank's part of one, from a ModelShape.

The one file that constructs megatron models (GPTModel is announced as deprecated from 0.20 on).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from rpo_megatron.config import Fp8Config, KernelsConfig, MoeConfig
from rpo_megatron.distributed import Groups
from rpo_megatron.model import compat
from rpo_megatron.model.attention import check_attention, choose_attention
from rpo_megatron.model.chunks import Chunks, DataParallelChunks, chunks_of
from rpo_megatron.model.context import sum_over_parts, whole_tokens
from rpo_megatron.model.embedding import use_row_gradients
from rpo_megatron.model.entropy import token_entropy
from rpo_megatron.model.expert_bias import own_expert_biases
from rpo_megatron.model.forgetful import forget_results
from rpo_megatron.model.heads import ValueHead, pooled_position
from rpo_megatron.model.layers import block_spec
from rpo_megatron.model.layout import check_engine_knows
from rpo_megatron.model.linear import use_fast_products
from rpo_megatron.model.logprobs import choose_kept, choose_logprobs, scored_hidden, token_logprobs
from rpo_megatron.model.megatron_config import RECOMPUTE, Recompute, transformer_config
from rpo_megatron.model.precision import check_hardware, check_transformer_engine, megatron_fields
from rpo_megatron.model.rotary import Rotary
from rpo_megatron.model.router import members, use_group_routers
from rpo_megatron.model.row import Row
from rpo_megatron.model.scores import Scores
from rpo_megatron.model.shape import ModelShape, padded_vocab
from rpo_megatron.model.swiglu import fuse_swiglu
from rpo_megatron.model.te_layers import te_block_spec
from rpo_megatron.model.token_kl import token_kl
from rpo_megatron.model.vocab import VocabShard

Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ScoringModel(GPTModel):
    """This pipeline stage of a GPT, or a chunk of it, that answers with numbers per token or per response instead of
    logits.

    forward(row) gives hidden states [T, 1, H] everywhere but at the model's end, and Scores there. Embedding, decoder
    and output layer are GPTModel's; what is ours is the way between them, and the value head that a reward model has in
    place of the output layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        shape: ModelShape,
        groups: Groups,
        *,
        layers: TransformerBlockSubmodules,
        logprobs: Callable[..., torch.Tensor],
        chunk: int | None = None,
    ) -> None:
        """`logprobs` is token_logprobs as the kernels were chosen; `chunk` is None where a stage has just one."""
        is_lm = shape.head == "lm"
        super().__init__(
            config=config,
            transformer_layer_spec=layers,
            vocab_size=padded_vocab(shape),
            max_sequence_length=shape.max_positions,
            pre_process=groups.pp.first and chunk in (None, 0),
            post_process=groups.pp.last and chunk in (None, groups.virtual - 1),
            parallel_output=True,
            share_embeddings_and_output_weights=shape.tied_embeddings and is_lm,
            position_embedding_type="none",
            vp_stage=chunk,
        )
        self.shape = shape
        self.tp = groups.tp
        self.cp = groups.cp
        self.logprobs = logprobs
        self.rotary = Rotary(shape, groups.device, config.params_dtype)
        if self.post_process and not is_lm:
            del self.output_layer
            self.score = ValueHead(config, groups.tp)

    @property
    def vocab_shard(self) -> VocabShard:
        """This rank's part of the output layer, on the last stage of a model that has one."""
        assert self.post_process
        assert self.shape.head == "lm"
        tied = self.shape.tied_embeddings
        weight_VH = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return VocabShard(
            weight_VH=weight_VH, vocab_size=self.shape.vocab_size, tp=self.tp, softcap=self.shape.logit_softcap
        )

    def forward(self, row: Row, *, keep_hidden: bool = False, entropy: bool = False) -> torch.Tensor | Scores:
        """To the Scores of a model with an output layer, `keep_hidden` adds the hidden states at the scored positions,
        and `entropy` the entropy there."""
        here = slice(None) if row.part is None else row.part.tokens
        hidden = self._embed(row.tokens_1T[:, here]) if self.pre_process else None
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            packed_seq_params=row.segments.turned(self.rotary(row.positions_T[here])),
            padding_mask=self._members(row),
        )
        if not self.post_process:
            return hidden
        if self.shape.head == "value":
            return Scores(value_GK=self._values(hidden, row))
        return self._token_scores(hidden, row, keep_hidden=keep_hidden, entropy=entropy)

    def _members(self, row: Row) -> torch.Tensor | None:
        """For the routers of experts: which of the tokens that they see on this rank belong to which group, [G, t]."""
        if self.shape.experts is None or row.group_T is None:
            return None
        group_t = row.group_T if row.part is None else row.group_T[row.part.tokens]
        if self.config.sequence_parallel:
            group_t = group_t.chunk(self.tp.size)[self.tp.rank]
        return members(group_t, len(row.last_position_GK))

    def _embed(self, tokens_1T: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.embedding(input_ids=tokens_1T, position_ids=None)
        if not self.shape.scaled_embedding:
            return hidden
        # Rounded to the weights' precision, as Gemma was trained: sqrt(3072) is 55.5 in bf16.
        return hidden * torch.tensor(math.sqrt(self.shape.hidden_size), dtype=hidden.dtype).item()

    def _values(self, hidden_T1H: torch.Tensor, row: Row) -> torch.Tensor:
        position_GK, part = pooled_position(row, self.shape.pad_token), row.part
        if part is None:
            return self.score(hidden_T1H, position_GK)
        here_GK = part.contains(position_GK)
        value_GK = self.score(hidden_T1H, torch.where(here_GK, part.local(position_GK), 0))
        return sum_over_parts(torch.where(here_GK, value_GK, 0.0), self.cp)

    def _token_scores(self, hidden_T1H: torch.Tensor, row: Row, *, keep_hidden: bool, entropy: bool) -> Scores:
        position_N, label_N, part = row.scored_position_N, row.scored_label_N, row.part
        if part is not None:
            position_N, label_N = part.local(position_N[part.scored_M]), label_N[part.scored_M]
        hidden_NH = scored_hidden(hidden_T1H, position_N, tp=self.tp, sequence_parallel=self.config.sequence_parallel)
        shard = self.vocab_shard

        def whole(number_M: torch.Tensor) -> torch.Tensor:
            return number_M if part is None else whole_tokens(number_M, part, self.cp)

        return Scores(
            logp_N=whole(self.logprobs(hidden_NH, shard, label_N)),
            token_kl_N=None if row.reference is None else whole(token_kl(hidden_NH, shard, row.reference)),
            entropy_N=whole(token_entropy(hidden_NH, shard)) if entropy else None,
            hidden_NH=hidden_NH.detach() if keep_hidden else None,
        )

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        # What GPTModel and LanguageModule add to MegatronModule's concerns the output layer alone.
        owner = GPTModel if self.shape.head == "lm" else MegatronModule
        sharded: dict[str, Any] = owner.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        return sharded


Model: TypeAlias = ScoringModel | Chunks
"""This rank's part of a model."""


def build(
    shape: ModelShape,
    *,
    precision: Precision,
    sequence_parallel: bool,
    groups: Groups,
    recompute: Recompute = "none",
    kernels: KernelsConfig | None = None,
    fp8: Fp8Config | None = None,
    fp8_weights: bool = False,
    moe: MoeConfig | None = None,
) -> Model:
    """This rank's part of the model, with weights not yet set. `fp8_weights` is for a model that is never updated."""
    fp8, kernels = fp8 or Fp8Config(), kernels or KernelsConfig()
    config = transformer_config(
        shape,
        dtype=DTYPES[precision],
        sequence_parallel=sequence_parallel,
        groups=groups,
        **RECOMPUTE[recompute],
        **megatron_fields(fp8, fp8_weights=fp8_weights),
    )
    if shape.experts is not None:
        compat.route_without_te()
        compat.split_sizes_for_gloo()
    name = choose_logprobs(kernels.logprobs, groups.device)
    keep_bytes = choose_kept(kernels.keep_logits_mib, name, groups.device)
    logprobs = partial(token_logprobs, impl=name, keep_bytes=keep_bytes)

    def part(chunk: int | None) -> ScoringModel:
        layers = _layers(config, shape, kernels, fp8, groups, chunk)
        if shape.experts is not None:
            use_group_routers(layers, moe or MoeConfig(), biased=shape.experts.biased)
        # With gradients enabled, megatron lets FP8 weights keep the values that they were made from, in host memory.
        with torch.set_grad_enabled(not fp8_weights):
            return ScoringModel(config, shape, groups, layers=layers, logprobs=logprobs, chunk=chunk).to(groups.device)

    model: Model = part(None) if groups.virtual == 1 else Chunks(map(part, range(groups.virtual)))
    fuse_swiglu(model, shape)
    forget_results(model)
    if shape.biases:
        own_expert_biases(model, groups.etp)
    compat.mark_sharded_weights(model)
    use_row_gradients(model)
    if groups.device.type == "cpu":
        use_fast_products(model)
    return model


def wrap(
    model: Model, *, overlap: bool = False, bucket_size: int | None = None
) -> DistributedDataParallel | DataParallelChunks:
    """Megatron's data parallelism with gradients reduced in fp32 and sharded for the distributed optimizer.

    `overlap`: a bucket of gradients is reduced as soon as the backward of the last micro-batch has filled it, and a
    bucket of updated weights is gathered when the next forward comes to it. Pipeline stages start both by themselves,
    in the order of their schedule, the same on all data-parallel ranks. Megatron's grad_sync_func and param_sync_func
    would have them all start at once: less time that one stage lends the network to another's transfers, against a
    reduction that begins later.
    """
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=bucket_size,
    )
    compat.skip_collectives_of_one()
    wrapped = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks_of(model)]
    if overlap:
        # Only the last micro-batch's backward fills the buckets.
        model.config.no_sync_func = wrapped[0].no_sync if len(wrapped) == 1 else [one.no_sync for one in wrapped]
        last = wrapped[-1].module
        if last.post_process and last.shape.head == "lm" and last.vocab_shard.weight_VH.requires_grad:
            _gather_output_layer(last, wrapped[-1])
    return DataParallelChunks(model, wrapped) if isinstance(model, Chunks) else wrapped[0]


def _gather_output_layer(model: ScoringModel, wrapped: DistributedDataParallel) -> None:
    """Wait for the output layer's weight before the head reads it. Megatron waits in a hook before the forward of the
    module that a weight belongs to, and the output layer's forward never runs: the head takes its weight (vocab_shard).
    Without this, a bucket that holds nothing else would keep the weight of the step before."""
    weight_VH = model.vocab_shard.weight_VH
    group = wrapped.param_to_bucket_group[weight_VH]
    model.decoder.register_forward_hook(lambda *_: group.finish_param_sync())


def choose_layers(kernels: KernelsConfig, fp8: Fp8Config) -> Literal["megatron", "transformer_engine"]:
    """`auto` is Transformer Engine's where FP8 needs them."""
    if kernels.layers != "auto":
        return kernels.layers
    return "megatron" if fp8.recipe == "none" else "transformer_engine"


def _layers(
    config: TransformerConfig,
    shape: ModelShape,
    kernels: KernelsConfig,
    fp8: Fp8Config,
    groups: Groups,
    chunk: int | None,
) -> TransformerBlockSubmodules:
    attention = choose_attention(kernels.attention, groups.device)
    check_attention(attention, shape, device=groups.device, dtype=config.params_dtype)
    if choose_layers(kernels, fp8) == "megatron":
        return block_spec(config, shape, attention=attention, cp=groups.cp, chunk=chunk)
    check_engine_knows(shape)
    check_transformer_engine("kernels.layers=transformer_engine")
    check_hardware(fp8)
    return te_block_spec(config, shape, attention=attention, cp=groups.cp, chunk=chunk)
