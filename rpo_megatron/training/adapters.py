"""The adapter that a run trains: the section `lora` of its config, checked, and where the adapter starts. No torch."""

from pathlib import Path

from rpo_megatron.config import LoraConfig, RunConfig
from rpo_megatron.errors import UserError
from rpo_megatron.fileio import sha256
from rpo_megatron.model.adapter import Adapter, choose_targets, num_adapter_parameters
from rpo_megatron.model.peft_format import WEIGHTS, is_peft, read_peft
from rpo_megatron.model.shape import ModelShape, num_parameters, read_shape
from rpo_megatron.model.source import Source, find

STRUCTURE = ("rank", "alpha", "targets", "rank_stabilised")


def is_on(lora: LoraConfig) -> bool:
    return lora.rank > 0 or lora.start is not None


def check_lora(config: RunConfig) -> None:
    """What can be told from the config alone. Raises UserError."""
    lora = config.lora
    if lora.rank < 0:
        raise UserError(f"lora.rank must not be negative, found {lora.rank}")
    if not is_on(lora):
        if lora != LoraConfig():
            raise UserError("the section `lora` is not used by lora.rank=0; remove it, or give a rank")
        return
    if lora.alpha is not None and not lora.alpha > 0:
        raise UserError(f"lora.alpha must be positive, found {lora.alpha}")
    if lora.start is not None and (given := [x for x in STRUCTURE if getattr(lora, x) != getattr(LoraConfig(), x)]):
        raise UserError(f"lora.{given[0]} is what the adapter in lora.start says; remove one of them")
    if config.model.init == "random":
        raise UserError("lora.rank: an adapter of weights that are drawn can be used with nothing else; use pretrained")
    if config.moe.aux_loss or config.moe.z_loss:
        raise UserError("moe.aux_loss, moe.z_loss are not used: an adapter leaves the routers as they are; remove them")
    if config.reference.path is None:
        for key, value in (
            ("reference.offload", config.reference.offload),
            ("fp8.reference_weights", config.fp8.reference_weights),
        ):
            if value:
                raise UserError(
                    f"{key} is not used: the reference is the policy without its adapter, and has no weights of its "
                    f"own; remove it, or name another reference with reference.path"
                )


def wanted(lora: LoraConfig, shape: ModelShape, base: Source) -> Adapter | None:
    """Structure of the adapter that a run trains on `base`. Raises UserError when there cannot be such a one."""
    if not is_on(lora):
        return None
    if lora.start is None:
        return Adapter(
            rank=lora.rank,
            alpha=2.0 * lora.rank if lora.alpha is None else lora.alpha,
            targets=choose_targets(shape, lora.targets, key="lora.targets"),
            rank_stabilised=lora.rank_stabilised,
        )
    return read_peft(lora.start, shape) if is_peft(lora.start) else _of_checkpoint(start(lora.start), shape, base)


def start(path: str) -> Source:
    """Of an adapter in a checkpoint of ours. Raises UserError when there is none."""
    try:
        source = find(path)
    except UserError as error:
        raise UserError(f"lora.start: {error}; or an adapter that PEFT wrote") from None
    if source.adapter is None:
        raise UserError(f"lora.start: {source.path} is a whole model; start from it with model.path")
    return source


def _of_checkpoint(source: Source, shape: ModelShape, base: Source) -> Adapter:
    assert source.adapter is not None
    source.check_base(base, key="lora.start")
    if read_shape(source.hf).head == "value" and shape.head == "lm":
        raise UserError(f"lora.start: {source.path} is an adapter of a reward model, whose head has no words")
    return Adapter.of(source.adapter)


def fingerprint(lora: LoraConfig) -> str:
    """Of the adapter that training starts with; a new one changes nothing."""
    if lora.start is None:
        return "new"
    return sha256(Path(lora.start) / WEIGHTS) if is_peft(lora.start) else start(lora.start).fingerprint()


def describe(adapter: Adapter, lora: LoraConfig, shape: ModelShape) -> str:
    """A line of the run's header."""
    count, total = num_adapter_parameters(shape, adapter), num_parameters(shape)
    scale = "alpha / sqrt(rank)" if adapter.rank_stabilised else "alpha / rank"
    head = ", and the value head" * (shape.head == "value")
    begin = "drawn: at first it changes nothing" if lora.start is None else f"from {lora.start}"
    return (
        f"LoRA, rank {adapter.rank}, {scale} = {adapter.scale:g}, on {', '.join(adapter.targets)}{head}; {begin}\n"
        f"{count:,} of {total + count:,} parameters are trained ({count / (total + count):.2%}); the others have "
        f"neither gradients nor optimizer state"
    )
