"""A small untrained model with a tokenizer of its own: where the embedded student `mini` begins."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

END = "<|im_end|>"
PAD = "<|endoftext|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Spaces don't part tokens, but marks, digits and lines do: what is said often between commas, a phrase of the record
# or a disease's name, becomes one token, the same wherever it stands. (Tokens across words: SuperBPE, Liu et al. 2025.)
_PIECES = r" for (?=\p{N})|[A-Za-z\p{Han}](?:(?! for \p{N})[A-Za-z\p{Han} '\-])*|\p{N}|\n+|[^A-Za-z\p{Han}\p{N}\n]+"
_LEAST = 300
"""Times that two neighbours must have met to become one token: what is said by chance stays apart."""


def tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens, learnt from `texts`, with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, "<|im_start|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=_LEAST,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def fresh(texts: Iterable[str], out: Path, *, vocabulary: int, hidden: int, layers: int, seed: int) -> None:
    """Writes an untrained Qwen3 of `layers` layers of width `hidden`, and its tokenizer, to the folder `out`."""
    words = tokenizer(texts, vocabulary)
    heads = hidden // 32
    config = Qwen3Config(
        vocab_size=-(-len(words) // 64) * 64,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        initializer_range=hidden**-0.5,
        tie_word_embeddings=True,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(out)
    words.save_pretrained(out)
