"""FP8 matrix multiplications through Transformer Engine: what a recipe means for megatron, for rows, for the hardware.
No torch until the hardware is asked.

Only the layers' linear modules compute in FP8. Attention, norms, the output layer and everything after it stay in bf16
and fp32: there FP8 saves little and costs log-probabilities their digits.

| recipe     | a scale for                        | of                             | megatron's fp8_recipe |
|------------|------------------------------------|--------------------------------|-----------------------|
| delayed    | a tensor                           | the largest values of the past | delayed               |
| tensorwise | a tensor                           | its own largest value          | tensorwise            |
| blockwise  | 128 x 128 of weights, 128 of rest  | their own (DeepSeek-V3)        | blockwise             |
| mxfp8      | 32 numbers                         | their own (Blackwell hardware) | mxfp8                 |
"""

from dataclasses import dataclass, replace
from typing import Any

from rpo_megatron.config import Fp8Config
from rpo_megatron.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe asks for."""

    align: int
    """Tokens of a matrix multiplication are a multiple of this."""
    capability: tuple[int, int]
    """Least CUDA compute capability."""
    hardware: str
    cuda: tuple[int, int]
    """Least CUDA version that torch was built with."""
    transformer_engine: tuple[int, int]
    """Least version."""


RECIPES = {
    "delayed": Recipe(align=16, capability=(8, 9), hardware="Ada or Hopper", cuda=(12, 1), transformer_engine=(2, 0)),
    "tensorwise": Recipe(
        align=16, capability=(8, 9), hardware="Ada or Hopper", cuda=(12, 1), transformer_engine=(2, 2)
    ),
    "blockwise": Recipe(align=128, capability=(9, 0), hardware="Hopper", cuda=(12, 9), transformer_engine=(2, 3)),
    "mxfp8": Recipe(align=32, capability=(10, 0), hardware="Blackwell", cuda=(12, 8), transformer_engine=(2, 1)),
}


def row_alignment(fp8: Fp8Config) -> int:
    """Rows (a context rank's part, with sequence parallelism a tensor rank's part of that) are padded to a multiple of
    this, as a segment of their own: padding inside a segment would take part in its scale."""
    return 1 if fp8.recipe == "none" else RECIPES[fp8.recipe].align


def frozen(fp8: Fp8Config) -> Fp8Config:
    """The precision of a model that is never updated. Its log-probabilities have to be a function of its weights and
    the tokens, which they are not with scales from the values of the past (`delayed`, which a pass without gradients
    does not even renew): such a model takes its scales from the tensors themselves."""
    return replace(fp8, recipe="tensorwise") if fp8.recipe == "delayed" else fp8


def megatron_fields(fp8: Fp8Config, *, fp8_weights: bool) -> dict[str, Any]:
    """Fields of megatron's TransformerConfig. `fp8_weights` keeps the weights themselves in FP8, for a model that is
    never updated."""
    if fp8.recipe == "none":
        return {}
    return {
        "fp8": "hybrid",  # E4M3 forward, E5M2 for gradients
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8_weights,
        "first_last_layers_bf16": fp8.bf16_layers > 0,
        "num_layers_at_start_in_bf16": fp8.bf16_layers,
        "num_layers_at_end_in_bf16": fp8.bf16_layers,
        # delayed scaling: megatron's own choice for training, instead of its default of one step of memory
        **({"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"} if fp8.recipe == "delayed" else {}),
    }


def check_hardware(fp8: Fp8Config) -> None:
    """Raises UserError where this process's GPU, CUDA or Transformer Engine cannot do what the recipe asks."""
    if fp8.recipe == "none":
        return
    import torch

    recipe, name = RECIPES[fp8.recipe], f"fp8.recipe={fp8.recipe}"
    if not torch.cuda.is_available():
        raise UserError(f"{name} needs an NVIDIA GPU ({recipe.hardware} or newer); set fp8.recipe=none on this machine")
    capability = torch.cuda.get_device_capability()
    if capability < recipe.capability:
        raise UserError(
            f"{name} needs compute capability {_dotted(recipe.capability)} ({recipe.hardware}) or newer, "
            f"{torch.cuda.get_device_name()} has {_dotted(capability)}; set fp8.recipe=none"
        )
    if fp8.recipe == "blockwise" and capability >= (10, 0):
        raise UserError(f"{name} is Hopper's; {torch.cuda.get_device_name()} has hardware for fp8.recipe=mxfp8")
    cuda = _version(torch.version.cuda or "0")
    if cuda < recipe.cuda:
        raise UserError(f"{name} needs torch built with CUDA {_dotted(recipe.cuda)}, this is {torch.version.cuda}")
    check_transformer_engine(name, least=recipe.transformer_engine)


def check_transformer_engine(wanted_by: str, *, least: tuple[int, int] = (2, 0)) -> None:
    """Raises UserError where Transformer Engine is missing or older than `least`."""
    import torch

    try:
        import transformer_engine
        import transformer_engine.pytorch
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"{wanted_by} needs Transformer Engine: pip install 'transformer-engine[pytorch]' with the CUDA version of "
            f"torch ({torch.version.cuda}); importing it said: {error}"
        ) from None
    if _version(transformer_engine.__version__) < least:
        raise UserError(
            f"{wanted_by} needs Transformer Engine {_dotted(least)} or newer, this is {transformer_engine.__version__}"
        )


def _version(text: str) -> tuple[int, int]:
    major, minor, *_ = [*text.split("."), "0"]
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
