"""Hugging Face <-> megatron weights, on tiny random models that transformers itself saved."""

import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rpo_megatron.errors import UserError
from rpo_megatron.model.companions import copy_companions
from rpo_megatron.model.hf import check_accounted, load_shards, merge, shard, stack_experts
from rpo_megatron.model.hf_io import HFReader, HFWriter
from rpo_megatron.model.shape import ModelShape, num_parameters, padded_vocab, read_shape
from rpo_megatron.model.table import EMBEDDING, HF_EMBEDDING, HF_EXPERT_BIAS, HF_OUTPUT, OUTPUT, Entry, entries

transformers = pytest.importorskip("transformers")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN_MOE = {"moe_intermediate_size": 20, "mlp_only_layers": [0]}
DEEPSEEK = {
    **{"num_key_value_heads": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
    **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 10, "kv_lora_rank": 6},
    **{"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("MistralConfig", {"head_dim": 6}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 6}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 3}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 6, "num_experts": 3, "num_experts_per_tok": 2, **QWEN_MOE}),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK),
    "deepseek_v3, queries at once": ("DeepseekV3Config", {**DEEPSEEK, "q_lora_rank": None}),
    "gpt_oss": ("GptOssConfig", {"head_dim": 6, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "phi3": ("Phi3Config", {"pad_token_id": 3, "eos_token_id": 2}),
    "nemotron": ("NemotronConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 6}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 6}),
    "mixtral-value": ("MixtralConfig", {"num_labels": 1, "pad_token_id": 3}),
    "gemma3-value": ("Gemma3TextConfig", {"head_dim": 6, "num_labels": 1, "pad_token_id": 3}),
    "llama-value": ("LlamaConfig", {"num_labels": 1, "pad_token_id": 3}),
    "qwen2-value-tied": ("Qwen2Config", {"tie_word_embeddings": True, "num_labels": 1, "pad_token_id": 3}),
}


def auto_class(name: str) -> Any:
    return transformers.AutoModelForSequenceClassification if "value" in name else transformers.AutoModelForCausalLM


def save_model(directory: Path, name: str, **save: Any) -> Any:
    """Write a random model: 2 layers, hidden 32, 8 query and 4 kv heads, feed-forward 48, an odd vocabulary."""
    kind, changes = MODELS[name]
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8)
    sizes |= dict(num_key_value_heads=4, vocab_size=509, max_position_embeddings=64)
    config = getattr(transformers, kind)(**{**sizes, **changes})
    torch.manual_seed(0)
    model = auto_class(name).from_config(config)
    for parameter in model.parameters():  # norms and biases start as ones and zeros, which would hide a swap
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory, **save)
    return model


@pytest.fixture(scope="module", params=MODELS)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    save_model(directory, request.param, max_shard_size="40KB")
    return directory


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    save_model(tmp_path / "llama", "llama")
    return tmp_path / "llama"


def all_shards(reader: HFReader, shape: ModelShape, *, tp_size: int) -> Iterator[tuple[Entry, list[torch.Tensor]]]:
    for entry in entries(shape):
        yield entry, [shard(entry, reader.read, shape, tp_rank=rank, tp_size=tp_size) for rank in range(tp_size)]


def whole_tensors(reader: HFReader, shape: ModelShape, *, tp_size: int) -> dict[str, torch.Tensor]:
    def merged() -> Iterator[tuple[Entry, dict[str, torch.Tensor]]]:
        for entry, shards in all_shards(reader, shape, tp_size=tp_size):
            assert len({s.shape for s in shards}) == 1
            yield entry, merge(entry, shards, shape)

    return dict(stack_experts(merged()))


# ------------------------------------------------------------------------------------------------ the mapping


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_round_trip(model_dir: Path, tp_size: int) -> None:
    """Any tensor cut, ordered, padded or named so that it does not come back bit for bit, or is left out."""
    original = {name: t for file in model_dir.glob("*.safetensors") for name, t in load_file(file).items()}
    shape = read_shape(model_dir)
    with HFReader(model_dir) as reader:
        check_accounted(reader, shape)
        back = whole_tensors(reader, shape, tp_size=tp_size)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())
    trained = [tensor for name, tensor in original.items() if not name.endswith(HF_EXPERT_BIAS)]
    assert sum(tensor.numel() for tensor in trained) == num_parameters(shape)


@settings(deadline=None, max_examples=30)
@given(
    tp_size=st.sampled_from([1, 2, 4, 8]),
    kv_per_rank=st.integers(1, 3),
    queries_per_kv=st.integers(1, 4),
    head_dim=st.integers(1, 3),
    ffn_per_rank=st.integers(1, 3),
    vocab_size=st.integers(1, 300),
)
def test_round_trip_of_any_shape(
    tp_size: int, kv_per_rank: int, queries_per_kv: int, head_dim: int, ffn_per_rank: int, vocab_size: int
) -> None:
    """Sizes mixed up that coincide in a real model (heads and kv heads, head_dim x heads and hidden), ranks that hold
    nothing but vocabulary padding."""
    kv_heads = kv_per_rank * tp_size
    shape = tiny_shape(num_heads=kv_heads * queries_per_kv, num_kv_heads=kv_heads, head_dim=head_dim)
    shape = replace(shape, ffn_size=ffn_per_rank * tp_size, vocab_size=vocab_size)
    for entry in entries(shape):
        tensors = {name: torch.randn(full) for name, full in entry.tensors.items()}
        shards = [shard(entry, tensors.__getitem__, shape, tp_rank=r, tp_size=tp_size) for r in range(tp_size)]
        back = merge(entry, shards, shape)
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def tiny_shape(*, num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 1) -> ModelShape:
    return ModelShape(
        family="llama",
        num_layers=1,
        hidden_size=5,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=4,
        vocab_size=130,
        tied_embeddings=False,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        qkv_bias=True,
        qk_norm=True,
        max_positions=64,
        sliding_window=None,
        dtype="float32",
    )


def test_layout_by_hand() -> None:
    """A split that inverts itself but is not megatron's. 4 query heads q0..q3 over 2 kv heads, one number each:
    megatron's rows are q0 q1 k0 v0 | q2 q3 k1 v1, of the MLP [gate; up] inside each rank, of proj columns."""
    shape = tiny_shape()
    of = {entry.name.removeprefix("decoder.layers.0."): entry for entry in entries(shape)}
    hf = {
        "model.layers.0.self_attn.q_proj.bias": torch.tensor([0.0, 1.0, 2.0, 3.0]),
        "model.layers.0.self_attn.k_proj.bias": torch.tensor([10.0, 11.0]),
        "model.layers.0.self_attn.v_proj.bias": torch.tensor([20.0, 21.0]),
        "model.layers.0.mlp.gate_proj.weight": torch.arange(4.0)[:, None].expand(4, 5),
        "model.layers.0.mlp.up_proj.weight": torch.arange(10.0, 14.0)[:, None].expand(4, 5),
        "model.layers.0.self_attn.o_proj.weight": torch.arange(4.0).expand(5, 4),
    }

    def part(name: str, rank: int, size: int) -> torch.Tensor:
        return shard(of[name], hf.__getitem__, shape, tp_rank=rank, tp_size=size)

    assert part("self_attention.linear_qkv.bias", 0, 1).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert part("self_attention.linear_qkv.bias", 1, 2).tolist() == [2, 3, 11, 21]
    assert part("mlp.linear_fc1.weight", 0, 1)[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert part("mlp.linear_fc1.weight", 1, 2)[:, 0].tolist() == [2, 3, 12, 13]
    assert part("self_attention.linear_proj.weight", 1, 2)[0].tolist() == [2, 3]


def test_vocabulary_padding_is_zero() -> None:
    """Uninitialised rows, or rows shifted between ranks: 130 tokens padded to 256 over 4 ranks of 64 rows."""
    shape = tiny_shape()
    table = torch.arange(1.0, 131.0)[:, None].expand(130, 5)
    parts = [shard(entries(shape)[0], lambda _: table, shape, tp_rank=r, tp_size=4)[:, 0].tolist() for r in range(4)]
    assert parts[1] == list(range(65, 129))
    assert parts[2] == [129, 130] + [0] * 62
    assert parts[3] == [0] * 64


def test_slices_only_what_the_rank_needs() -> None:
    """A rank that reads whole tensors to keep a quarter of them."""
    shape = tiny_shape()

    class Counting:
        def __init__(self, name: str) -> None:
            self.tensor = torch.zeros(sources[name])

        def __getitem__(self, index: Any) -> torch.Tensor:
            taken.append(self.tensor[index].numel())
            return self.tensor[index]

    for entry in entries(shape):
        taken: list[int] = []
        sources = entry.tensors
        local = shard(entry, Counting, shape, tp_rank=0, tp_size=2)
        assert sum(taken) <= local.numel()


# ------------------------------------------------------------------------------------------------ loading


def test_load_shards_casts_and_ties(tmp_path: Path) -> None:
    """A bf16 source read as something else, a tied output layer left at random on the last stage, another stage's
    tensors asked for."""
    save_model(tmp_path, "llama-tied")
    tensors = {k: v.bfloat16() for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shape = read_shape(tmp_path)
    last_stage = {
        OUTPUT: torch.full((padded_vocab(shape) // 2, 32), 7.0),
        "decoder.layers.1.mlp.linear_fc2.weight": torch.nn.Parameter(torch.zeros(32, 24)),
    }
    with HFReader(tmp_path) as reader:
        load_shards(last_stage, reader=reader, shape=shape, tp_rank=1, tp_size=2)
    assert torch.equal(last_stage[OUTPUT][:253], tensors[HF_EMBEDDING][256:].float())
    assert torch.equal(last_stage[OUTPUT][253:], torch.zeros(3, 32))
    fc2 = tensors["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(last_stage["decoder.layers.1.mlp.linear_fc2.weight"], fc2[:, 24:].float())
    assert last_stage[OUTPUT].dtype == torch.float32


def test_load_shards_asserts_on_our_bugs(llama_dir: Path) -> None:
    """A parameter of the model that the table does not know stays at its random initial value."""
    shape = read_shape(llama_dir)
    with HFReader(llama_dir) as reader:
        with pytest.raises(AssertionError, match="no_such"):
            load_shards({"no_such": torch.zeros(1)}, reader=reader, shape=shape, tp_rank=0, tp_size=1)
        with pytest.raises(AssertionError, match="is to be filled by"):
            load_shards({EMBEDDING: torch.zeros(509, 32)}, reader=reader, shape=shape, tp_rank=0, tp_size=1)


def rewrite(directory: Path, **changes: torch.Tensor | None) -> str:
    """Replace (or, with None, remove) tensors of a saved model; what check_accounted then says."""
    file = directory / "model.safetensors"
    tensors = {name: t for name, t in {**load_file(file), **changes}.items() if t is not None}
    save_file(tensors, file, metadata={"format": "pt"})
    with HFReader(directory) as reader, pytest.raises(UserError) as caught:
        check_accounted(reader, read_shape(directory))
    return str(caught.value)


def test_every_tensor_is_accounted_for(llama_dir: Path) -> None:
    """A tensor ignored (a bias, an adapter, a score head), missing, or of other sizes than config.json says."""
    norm = "model.layers.0.input_layernorm.weight"
    assert f"1 missing: {norm}" in rewrite(llama_dir, **{norm: None})
    biases = {f"model.layers.{i}.self_attn.{x}_proj.bias": torch.zeros(32) for i in range(2) for x in "qkvo"}
    message = rewrite(llama_dir, **{norm: torch.zeros(31)}, **biases)
    assert f"1 of the wrong shape: {norm} (expected [32], found [31])" in message
    assert "8 not part of a llama model: model.layers.0.self_attn.k_proj.bias" in message
    assert "... and 3 more; " in message
    assert "(I8)" in rewrite(llama_dir, **{norm: torch.zeros(32, dtype=torch.int8)}, **dict.fromkeys(biases))


def test_what_may_be_there_besides(tmp_path: Path) -> None:
    """Old files refused for their rotary buffers, or a tied model for repeating its embedding; and an lm_head of its
    own thrown away because config.json says tied."""
    save_model(tmp_path, "llama-tied")
    file, shape = tmp_path / "model.safetensors", read_shape(tmp_path)
    tensors = load_file(file)
    extra = {HF_OUTPUT: tensors[HF_EMBEDDING].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file({**tensors, **extra}, file)
    with HFReader(tmp_path) as reader:
        check_accounted(reader, shape)
    extra[HF_OUTPUT][-1, -1] += 1
    assert "tie_word_embeddings=true, but lm_head.weight differs" in rewrite(tmp_path, **extra)


def test_layers_for_further_tokens_are_passed_over(tmp_path: Path) -> None:
    """DeepSeek-V3's files refused for the layer after the last that config.json announces, or one accepted that it does
    not."""
    save_model(tmp_path, "deepseek_v3")
    file, further = tmp_path / "model.safetensors", {"model.layers.2.eh_proj.weight": torch.zeros(2)}
    save_file({**load_file(file), **further}, file, metadata={"format": "pt"})
    with HFReader(tmp_path) as reader:
        check_accounted(reader, read_shape(tmp_path))
        with pytest.raises(UserError, match=r"1 not part of a deepseek_v3 model: model\.layers\.2\.eh_proj\.weight"):
            check_accounted(reader, replace(read_shape(tmp_path), further_layers=0))


# ------------------------------------------------------------------------------------------------ the whole way


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_we_write(tmp_path: Path, name: str) -> None:
    """An export that transformers cannot open or reads differently: through 2 tensor ranks and 30 kB files, the
    logits must be equal bit for bit."""
    model = save_model(tmp_path / "source", name).eval()
    shape = read_shape(tmp_path / "source")
    with (
        HFReader(tmp_path / "source") as reader,
        HFWriter(tmp_path / "copy", max_shard_bytes=30_000) as writer,
    ):
        for key, tensor in whole_tensors(reader, shape, tp_size=2).items():
            writer.add(key, tensor)
        copy_companions(tmp_path / "source", writer.staging, dtype="float32", head=shape.head)
    copy, info = auto_class(name).from_pretrained(tmp_path / "copy", output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.arange(40).view(2, 20) * 12
    with torch.no_grad():
        assert torch.equal(copy.eval()(tokens).logits, model(tokens).logits)


def test_one_tensor_in_memory_at_a_time(llama_dir: Path) -> None:
    """A loader that holds what it has read until all of it is there: a 70B model would need twice its size of host
    memory. When a tensor is read, those of the parameter before are gone, and the rest exists in the files alone."""
    shape = read_shape(llama_dir)
    params = {entry.name: torch.zeros(entry_size(entry, shape)) for entry in entries(shape)}
    parts_of = {part.tensor: len(entry.parts) for entry in entries(shape) for part in entry.parts}
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    class Watched:
        def __init__(self, name: str) -> None:
            assert len(alive) < parts_of[name]
            self.slices = reader.read(name)

        def __getitem__(self, index: Any) -> torch.Tensor:
            tensor = self.slices[index]
            alive.add(tensor)
            return tensor

    class Source:
        read = staticmethod(Watched)

    with HFReader(llama_dir) as reader:
        load_shards(params, reader=Source(), shape=shape, tp_rank=0, tp_size=1)
    assert not alive
    assert all(tensor.any() for tensor in params.values())


def entry_size(entry: Entry, shape: ModelShape) -> tuple[int, ...]:
    rows = padded_vocab(shape) if entry.split == "vocab" else sum(part.shape[0] for part in entry.parts)
    return rows, *entry.parts[0].shape[1:]
