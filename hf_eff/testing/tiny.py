"""Toy model, tokenizer and pools for tests: small enough that a training step takes milliseconds."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer of 262 entries, made without any file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=512
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS[3:]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(layers: int = 4, width: int = 64, **changes: Any) -> Any:
    """Configuration of a Llama with ``layers`` layers of ``width``."""
    from transformers import LlamaConfig

    options = {
        "vocab_size": 262,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**options, **changes})


def tiny_model(layers: int = 4, width: int = 64, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Random Llama of ``layers`` layers and ``width`` units; equal seeds give equal weights."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # noqa: TID251 - inside a fork: transformers' init has no generator argument
        return LlamaForCausalLM(tiny_config(layers, width, **changes)).eval()


def addition_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompt and completion of ``count`` sums."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = generator.randrange(100), generator.randrange(100)
        rows.append({"prompt": f"What is {a} + {b}?", "completion": f" {a + b}", "source": "sum"})
    return rows


def spelling_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompt and completion of ``count`` words to reverse."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        word = "".join(generator.choice("abcdefgh") for _ in range(generator.randrange(3, 9)))
        rows.append({"prompt": f"Reverse {word}:", "completion": f" {word[::-1]}", "source": "reverse"})
    return rows


def tiny_pool(count: int = 32, seed: int = 0) -> Dataset:
    """Prompt-completion rows of two sources, shuffled; columns prompt, completion, source."""
    from datasets import Dataset

    rows = addition_rows(count - count // 2, seed) + spelling_rows(count // 2, seed)
    random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows)


def tiny_target(count: int = 8, seed: int = 1) -> Dataset:
    """Rows of the ``sum`` source that are not in ``tiny_pool`` of another seed by construction of the seed."""
    from datasets import Dataset

    return Dataset.from_list(addition_rows(count, seed + 1000))


def tokenised(rows: Dataset, tokenizer: PreTrainedTokenizerFast | None = None, max_length: int = 64) -> Dataset:
    """Rows as ``input_ids`` and ``labels`` with the prompt masked, ready for a plain ``Trainer``."""
    from datasets import Dataset

    tokenizer = tokenizer or tiny_tokenizer()

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        ids = (prompt + answer)[:max_length]
        rest = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
        return {**rest, "input_ids": ids, "labels": ([-100] * len(prompt) + answer)[:max_length]}

    return Dataset.from_list([encode(row) for row in rows])  # map would hash the tokenizer first


def collator(tokenizer: PreTrainedTokenizerFast | None = None) -> Any:
    """Pads ``input_ids`` and ``labels`` to the longest row of the batch."""
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(tokenizer or tiny_tokenizer(), padding=True, label_pad_token_id=-100)
