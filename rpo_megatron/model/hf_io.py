"""Hugging Face directories, read and written tensor by tensor with bounded memory.

`HFReader` maps the files and hands out slices; `HFWriter` fills a directory under a temporary name and renames it when
all of it is on disk, so that whatever carries the final name is complete.
"""

import secrets
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rpo_megatron.errors import UserError
from rpo_megatron.fileio import fsync, fsync_tree, write_json
from rpo_megatron.model.identity import TensorInfo, read_header, weight_files


class HFReader:
    """The weights of a Hugging Face directory. Opening reads only the headers; use as a context manager.

    Raises UserError for missing, truncated or contradictory files.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        tensors: dict[str, TensorInfo] = {}
        for path in weight_files(directory):
            for name, info in read_header(path).tensors.items():
                if name in tensors:
                    raise UserError(f"'{name}' is in both {tensors[name].file} and {path}")
                tensors[name] = info
        self.tensors: Mapping[str, TensorInfo] = tensors
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}

    def read(self, name: str) -> Any:
        """A handle that reads only what is asked of it: `reader.read(name)[2:4]` is a tensor of two rows."""
        path = self.tensors[name].file
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._files[path].get_slice(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()


class HFWriter:
    """Writes tensors into safetensors files of a new Hugging Face directory; use as a context manager.

    Tensors collect in memory up to `max_shard_bytes` (or one tensor, if that is larger), then go to disk. Everything
    happens in `staging`, beside `directory`; leaving the block without an exception renames it, with one it is
    removed. Put companion files (model/companions.py) into `staging` too. Raises UserError if `directory` exists.
    """

    def __init__(self, directory: str | Path, *, max_shard_bytes: int) -> None:
        self.directory = Path(directory)
        if self.directory.exists():
            raise UserError(f"'{directory}' exists already; give a directory that does not, or remove it first")
        self.staging = self.directory.with_name(f"{self.directory.name}.incomplete-{secrets.token_hex(4)}")
        self.staging.mkdir(parents=True)
        self._max_shard_bytes = max_shard_bytes
        self._shard_of: dict[str, int] = {}
        self._num_shards = 0
        self._total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a copy of `tensor`, from any device, under its Hugging Face name."""
        assert name not in self._shard_of, name
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        # A copy of its own: a view would keep all of what it views alive, and safetensors refuses shared memory.
        self._pending[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes
        self._shard_of[name] = self._num_shards

    def close(self) -> None:
        """Write what is pending and the index, flush to disk, and give the directory its name."""
        self._flush()
        count = self._num_shards
        final = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            final = ["model.safetensors"]
        for i, file in enumerate(final):
            self._part(i).rename(self.staging / file)
        if count > 1:
            weight_map = {name: final[i] for name, i in sorted(self._shard_of.items())}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            write_json(self.staging / "model.safetensors.index.json", index)
        fsync_tree(self.staging)
        self.staging.rename(self.directory)
        fsync(self.directory.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)  # gone already if it was renamed

    def _flush(self) -> None:
        if not self._pending:
            return
        save_file(self._pending, self._part(self._num_shards), metadata={"format": "pt"})
        self._num_shards += 1
        self._pending, self._pending_bytes = {}, 0

    def _part(self, i: int) -> Path:
        """Where shard i waits until the number of shards is known; a name that nothing loads."""
        return self.staging / f"{i:05d}.part"
