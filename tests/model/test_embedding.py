"""The embedding against plain indexing: values, gradients, where they go, and what memory a step with them takes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig

from rpo_megatron.config import ParallelConfig
from rpo_megatron.distributed import start, stop
from rpo_megatron.model.embedding import use_row_gradients
from tests.model.memory import last_number, needs_peaks


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    start(ParallelConfig())
    yield
    stop()


def embedding(dtype: torch.dtype, *, first_word: int) -> VocabParallelEmbedding:
    """Of 8 words, from `first_word` on."""
    config = TransformerConfig(
        num_layers=1, hidden_size=4, num_attention_heads=1, use_cpu_initialization=True, params_dtype=dtype
    )
    tp = start(ParallelConfig()).tp
    module = VocabParallelEmbedding(8, 4, init_method=torch.nn.init.normal_, config=config, tp_group=tp.group)
    module.vocab_start_index = first_word
    use_row_gradients(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first_word", [0, 3])
def test_equals_indexing(dtype: torch.dtype, first_word: int) -> None:
    """Catches a word that occurs twice and is counted once, words of another tensor rank's shard that get a value or
    give a gradient, and gradients summed in bf16."""
    module, word_1T = embedding(dtype, first_word=first_word), torch.tensor([[3, 5, 3, 9, 0, 5, 3]])
    grad_1TH = torch.randn(1, 7, 4, dtype=dtype)
    own_1T = (word_1T >= first_word) & (word_1T < first_word + 8)
    found = module(word_1T)
    table = torch.nn.functional.pad(module.weight.detach().float(), (0, 0, first_word, 10)).requires_grad_()
    expected = table[word_1T] * own_1T[..., None]
    assert torch.equal(found.float(), expected)
    expected.backward(grad_1TH.float())
    assert table.grad is not None
    wanted_VH = table.grad[first_word : first_word + 8]

    found.backward(grad_1TH)  # without a buffer of megatron's: where tests and plain torch look for it
    torch.testing.assert_close(module.weight.grad, wanted_VH.to(dtype), rtol=0, atol=0)

    module.weight.grad, module.weight.main_grad = None, torch.ones(8, 4)
    module(word_1T).backward(grad_1TH)
    torch.testing.assert_close(module.weight.main_grad, 1 + wanted_VH)
    assert module.weight.grad_added_to_main_grad
    assert module.weight.grad is not None, "megatron's hook, with parallel.overlap, asks for one"
    assert module.weight.grad.is_sparse, "and should not have to make room for it"


MEMORY = """
from pathlib import Path
from rpo_megatron.config import OptimizerConfig, ParallelConfig
from rpo_megatron.distributed import start, stop
from rpo_megatron.training.optimizer import build_optimizer
from tools.bench import ours
from tools.bench.common import Data, Size, write_config
size = Size(vocab=131072, hidden=64, layers=1, heads=2, kv_heads=2, ffn=64)
write_config(Path(sys.argv[1]), size)
trainer = ours.Trainer.of(ours.load(Path(sys.argv[1]), start(ParallelConfig())), ours.SFT)
optimizer = build_optimizer(OptimizerConfig(lr=1e-3), trainer.model, "fp32")
groups = Data(groups=1, responses=2, prompt=4, shortest=2, longest=2).make(vocab=size.vocab)
def run():
    trainer.step(groups)
    optimizer.step()
run()  # libraries and the optimizer's moments
print(Peak.start().of(run))
stop()
"""


@needs_peaks
def test_a_step_makes_nothing_as_large_as_the_weights(tmp_path: Path) -> None:
    """Catches a dense gradient of the embedding, gradients that one rank sends to itself, and an update with
    temporaries: the first alone is 32 MiB here, the others 64."""
    assert last_number(MEMORY, str(tmp_path)) < 16, "MiB; the logits of its 4 tokens take 2"
