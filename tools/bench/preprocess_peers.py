"""One way to prepare or to read data, once: what tools/bench/preprocess.py measures runs this in a process of its own.

    python tools/bench/preprocess_peers.py NAME INPUT OUTPUT TOKENIZER

Any interpreter that has the libraries of the one way serves: nothing else is imported.
"""

import json
import random
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing import Pool
from types import SimpleNamespace
from typing import Any

COLUMNS = ("prompt", "response_0", "response_1", "response_2", "response_3")
SEED = 0


def datasets_map(source: str, output: str, path: str) -> None:
    """`datasets.map` in batches: prompt and responses tokenized in one call for a thousand rows, written as Arrow."""
    tokenizer = _tokenizer(path)

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [text for column in COLUMNS for text in rows[column]]
        ids, count = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], len(rows["prompt"])
        return {name: ids[i * count : (i + 1) * count] for i, name in enumerate(COLUMNS)}

    dataset = _dataset(source, output)
    dataset.map(tokenize, batched=True, remove_columns=dataset.column_names).save_to_disk(output)


def megatron(source: str, output: str, path: str) -> None:
    """A stand-in for Megatron-LM's tools/preprocess_data.py, which its package lacks: a pool of processes (here of one)
    that tokenizes a line at a time, one builder of megatron.core for each of the five columns."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    size = len(_tokenizer(path))
    builders = {key: IndexedDatasetBuilder(f"{output}_{key}.bin", dtype=DType.optimal_dtype(size)) for key in COLUMNS}
    with open(source, encoding="utf-8") as lines, Pool(1, initializer=_Encoder.start, initargs=(path,)) as pool:
        for ids, lengths, _ in pool.imap(_Encoder.encode, lines, 32):
            for key, tokens in ids.items():
                builders[key].add_document(tokens, lengths[key])
    for key, builder in builders.items():
        builder.finalize(f"{output}_{key}.idx")


def megatron_fast(source: str, output: str, path: str) -> None:
    """A stand-in for the newer tools/preprocess_data_fast.py: for each column gigatoken reads and tokenizes the whole
    file by itself, and the builder gets all documents in one write. It can do that only in megatron-core's main, by
    `add_documents`; here its attributes are filled instead."""
    import awkward as ak
    import numpy as np
    from gigatoken import JsonlFileSource, Tokenizer
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    normal = _tokenizer(path)
    fast = Tokenizer(normal)
    dtype = DType.optimal_dtype(len(normal))
    for key in COLUMNS:
        documents = fast.encode_files(JsonlFileSource([source], field=key), parallel=False)
        lengths, tokens = np.asarray(ak.num(documents)), np.asarray(ak.flatten(documents), dtype=dtype)
        builder = IndexedDatasetBuilder(f"{output}_{key}.bin", dtype=dtype)
        builder.data_file.write(np.insert(tokens, np.cumsum(lengths), normal.eos_token_id).tobytes())
        builder.sequence_lengths += (lengths + 1).tolist()
        builder.document_indices += range(1, lengths.size + 1)
        builder.finalize(f"{output}_{key}.idx")


class _Encoder:
    """As in Megatron-LM: the tokenizer is an attribute of the class, so that each process loads it once."""

    tokenizer: Any

    @classmethod
    def start(cls, path: str) -> None:
        cls.tokenizer = _tokenizer(path)

    @classmethod
    def encode(cls, line: str) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
        row = json.loads(line)
        ids, lengths = {}, {}
        for key in COLUMNS:
            tokens = cls.tokenizer(row[key], add_special_tokens=False, verbose=False).input_ids
            ids[key] = [*tokens, cls.tokenizer.eos_token_id]
            lengths[key] = [len(ids[key])]
        return ids, lengths, len(line)


def trl(source: str, output: str, path: str) -> None:
    """What TRL's DPOTrainer does to its dataset before training; a group of four responses is two pairs."""
    from trl import DPOTrainer

    tokenizer = _tokenizer(path)
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=4096, truncation_mode="keep_start")
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    prepared = DPOTrainer._prepare_dataset(trainer, _dataset(source, output), tokenizer, arguments, "train")
    prepared.save_to_disk(output)


def read_store(source: str, output: str, path: str) -> None:
    """Random groups of a store."""
    from rpo_megatron.data.store import Store

    store = Store.open(source)
    _report_rate(store.group, len(store), 40_000)


def read_arrow(source: str, output: str, path: str) -> None:
    """Random rows of what datasets_map wrote."""
    from datasets import load_from_disk

    dataset = load_from_disk(source)
    _report_rate(dataset.__getitem__, len(dataset), 3000)


def index(source: str, output: str, path: str) -> None:
    """A store of `source` (a number) groups of five short sequences, without the tokenizing: written, opened, read."""
    import numpy as np

    from rpo_megatron.data.batch import GroupBatch
    from rpo_megatron.data.manifest import TokenizerInfo
    from rpo_megatron.data.store import Store
    from rpo_megatron.data.writer import StoreWriter

    info = TokenizerInfo(path="t", fingerprints={}, vocab_size=100, bos_id=None, eos_id=2)
    size = 1000
    batch = GroupBatch(
        tokens_T=np.ones(6 * size, dtype=np.int32),
        length_S=np.tile([2, 1, 1, 1, 1], size),
        num_responses_G=np.full(size, 4),
        reward_R=np.zeros(4 * size, dtype=np.float32),
    )
    before, began = _peak_mib(), time.process_time()
    with StoreWriter(output, tokenizer=info) as writer:
        for _ in range(int(source) // size):
            writer.add_batch(batch)
        writer.finish()
    written, peak = time.process_time() - began, _peak_mib() - before
    began = time.process_time()
    store = Store.open(output)
    opened = time.process_time() - began
    print(json.dumps({"groups": len(store), "write_s": written, "write_mib": peak, "open_s": opened}))
    _report_rate(store.group, len(store), 40_000)


def _report_rate(read: Callable[[int], Any], size: int, count: int) -> None:
    """Reads per CPU second, on the last line of the output; a first pass has everything loaded."""
    numbers = [random.Random(SEED).randrange(size) for _ in range(count)]
    for _ in range(2):
        began = time.process_time()
        for i in numbers:
            read(i)
        rate = count / (time.process_time() - began)
    print(json.dumps({"rate": rate}))


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def _dataset(source: str, output: str) -> Any:
    from datasets import load_dataset

    return load_dataset("json", data_files=source, split="train", cache_dir=f"{output}.cache")


WAYS = {way.__name__: way for way in (datasets_map, megatron, megatron_fast, trl, read_store, read_arrow, index)}

if __name__ == "__main__":
    WAYS[sys.argv[1]](*sys.argv[2:])
