"""Where weights come from: a Hugging Face directory, one of our checkpoints, or a run directory. No torch.

run_dir/checkpoints/latest                  name of the newest complete checkpoint
run_dir/checkpoints/step-00000100/          one checkpoint
    config.yaml                             resolved config of the run that wrote it
    state.json                              step, model, precision, identities; sha256 of every other file
    hf/                                     config.json, tokenizer, generation config of the model
    shards/                                 megatron-core distributed checkpoint
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rpo_megatron.errors import UserError
from rpo_megatron.model.identity import weights_fingerprint

CHECKPOINTS = "checkpoints"
LATEST = "latest"
STATE = "state.json"
HF = "hf"
SHARDS = "shards"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Source:
    """A directory of weights."""

    path: Path
    kind: Literal["huggingface", "checkpoint"]

    @property
    def hf(self) -> Path:
        """Where config.json and the tokenizer are."""
        return self.path if self.kind == "huggingface" else self.path / HF

    def fingerprint(self) -> str:
        """Identity of the weights, equal wherever the directory is copied."""
        if self.kind == "huggingface":
            return weights_fingerprint(self.path)
        state = read_state(self.path)
        files = {name: sha for name, sha in state["files"].items() if name.startswith(SHARDS)}
        if state.get("adapter") is not None:
            files["base"] = state["base"]["weights"]
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

    @property
    def adapter(self) -> dict[str, Any] | None:
        """Of a checkpoint that holds an adapter and not a whole model: the adapter's structure."""
        return None if self.kind == "huggingface" else read_state(self.path).get("adapter")

    @property
    def base_weights(self) -> str | None:
        """Fingerprint of the whole model that the adapter belongs to."""
        return None if self.adapter is None else read_state(self.path)["base"]["weights"]

    def base(self) -> "Source":
        """The whole model that the adapter belongs to. Raises UserError when that is no longer where it was."""
        path = read_state(self.path)["base"]["path"]
        try:
            base = find(path)
        except UserError as error:
            raise UserError(
                f"{self.path}: is an adapter, and its base is not where it was: {error}; put it back there, or a link "
                f"to where it is now"
            ) from None
        self.check_base(base)
        return base

    def check_base(self, base: "Source", *, key: str | None = None) -> None:
        """Raises UserError when the adapter belongs to other weights than `base`."""
        record, found = read_state(self.path)["base"], base.fingerprint()
        if record["weights"] != found:
            raise UserError(
                f"{f'{key}: ' if key else ''}{self.path}: is an adapter of {record['path']} with the weights "
                f"{record['weights'][:12]}; {base.path} has the weights {found[:12]}, with which it does not work"
            )


def find(path: str | Path) -> Source:
    """Recognise what `path` holds; a run directory stands for its newest checkpoint.

    Raises UserError when it is none of the three.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"'{path}' is not a directory; give a Hugging Face model, a checkpoint or a run directory")
    if (directory / STATE).is_file():
        return Source(path=directory, kind="checkpoint")
    if (directory / "config.json").is_file():
        return Source(path=directory, kind="huggingface")
    newest = newest_checkpoint(directory)
    if newest is not None:
        return Source(path=newest, kind="checkpoint")
    raise UserError(
        f"'{path}' holds neither a Hugging Face model (config.json) nor a checkpoint ({STATE}) nor a run directory "
        f"({CHECKPOINTS}/{LATEST})"
    )


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """The checkpoint that `latest` names, or None where there is none.

    Raises UserError when `latest` names a directory that is not a complete checkpoint.
    """
    folder = Path(run_dir) / CHECKPOINTS
    pointer = folder / LATEST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    if not (folder / name / STATE).is_file():
        raise UserError(
            f"{pointer} names '{name}', which is not a complete checkpoint; write the name of another directory of "
            f"{folder} into it, or delete it to start over"
        )
    return folder / name


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises UserError when it is damaged or of another format version."""
    file = checkpoint / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        version = state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}); use another checkpoint") from None
    if version != FORMAT:
        raise UserError(f"{file}: checkpoint format {version}, this version reads {FORMAT}")
    return state
