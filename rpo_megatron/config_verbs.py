"""The knobs of every verb but `train`, `score`, `eval` and `config`: what config.py says of those holds here."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Column names for input whose layout is not one of those recognised by themselves. Dots reach into objects."""

    prompt: str | None = None
    """Column of the prompt: text, or a list of {role, content} messages."""
    responses: str | None = None
    """Column of the list of responses: texts, message lists, or objects."""
    text: str | None = None
    """Where `responses` holds objects: the key of the response's text."""
    reward: str | None = None
    """Where `responses` holds objects: the key of the reward."""
    rewards: str | None = None
    """Column of the list of rewards, parallel to `responses`."""
    chosen: str | None = None
    """Column of the preferred response."""
    rejected: str | None = None
    """Column of the other response."""
    chosen_reward: str | None = None
    """Column of the preferred response's reward."""
    rejected_reward: str | None = None
    """Column of the other response's reward."""
    extra: dict[str, str] = field(default_factory=dict)
    """Further numbers per response, stored as columns of their own: NAME: COLUMN. COLUMN is a key of each response
    object, or a list parallel to `responses`; of a pair it is COLUMN behind `chosen_` and `rejected_`. For example
    columns.extra.helpful=annotations.helpfulness. true counts 1, false 0."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """`rpo prepare`: raw preference data to a store."""

    input: str
    """A .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, a glob of them, or `hf:NAME[:CONFIG]` for a `datasets` source
    (a hub name or a directory that datasets.load_dataset or load_from_disk opens)."""
    output_prefix: str
    """PREFIX of the store to write: PREFIX.bin, PREFIX.idx, PREFIX.json, ..."""
    tokenizer: str
    """A Hugging Face tokenizer directory, or a bare sentencepiece .model file."""
    split: str = "train"
    """Which split of a `datasets` source to read."""
    chat_template: str = "auto"
    """`auto`: the tokenizer's own template if it has one; `none`: prompt and response as plain text; otherwise the
    path of a Jinja template file."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    workers: int = 0
    """Tokenizing processes; 0 means one per CPU core."""
    fast_tokenizer: Literal["auto", "always", "never"] = "auto"
    """Tokenize with the package gigatoken, which gives the same tokens in a fraction of the time (pip install
    'rpo_megatron[fast]'). `auto`: if it is installed and agrees with the normal tokenizer on the start of the input;
    `always`: or stop."""
    max_length: int = 4096
    """Longest prompt + response, in tokens."""
    too_long: Literal["drop_response", "drop_group", "error"] = "drop_response"
    """What to do with a response that makes prompt + response longer than max_length."""
    empty_response: Literal["drop_response", "drop_group", "error"] = "drop_response"
    """What to do with a response that is empty text or has no token besides the end of turn."""
    duplicate: Literal["keep", "drop_response"] = "drop_response"
    """What to do with a response whose text repeats an earlier one of its group (the first is kept)."""
    single_response: Literal["drop_group", "error"] = "drop_group"
    """What to do with a group that is left with fewer than two responses."""
    missing_reward: Literal["drop_group", "no_rewards", "error"] = "error"
    """What to do with a group that lacks a reward where others have one: drop it, store no rewards at all, or stop."""
    limit: int | None = None
    """Read only the first so many rows."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """`rpo inspect PREFIX`: what is in a store."""

    prefix: str
    """PREFIX of the store."""
    tokenizer: str | None = None
    """Tokenizer that decodes the examples; null means the one recorded in the manifest."""
    examples: int = 2
    """How many groups to print, decoded."""
    first: int = 0
    """Index of the first group to print."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`rpo export CHECKPOINT save=DIR`: a checkpoint to a Hugging Face directory."""

    load: str
    """A run directory (its newest checkpoint) or a checkpoint directory."""
    save: str
    """Directory to write; must not exist yet."""
    max_shard_gb: float = 5.0
    """Largest safetensors file, in GB."""
    format: Literal["merged", "peft"] = "merged"
    """Of a checkpoint that holds an adapter: `merged` into its base, a whole model; `peft`, the adapter alone, as PEFT
    loads it on top of the base."""
    verify: bool = False
    """Open the files with `transformers`, compare its log-probabilities (a reward model's values) of a few random texts
    with ours, print the largest difference, and fail if it is more than rounding. The first process needs memory for
    the whole model in fp32."""
    tensor: int = 1
    """Tensor parallel size to load with (launch as many processes as tensor * pipeline)."""
    pipeline: int = 1
    """Pipeline parallel size to load with."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """`rpo import HF_DIR save=DIR`: a Hugging Face directory to one of our checkpoints."""

    load: str
    """Hugging Face model directory."""
    save: str
    """Checkpoint directory to write; must not exist yet."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of the stored weights."""
    tensor: int = 1
    """Tensor parallel size to run with; the checkpoint loads under any layout."""
    pipeline: int = 1
    """Pipeline parallel size to run with."""


@dataclass(frozen=True, kw_only=True)
class MethodsConfig:
    """`rpo methods [NAME]`: the table of objectives, or one of them in detail."""

    name: str | None = None
    """A method; null prints the table."""
    format: Literal["text", "markdown"] = "text"
    """How the table is printed; `markdown` is what the README shows."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """`rpo plan [RUN.yaml] gpu=H100 gpus=8`: which layouts of a model fit on how many GPUs, and how long a step takes.
    An estimate; nothing is loaded but config.json and the store's manifest."""

    gpu: Literal["A100", "H100", "H200", "B200"]
    """Kind of GPU (the SXM modules; A100 is the one with 80 GB)."""
    gpus: int
    """How many."""
    gpus_per_node: int = 8
    """How many of them NVLink joins."""
    run: str | None = None
    """Config file of a run: its model, store, method, precision and batch are planned, and its own layout is judged.
    A bare word that ends in .yaml sets this."""
    model: str | None = None
    """Without a run (or in place of its model): a directory with a config.json, or a name, e.g. llama-3.1-8b."""
    store: str | None = None
    """PREFIX of a store whose lengths are planned for; null means the run's, or else the three lengths below."""
    prompt: int = 1024
    """Tokens of a prompt, where there is no store."""
    response: int = 512
    """Tokens of a response, where there is no store."""
    responses: int = 4
    """Responses of a group, where there is no store."""
    groups_per_step: int | None = None
    """Groups in the global batch; null means the run's, or else 64."""
    lora_rank: int | None = None
    """Rank of an adapter on all matrices, trained in place of the weights; 0 trains the weights; null means as in the
    run, or else 0."""
    reference: Literal["none", "stored", "resident", "resident_fp8", "offloaded", "base"] | None = None
    """Where the reference is: null means as in the run, or else resident; `base`, of an adapter, is the policy without
    it."""
    precision: Literal["fp32", "bf16"] | None = None
    """Of weights and activations; null means the run's, or else bf16."""
    fp8: bool | None = None
    """The layers' matrices multiply in FP8; null means as in the run, or else not."""
    tokens_per_microbatch: int | None = None
    """Tokens in a packed row; null tries 2,048 to 65,536."""
    recompute: Literal["none", "mlp", "full"] | None = None
    """As in a run; null tries all three."""
    efficiency: float | None = None
    """Share of the GPU's peak that matrix multiplications reach; null means the assumption for that GPU."""
    top: int = 5
    """How many layouts to list."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """`rpo doctor`: what is installed, what will be used, and what on this machine would make a run fail."""

    run_dir: str = "."
    """Directory whose disk is looked at: where runs will be written."""
    timeout: float = 2.0
    """Seconds that one process may take to start and end a process group of its own."""
