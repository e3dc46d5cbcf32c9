"""FP8 recipes: what megatron gets, what rows get, and what is refused. The numbers of FP8 need a GPU: tests/gpu."""

from pathlib import Path

import pytest
import torch

from rpo_megatron.config import Fp8Config, ParallelConfig
from rpo_megatron.data.store import Store
from rpo_megatron.distributed import start, stop
from rpo_megatron.errors import UserError
from rpo_megatron.model.megatron_config import transformer_config
from rpo_megatron.model.precision import RECIPES, check_hardware, frozen, megatron_fields, row_alignment
from rpo_megatron.model.shape import read_shape
from rpo_megatron.training.resolve import resolve
from tests import tiny


@pytest.mark.parametrize(
    ("recipe", "bf16_layers"), [(recipe, n) for recipe in RECIPES for n in (0, 1) if (recipe, n) != ("delayed", 1)]
)
def test_megatron_accepts_the_fields(tmp_path: Path, recipe: str, bf16_layers: int) -> None:
    """Catches a field that megatron does not have, or values that its own check refuses."""
    tiny.write_model(tmp_path)
    fields = megatron_fields(Fp8Config(recipe=recipe, bf16_layers=bf16_layers), fp8_weights=True)  # type: ignore[arg-type]
    config = transformer_config(
        read_shape(tmp_path), dtype=torch.bfloat16, sequence_parallel=False, groups=start(ParallelConfig()), **fields
    )
    stop()
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("hybrid", recipe, True)
    assert config.first_last_layers_bf16 == bool(bf16_layers)


def test_rows_are_aligned(tmp_path: Path) -> None:
    """Catches rows whose parts on a rank are not what the recipe's matrix multiplications take."""
    tiny.write_model(tmp_path / "model")
    tiny.write_store(tmp_path / "train", num_groups=4)
    layout = ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"]
    for recipe, align in (("none", 1), ("delayed", 16), ("tensorwise", 16), ("mxfp8", 32), ("blockwise", 128)):
        plan = resolve(tiny.run_config(tmp_path, f"fp8.recipe={recipe}", "precision=bf16", *layout))
        assert row_alignment(plan.config.fp8) == align
        assert plan.row_multiple == 2 * 2 * align
        assert plan.precision == ("bf16" if recipe == "none" else f"bf16 with fp8 {recipe}")


def test_a_reference_has_no_memory(tmp_path: Path) -> None:
    """Catches a reference whose log-probabilities depend on what it saw before, and a stored one that says so."""
    tiny.write_model(tmp_path / "model")
    store = tiny.write_store(tmp_path / "train", num_groups=4)
    for recipe, of_reference in (("none", ""), ("delayed", " with fp8 tensorwise"), ("mxfp8", " with fp8 mxfp8")):
        plan = resolve(tiny.run_config(tmp_path, f"fp8.recipe={recipe}", "precision=bf16"))
        assert plan.reference_identity(Store.open(store))["precision"] == "bf16" + of_reference
        assert frozen(plan.config.fp8).recipe == (recipe if recipe != "delayed" else "tensorwise")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["fp8.recipe=tensorwise"], "goes on top of precision=bf16"),
        (["fp8.bf16_layers=1"], "not used by fp8.recipe=none"),
        (["fp8.recipe=delayed", "fp8.bf16_layers=1", "precision=bf16"], "not possible with fp8.recipe=delayed"),
        (["fp8.recipe=mxfp8", "precision=bf16", "kernels.layers=megatron"], "kernels.layers=transformer_engine"),
        (
            ["fp8.recipe=mxfp8", "precision=bf16", "fp8.reference_weights=true", "reference.mode=stored"],
            "not used by reference.mode=stored",
        ),
        (
            ["fp8.recipe=mxfp8", "precision=bf16", "fp8.reference_weights=true", "reference.offload=true"],
            "choose one of the two",
        ),
        (["fp8.recipe=fp8"], "fp8.recipe"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, overrides: list[str], says: str) -> None:
    """Catches a knob that would silently do nothing."""
    tiny.write_model(tmp_path / "model")
    tiny.write_store(tmp_path / "train", num_groups=4)
    with pytest.raises(UserError, match=says):
        resolve(tiny.run_config(tmp_path, *overrides))


@pytest.mark.parametrize(
    ("capability", "cuda", "recipe", "says"),
    [
        ((8, 0), "13.0", "tensorwise", "needs compute capability 8.9"),
        ((8, 9), "13.0", "blockwise", "needs compute capability 9.0"),
        ((9, 0), "12.4", "blockwise", "needs torch built with CUDA 12.9"),
        ((9, 0), "13.0", "mxfp8", "Blackwell"),
        ((10, 0), "13.0", "blockwise", "fp8.recipe=mxfp8"),
        ((9, 0), "13.0", "tensorwise", "needs Transformer Engine"),
    ],
)
def test_hardware_is_checked(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cuda: str, recipe: str, says: str
) -> None:
    """Catches a run that fails in a kernel, hours into a queue, for a machine that could have been refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(UserError, match=says):
        check_hardware(Fp8Config(recipe=recipe))  # type: ignore[arg-type]


def test_without_a_gpu_it_says_so() -> None:
    """Catches an import error in place of a message."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        check_hardware(Fp8Config(recipe="tensorwise"))
