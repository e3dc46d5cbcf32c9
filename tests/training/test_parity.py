"""`rpo export ... verify=true`: an export is compared with what transformers makes of it."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rpo_megatron.config_verbs import ExportConfig, ImportConfig
from rpo_megatron.distributed import stop
from rpo_megatron.errors import UserError
from rpo_megatron.model.build import DTYPES
from rpo_megatron.training import convert
from tests import tiny
from tests.parallel import launch

REWARD = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "pad_token_id": 5}


def exported(directory: Path, *, precision: Any = "fp32", **changes: Any) -> None:
    """directory/exported from directory/model, by way of a checkpoint, verified."""
    tiny.write_model(directory / "model", **changes)
    saved = str(directory / "checkpoint")
    convert.import_(ImportConfig(load=str(directory / "model"), save=saved, precision=precision))
    convert.export(ExportConfig(load=saved, save=str(directory / "exported"), verify=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{}, REWARD, tiny.FAMILIES["gemma3_text"]])
def test_a_faithful_export_is_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str, changes: dict[str, Any]
) -> None:
    """Catches numbers of other texts or another head compared, a model that computes in bf16, where rounding hides what
    is looked for, or a file that is not written in the checkpoint's precision."""
    exported(tmp_path, precision=precision, **changes)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"verified {tmp_path / 'exported'}: largest difference to transformers ")
    assert " over 8 responses of up to " in line
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "exported" / "model.safetensors").values()}
    assert dtypes == {DTYPES[precision]}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_wrong_export_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Catches a comparison that always agrees: here two layers' norms are exchanged in the files, a small change."""
    write = convert.write_hf

    def write_wrongly(model: Any, config: ExportConfig, *others: Any, **options: Any) -> None:
        write(model, config, *others, **options)
        file = Path(config.save) / "model.safetensors"
        tensors = load_file(file)
        names = [f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)]
        tensors |= {names[0]: tensors[names[1]], names[1]: tensors[names[0]]}
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(convert, "write_hf", write_wrongly)
    with pytest.raises(UserError, match=r"exported': largest difference .* do not use the files"):
        exported(tmp_path, precision=precision)
    stop()


@pytest.mark.parallel
def test_under_a_layout(tmp_path: Path) -> None:
    """Catches ranks that wait for a comparison which only the first makes, and numbers taken from a stage that has
    none."""
    tiny.write_model(tmp_path / "model", **tiny.FAMILIES["mixtral"])
    saved, export = tmp_path / "checkpoint", tmp_path / "exported"
    convert.import_(ImportConfig(load=str(tmp_path / "model"), save=str(saved), precision="fp32"))
    done = launch.rpo("export", str(saved), f"save={export}", "verify=true", "tensor=2", "pipeline=2", processes=4)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("largest difference to transformers") == 1
