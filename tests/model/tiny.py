"""Tiny random models with their own small tokenizers, made in a second, for tests of model/ and train/."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from preceptor.core.records import Message, Row

TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "系统：你是一位医生。<record>\n主诉：发热3天，咳嗽，无胸痛。\n</record>",
    '{"diseases": ["肺炎"], "reason": ["发热3天", "咳嗽"]}',
    "The patient has had a fever for 3 days with a dry cough; no chest pain.",
    "system user assistant diagnosis record answer: pneumonia, influenza, gastritis",
]


def tokenizer(named: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens whose template is written in the manner of Qwen's.

    `named` are the turn marks that the tokenizer itself lists, beside those that its file marks as special.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS * 3, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(named),
    )
    made.chat_template = TEMPLATE
    return made


def qwen(seed: int = 0, *, tied: bool = True, hidden: int = 32) -> Qwen3ForCausalLM:
    """A random Qwen3 of two layers."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=400,
            hidden_size=hidden,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=tied,
            max_position_embeddings=512,
            initializer_range=0.15,
            bos_token_id=None,
            eos_token_id=0,
        )
    ).eval()


def llama(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of two layers, its head apart from its embedding."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=0.15,
            bos_token_id=None,
            eos_token_id=0,
        )
    ).eval()


def save(model: PreTrainedModel, folder: Path, words: PreTrainedTokenizerBase | None = None) -> Path:
    """An ordinary model folder."""
    model.save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"]
    return folder


def row(number: int = 0, *, record: str = "", answer: str = "") -> Row:
    """A training row; the defaults differ in text and length by `number`."""
    record = record or f"主诉：发热{number}天，咳嗽。" + "The patient has a fever. " * (number % 5)
    answer = answer or f'{{"diseases": ["肺炎{number}"], "reason": ["发热{number}天"]}}'
    return Row(id=f"r{number}", messages=messages(record), answer=answer, case_id=f"c{number}")


def messages(record: str) -> tuple[Message, ...]:
    """A prompt with a record in it."""
    return (
        Message(role="system", content="[act: diagnosis] 你是一位医生。"),
        Message(role="user", content=f"Name the diseases.\n<record>\n{record}\n</record>\nAnswer in JSON."),
    )
