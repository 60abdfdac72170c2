"""Hugging Face networks from a configuration: dicts in, ``ModelOutput`` out, nothing downloaded."""

from typing import Any

import torch
from torch import Tensor

from .specimen import ROWS, Built, library, specimen

TRANSFORMERS = ("transformers",)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
RATES = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
WORDS, LENGTH = 50, 6


def words() -> Tensor:
    return torch.randint(1, WORDS, (ROWS, LENGTH))


def configured(kind: str, attention: str, **options: Any) -> Any:
    config = getattr(library("transformers"), kind)(**options)
    config._attn_implementation = attention
    return config


def _bert(attention: str) -> Any:
    options = {"vocab_size": WORDS, "max_position_embeddings": 16, "initializer_range": 0.5, **SIZES, **RATES}
    config = configured("BertConfig", attention, **options)
    return library("transformers").BertForSequenceClassification(config)


@specimen(draws=8, note="BERT, attention written out", requires=TRANSFORMERS)
def bert_eager() -> Built:
    return _bert("eager"), {"input_ids": words(), "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long)}


@specimen(draws=8, note="BERT by scaled_dot_product_attention, without a mask", requires=TRANSFORMERS)
def bert_sdpa() -> Built:
    return _bert("sdpa"), {"input_ids": words()}


@specimen(draws=8, note="BERT with padded rows: its mask decides branches", requires=TRANSFORMERS)
def bert_padded() -> Built:
    mask = (torch.arange(LENGTH) < torch.tensor([[6], [4], [3], [6]])).long()
    return _bert("sdpa"), {"input_ids": words(), "attention_mask": mask}


@specimen(draws=7, note="a vision transformer", requires=TRANSFORMERS)
def vit_sdpa() -> Built:
    options = {"image_size": 16, "patch_size": 8, "initializer_range": 0.5, **SIZES, **RATES}
    config = configured("ViTConfig", "sdpa", **options)
    return library("transformers").ViTForImageClassification(config), {"pixel_values": torch.randn(ROWS, 3, 16, 16)}


def _gpt2(attention: str) -> Any:
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    options = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "initializer_range": 0.5}
    config = configured("GPT2Config", attention, vocab_size=WORDS, use_cache=False, **ids, **options)
    return library("transformers").GPT2LMHeadModel(config)


@specimen(draws=7, note="GPT-2, the next word", requires=TRANSFORMERS, output=lambda result: result.logits[:, -1])
def gpt2_sdpa() -> Built:
    return _gpt2("sdpa"), {"input_ids": words()}


@specimen(draws=7, note="GPT-2, the logits of every position", requires=TRANSFORMERS, output="logits")
def gpt2_eager() -> Built:
    return _gpt2("eager"), {"input_ids": words()}
