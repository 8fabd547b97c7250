"""A checkpoint for a router alone, whose tokens say when they were sent.

A token id is a time of the host's monotonic clock, in ticks of 50 us modulo 2**15, and its text is " " and
three letters that say the same. So whoever reads an answer knows, without being told anything else, how many
tokens are in it and how long ago the worker sent each: the clock is one for all processes of the host. Times
above 1.6 s are wrong by a multiple of it.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path

import tokenizers

TICK_S = 50e-6
NUM_STAMPS = 2**15
_FIRST_STAMP = 257
VOCAB_SIZE = _FIRST_STAMP + NUM_STAMPS
EOS = 256
MAX_MODEL_LEN = 4096

_LETTERS = b"abcdefghijklmnopqrstuvwxyz234567"
_WORDS = [bytes(letters) for letters in itertools.product(_LETTERS, repeat=3)]
_STAMP_OF_WORD = {word: stamp for stamp, word in enumerate(_WORDS)}
_WORD = re.compile(rb" ([a-z2-7]{3})")
_TICK_NS = round(TICK_S * 1e9)


def now_ticks() -> int:
    """Of the monotonic clock; not reduced."""
    return time.monotonic_ns() // _TICK_NS


def token_of(ticks: int) -> int:
    """The token that is sent then."""
    return _FIRST_STAMP + ticks % NUM_STAMPS


def age_of_token(token_id: int, ticks: int) -> int:
    """Ticks since it was sent."""
    return (ticks - (token_id - _FIRST_STAMP)) % NUM_STAMPS


def ages_in_text(data: bytes, ticks: int) -> list[int]:
    """Ticks since each of the tokens in a piece of an event stream was sent. No event is cut."""
    stamps = _STAMP_OF_WORD
    return [(ticks - stamps[word]) % NUM_STAMPS for word in _WORD.findall(data)]


def write_checkpoint(path: Path) -> None:
    """Config and tokenizer; there are no weights."""
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2,
        "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": VOCAB_SIZE, "eos_token_id": EOS,
        "max_position_embeddings": MAX_MODEL_LEN, "hidden_act": "silu",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    # GPT-2's letters for bytes: those that print stand for themselves, the others follow from U+0100 on.
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printing]
    vocabulary = {chr(byte): byte for byte in printing}
    vocabulary |= {chr(256 + index): byte for index, byte in enumerate(others)}
    blank = chr(256 + others.index(ord(" ")))
    vocabulary |= {blank + word.decode(): _FIRST_STAMP + stamp for stamp, word in enumerate(_WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={**vocabulary, "</s>": EOS}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
