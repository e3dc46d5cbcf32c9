"""Every knob of the project on one page: frozen dataclasses, loaded strictly by config_io.py. No torch, no numpy.

Precedence, weakest first: the defaults below < the yaml file < `key.path=value` on the command line.

    rpo train run.yaml objective.beta=0.05 parallel.tensor=2

    # run.yaml
    model: {path: models/llama}
    data: {train: data/train}
    objective: {method: rpo_bwd}

The text under a field is its documentation: `rpo train --help` prints it. A field without a default is mandatory.
A config is never written to after loading; sizes that follow from it are functions of it (training/resolve.py).
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str
    """Directory of the starting weights: a Hugging Face model (config.json, *.safetensors) or a checkpoint of ours."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` reads only config.json and the tokenizer from `path` and draws the weights from `seed`."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train a low-rank adapter (LoRA, arXiv 2106.09685) in place of the weights: these stay as they are in model.path,
    without gradients and optimizer state, and are the reference as well, unless reference.path names another."""

    rank: int = 0
    """Rank of the adapter; 0 trains the weights themselves."""
    alpha: float | None = None
    """What the adapter adds is multiplied by alpha / rank; null means 2 x rank."""
    targets: tuple[str, ...] = ()
    """Which matrices have adapters, by the last words of their names in Hugging Face files, e.g. [q_proj, v_proj];
    empty means all of the layers (of a model with experts, of its attention)."""
    rank_stabilised: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA)."""
    start: str | None = None
    """Go on from an adapter of model.path: a directory that PEFT wrote, or a checkpoint of ours. It brings the four
    values above with it. null draws a new one from `seed`, which at first changes nothing."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str
    """PREFIX of the training store (what `rpo prepare` wrote)."""
    valid: str | None = None
    """PREFIX of the held-out store, for evaluation."""
    tokens_per_microbatch: int = 4096
    """Tokens in a packed row. A group that is longer gets a longer row of its own."""
    packing: bool = True
    """False puts every group in a row of its own (slower; the results are the same)."""
    share_prompt: bool = True
    """Compute a prompt once for all its responses. False computes it once for each (slower; the results are the
    same)."""
    source_column: str | None = None
    """Column of the store that is not 0 for responses of other models than the one that training starts from."""


@dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    """Which numbers of the store are the explicit reward r(x, y), and what happens to them before an objective sees
    them. `rpo inspect PREFIX` lists the columns of a store."""

    columns: tuple[str, ...] = ()
    """Reward columns by name; empty means the store's `reward`, or its only one. Of several, a method that reads one
    reward gets their mean, one that reads an ensemble gets each."""
    standardise: Literal["none", "dataset", "group"] = "none"
    """Subtract the mean and divide by the standard deviation: of the column over the training store (the held-out
    store too is scaled by these), or of each group by itself (rewards that are all equal become 0)."""
    clip: float | None = None
    """After that, cut rewards off at -clip and +clip."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Which knobs a method reads, and their defaults, is said by its row in objectives/methods.py (`rpo methods NAME`);
    setting one that it does not read is an error."""

    method: str
    """Name of a row of METHODS, e.g. rpo_bwd, rpo_sqloo, dpo, ipo, sft."""
    beta: float | None = None
    """Scale of the policy's score: of the log-ratio log(pi/pi_ref), or of the log-probability in methods without a
    reference."""
    eta: float | None = None
    """Scale of the explicit reward."""
    alpha: float | None = None
    """AlphaPO: shape of the reward; 0 is SimPO."""
    gamma: float | None = None
    """SimPO, AlphaPO: margin by which the better response has to win. Give this or gamma_beta_ratio."""
    gamma_beta_ratio: float | None = None
    """The same margin as a multiple of beta."""
    label_smoothing: float | None = None
    """Probability that a preference label is wrong, in [0, 0.5)."""
    win_scale: float | None = None
    """DNO: scale s of the rewards in the win probability P(y beats y') = sigmoid(s (r - r'))."""
    pair: Literal["best_random", "best_worst", "all_pairs"] | None = None
    """How a pair method picks two of K responses: the best and a random other (the RPO paper's protocol), the best and
    the worst, or every pair with unequal rewards, averaged."""
    log_ratio: Literal["sum", "mean"] | None = None
    """Sum log-ratios over a response's tokens (the papers' definition), or average them per token."""
    source_weight: float | None = None
    """WRPO: weight of the other models' best response in the preferred side (the paper's alpha)."""
    source_schedule: Literal["linear", "constant"] | None = None
    """WRPO: let source_weight grow linearly from 0 over the run, or keep it constant."""
    kl_weight: float | None = None
    """Weight of the explicit regulariser KL(pi_ref || pi)."""
    kl_estimator: Literal["token", "sample"] | None = None
    """How that is estimated on responses of the reference: `token`, exactly over the vocabulary at every token (needs
    reference.mode=resident), or `sample`, by -log pi (no reference at all)."""
    kl_samples: Literal["all", "own"] | None = None
    """Which responses are taken for samples of the reference: all, or those that data.source_column does not say come
    from another model."""
    odds_weight: float | None = None
    """ORPO: weight of the odds-ratio term (the paper's lambda)."""
    desirable_weight: float | None = None
    """KTO: weight of the better response."""
    undesirable_weight: float | None = None
    """KTO: weight of the worse response."""
    kl_baseline: Literal["group", "zero"] | None = None
    """KTO: what a log-ratio is compared with: the group's mean log-ratio (if positive), or 0."""
    responses: Literal["best", "all"] | None = None
    """sft: learn from the best-rewarded response of each group, or from all."""
    nll_weight: float | None = None
    """Weight of an anchor: negative log-likelihood per token, beside the method's own loss."""
    nll_on: Literal["best", "all", "weighted"] | None = None
    """Responses of the anchor: the best of each group, all, or all weighted by the softmax of their rewards."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    mode: Literal["resident", "stored"] = "resident"
    """`resident` keeps a frozen copy of the reference beside the policy and runs it over every batch. `stored` reads
    its log-probabilities from next to the store; where they are missing they are made first, as by `rpo score`: one
    pass over the data, after which steps cost as much as without a reference. Best for an epoch or more."""
    path: str | None = None
    """Directory of the reference's weights; null means model.path."""
    offload: bool = False
    """Keep a resident reference in (pinned) host memory and copy it to the device for its pass over each batch only."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor: int = 1
    """Tensor parallel size: every weight matrix is split over this many ranks."""
    pipeline: int = 1
    """Pipeline parallel size: the layers are split into this many stages."""
    virtual: int = 1
    """Virtual pipeline stages of each rank: it holds so many chunks of layers instead of one, each row passes through
    the ranks so many times, and they wait for the pipeline to fill and drain so many times less; more rows are in
    flight, and more is sent. Needs pipeline > 1."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals split over the tensor ranks. Needs tensor > 1."""
    context: int = 1
    """Context parallel size: the tokens of a row are split over this many ranks, in attention its heads. For rows that
    are too long for one GPU."""
    expert: int = 1
    """Expert parallel size: the experts of a layer are shared out over so many of the ranks of a pipeline stage (tensor
    x context x data), each whole on its rank; tokens travel to their experts and back. With 1 every rank has its tensor
    share of all experts."""
    overlap: bool | None = None
    """Let data-parallel communication run behind computation: gradients are reduced while backward still runs, updated
    weights gathered while the next forward runs already. null means on GPUs with several data-parallel ranks."""
    bucket_size: int | None = None
    """Parameters that are communicated together while that overlaps; null is megatron's default, 40 million, or a
    million for each data-parallel rank if that is more."""
    timeout_minutes: float = 10.0
    """How long a rank waits for the others in a collective before it gives up."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    lr: float
    """Peak learning rate of Adam."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    min_lr: float = 0.0
    """Where a cosine schedule ends, at the last step."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW); not applied to norms and biases."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.95
    """Adam's decay of the second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    offload: bool = False
    """Keep Adam's two moments in (pinned) host memory and pass them through the device in every update: 8 bytes less
    for each parameter of a data-parallel rank's share, for a step that waits for the copies. The results and the
    checkpoints are the same."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int | None = None
    """Optimizer steps. Give either this or epochs."""
    epochs: float | None = None
    """Passes over the training store. Give either this or steps."""
    stop_at: int | None = None
    """Stop, with a checkpoint, after this step, though the schedule goes on; a later start resumes there."""
    groups_per_step: int = 64
    """Groups (prompts with all their responses) in the global batch of one optimizer step, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """What `rpo score` writes next to data.train and data.valid."""

    what: Literal["reference", "value", "implicit", "logp"] = "reference"
    """`reference`: log-probabilities of the frozen reference, for reference.mode=stored. The others become a column
    that `rewards.columns` can name: `value`, the scalar of a trained reward model; `implicit`, the implicit reward of
    a trained policy, as objective.method defines it; `logp`, its summed log-probabilities."""
    column: str | None = None
    """Name of the column; null means the word of `what`."""
    checkpoint: str | None = None
    """Weights of the scoring model (not of the reference): a checkpoint, a Hugging Face directory, or `start` for
    model.path; null means the newest checkpoint of run_dir."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    every: int = 0
    """Steps between evaluations on data.valid during training (also before the first and after the last step);
    0 evaluates never."""
    groups: int | None = None
    """Evaluate on the first so many groups of the held-out store; null means all."""
    checkpoint: str | None = None
    """What `rpo eval` evaluates: a checkpoint directory, or `start` for model.path; null means the newest checkpoint of
    run_dir."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 0
    """Steps between checkpoints; the last step always writes one. 0 writes only that."""
    keep: int = 2
    """How many of the newest checkpoints are kept."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest checkpoint of run_dir, if there is one; `never` refuses a run_dir that has any."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    every: int = 1
    """Steps between log lines."""
    tensorboard: bool = True
    """Write TensorBoard events to run_dir/tensorboard besides run_dir/metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Where the time of a step goes: `rpo train run.yaml profile.steps=3`."""

    steps: int = 0
    """Time the phases of so many training steps, then trace one more with torch.profiler; print both as tables and
    write the trace (Chrome JSON). 0 profiles nothing. Lines of torch's tracer that begin with USDT are no errors."""
    skip: int = 2
    """Training steps of this start that go by before: the first ones allocate and compile."""
    directory: str | None = None
    """Where the traces go, one file per rank; null means run_dir/profile."""


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Matrix multiplications of the layers in FP8, on top of precision=bf16, through Transformer Engine. Attention,
    norms and the output layer stay in bf16, log-probabilities in fp32."""

    recipe: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = "none"
    """How numbers are scaled into FP8's range: one scale per tensor from the values of past steps (`delayed`) or its
    own (`tensorwise`), one per block of 128 (`blockwise`, Hopper), one per 32 numbers (`mxfp8`, Blackwell)."""
    bf16_layers: int = 0
    """The first and the last so many layers stay in bf16; not with recipe=delayed."""
    reference_weights: bool = False
    """Keep the weights of a resident reference in FP8 as well: half the memory of bf16. Its log-probabilities are
    those that FP8 computes anyway."""


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Which implementation does the work, where there are several. The run header prints what was chosen."""

    attention: Literal["auto", "sdpa", "merged", "flex", "te"] = "auto"
    """`sdpa`: torch's attention for each segment of a row; `merged`: two flash-attention passes over prompts and
    responses, without copies; `flex`: torch's FlexAttention, one kernel for the row (GPU); `te`: Transformer Engine's
    fused attention, which needs data.share_prompt=false (GPU). auto: merged on a CPU, else sdpa."""
    logprobs: Literal["auto", "tiles", "triton"] = "auto"
    """Log-probabilities without logits: `tiles` of the output layer in torch, or the same with Triton kernels between
    the matrix multiplications (GPU). auto: tiles."""
    keep_logits_mib: int | None = None
    """Memory of each process of the last pipeline stage for tiles of logits that backward then need not compute again,
    as many as fit; with parallel.virtual > 1, of each of the few rows that may be there at once. All of a row's, scored
    tokens x vocabulary / parallel.tensor numbers in `precision`, save a quarter of the output layer's multiplications;
    0 keeps none. The results are the same to the bit. null: 32 on a CPU, 512 on a GPU."""
    layers: Literal["auto", "megatron", "transformer_engine"] = "auto"
    """Linear layers and norms: megatron's own, or Transformer Engine's, which fuse the two, multiply with all experts
    of a rank in one kernel (megatron's take them one after the other) and know FP8. auto: Transformer Engine's with
    FP8, else megatron's."""


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Losses of the routers of a model with experts (model/router.py has the formulas), each summed over the layers and
    added to the mean over groups. Both are off: the objective alone trains the routers. A preference objective compares
    the policy with a reference whose routing is uneven where pretraining left it so, and a loss that evens it out pulls
    all responses away from that reference, whatever their rewards. The log shows how uneven it is (`expert load`)."""

    aux_loss: float = 0.0
    """Weight of the load-balancing loss, over the tokens of each group; 1 where the experts are used alike. Pretraining
    has values from 1e-4 to 1e-2."""
    z_loss: float = 0.0
    """Weight of the z-loss, which keeps the routers' logits small; pretraining has 1e-3."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """`rpo train`, `rpo score`, `rpo eval` and `rpo config` read this."""

    run_dir: str
    """Directory of the run: config, metrics, checkpoints."""
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    moe: MoeConfig = field(default_factory=MoeConfig)
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights and activations. Gradients, master weights, log-probabilities and objectives are fp32."""
    recompute: Literal["none", "mlp", "full"] = "none"
    """What backward computes again instead of keeping it: nothing but what costs next to nothing (what norms and gates
    make; see model/forgetful.py), the feed-forward part of every layer, or whole layers, of which then only the inputs
    are kept. Memory for time (`full`: a third more); the results are the same."""
    seed: int = 1234
    """Seed of the data order, of random pairs and of random weights."""
