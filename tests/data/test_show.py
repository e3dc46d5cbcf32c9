"""`rpo inspect`: the numbers of the manifest, and examples that show where prompt, response and tokens end."""

from pathlib import Path

import numpy as np
import pytest

from rpo_megatron.config_verbs import InspectConfig
from rpo_megatron.data.manifest import NO_TEMPLATE
from rpo_megatron.data.show import inspect
from rpo_megatron.data.store import Store
from rpo_megatron.data.tokenizer import Tokenizer
from rpo_megatron.data.writer import StoreWriter, write_reference
from rpo_megatron.errors import UserError


@pytest.fixture
def prefix(tmp_path: Path, sentencepiece_tokenizer: Tokenizer) -> str:
    path = str(tmp_path / "store")
    encode = sentencepiece_tokenizer.encode
    with StoreWriter(path, tokenizer=sentencepiece_tokenizer.info, template=NO_TEMPLATE) as writer:
        for i in range(3):
            texts = [f"{i} what", " one", " of course"]
            prompt, first, second = (np.array(ids) for ids in encode(texts))
            prompt = np.concatenate([[1], prompt])
            writer.add(prompt, [np.append(first[1:], 2), np.append(second[1:], 2)], np.array([0.5, -1.25]))
        writer.finish(dropped={"response_too_long": 17})
    return path


def shown(capsys: pytest.CaptureFixture[str], **knobs: object) -> str:
    inspect(InspectConfig(**knobs))  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_summary(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Counts, what was dropped and the histograms; without examples no tokenizer is needed."""
    out = shown(capsys, prefix=prefix, examples=0)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "groups 3" in lines
    assert "responses 6" in lines
    assert "17 response_too_long" in lines
    assert "reference none stored" in lines
    assert any(line.startswith("2 3 █") for line in lines)  # K = 2 in all three groups
    assert "rewards given: mean -0.375, std 0.875" in lines
    assert "===" not in out


def test_examples(prefix: str, capsys: pytest.CaptureFixture[str], sentencepiece_tokenizer: Tokenizer) -> None:
    """Token borders are visible, the response keeps its first space, reward and length are those of the response."""
    out = shown(capsys, prefix=prefix, examples=1, first=2)
    group = Store.open(prefix).group(2)
    [heading] = [line for line in out.splitlines() if line.startswith("===")]
    assert heading == f"=== group 2: prompt, {group.prompt.size} tokens"
    body = out[out.index("===") :].splitlines()
    assert body[1].replace("▏", "") == "<s>2 what"
    assert body[1].count("▏") == group.prompt.size - 1
    assert body[2] == f"--- group 2: response 0, {group.responses[0].size} tokens, reward 0.5"
    assert body[3].replace("▏", "") == " one</s>"
    assert body[4].endswith("reward -1.25")
    assert body[5].replace("▏", "") == " of course</s>"
    assert "=== group 2" not in shown(capsys, prefix=prefix, examples=2, first=0)


def test_reference_is_shown(prefix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Which reference made the sidecar, to compare with the one a run wants."""
    store = Store.open(prefix)
    write_reference(store, [np.zeros(2)] * 3, identity={"weights": "abcdef"})
    assert "weights: abcdef" in shown(capsys, prefix=prefix, examples=0)


def test_errors(prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another tokenizer would decode to nonsense; a group beyond the end does not exist."""
    with pytest.raises(UserError, match="groups 0 to 2"):
        shown(capsys, prefix=prefix, first=3)
    with pytest.raises(UserError, match="is not here"):
        shown(capsys, prefix=prefix, tokenizer=str(tmp_path / "none"))
    other = tmp_path / "other.model"
    other.write_bytes(b"x")
    with pytest.raises(UserError, match="not the tokenizer that made"):
        shown(capsys, prefix=prefix, tokenizer=str(other))
