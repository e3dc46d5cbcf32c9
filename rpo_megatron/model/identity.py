"""Which weights are these? The files of a Hugging Face directory, their headers, and one fingerprint over them.

No torch: a safetensors file is 8 bytes (little-endian length of the header), a JSON header
{name: {dtype, shape, data_offsets}}, and the data. https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from rpo_megatron.errors import UserError
from rpo_megatron.model.shape import read_config

BLOCK_BYTES = 1 << 20
MAX_BLOCKS = 64
NOT_IDENTITY = ("_name_or_path", "transformers_version")  # where the files were and who wrote them, not what they hold


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    file: Path
    dtype: str
    """safetensors' name: F64, F32, F16, BF16, ..."""
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Header:
    raw: bytes
    tensors: dict[str, TensorInfo]
    data_start: int
    """Byte of the file at which the data begin."""
    file_size: int


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files that transformers would load, in name order: model.safetensors, else those that
    model.safetensors.index.json names. Raises UserError if there are none or one of them is missing."""
    single, index = Path(directory) / "model.safetensors", Path(directory) / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(
            f"'{directory}' has neither {single.name} nor {index.name}; weights in other formats (.bin, .pth, .gguf) "
            "must be converted to safetensors first"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not a safetensors index with a weight_map: {error!r}") from None
    missing = [name for name in names if not (Path(directory) / name).is_file()]
    if missing:
        raise UserError(f"{index}: {len(missing)} of {len(names)} files are missing, first '{missing[0]}'")
    return [Path(directory) / name for name in names]


def read_header(path: Path) -> Header:
    """A safetensors file's header, checked against the file's size: the data must end where the file ends.

    Raises UserError for a truncated file and for one that is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: truncated, or not a safetensors file ({size} bytes); fetch it again")
        raw = file.read(length)
    try:
        table = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        tensors = {n: TensorInfo(file=path, dtype=e["dtype"], shape=tuple(e["shape"])) for n, e in table.items()}
        end = 8 + length + max((e["data_offsets"][1] for e in table.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: not a safetensors file: {error!r}; fetch it again") from None
    if end != size:
        raise UserError(f"{path}: truncated: its header announces {end} bytes, the file has {size}; fetch it again")
    return Header(raw=raw, tensors=tensors, data_start=8 + length, file_size=size)


def weights_fingerprint(directory: str | Path) -> str:
    """sha256 (hex) of config.json and the weights of a Hugging Face directory; the same wherever a copy lies.

    Of each file the size, the header and 64 evenly spaced 1 MiB blocks are hashed (all of it up to 64 MiB), so that
    hundreds of GB take seconds. A change confined to bytes between the blocks goes unnoticed; training and
    merging adapters change tensors throughout. Cutting the same weights into other files gives another fingerprint.
    """
    config = {key: value for key, value in read_config(directory).items() if key not in NOT_IDENTITY}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in weight_files(directory):
        header = read_header(path)
        digest.update(header.file_size.to_bytes(8, "little") + header.raw)
        with path.open("rb") as file:
            for start in _block_starts(header.file_size - header.data_start):
                file.seek(header.data_start + start)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _block_starts(data_size: int) -> list[int]:
    if data_size <= MAX_BLOCKS * BLOCK_BYTES:
        return list(range(0, data_size, BLOCK_BYTES))
    last = data_size - BLOCK_BYTES
    return [i * last // (MAX_BLOCKS - 1) for i in range(MAX_BLOCKS)]
