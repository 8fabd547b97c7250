"""Text to tokens and back, from a checkpoint's own files. No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import tokenizers
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.config_file import read_json_object
from engine.errors import CheckpointError, TokenizerError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# The letters with which byte-level tokenizers (GPT-2's, and most since) write bytes: those that print stand
# for themselves, the others follow from U+0100 on.
_PRINTING = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTING]
_BYTE_OF_LETTER = {chr(byte): byte for byte in _PRINTING} | {
    chr(0x100 + index): byte for index, byte in enumerate(_OTHERS)
}


class Tokenizer:
    """A checkpoint's tokenizer and chat template. Safe to use from several threads."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, chat_template: str | None, special_tokens: dict[str, str]
    ) -> None:
        """special_tokens: what a chat template may name, such as {"bos_token": "<s>"}."""
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        decoder = tokenizer.decoder
        self._is_byte_level = decoder is not None and decoder.decode(["Ġ"]) == " "
        special_ids = {token_id for token_id, token in added.items() if token.special}
        ids = {token_id: token for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
        # Both are looked at for every token of every answer.
        self._text_ids = frozenset(ids.keys() - special_ids)
        self._byte_ids = frozenset(one for one, token in ids.items() if _BYTE_TOKEN.fullmatch(token))
        self._texts: dict[int, str] = {}  # of single tokens, as they are asked for
        self._special_tokens = special_tokens
        self.longest_token_bytes = _longest_token_bytes(tokenizer)
        """Most bytes of a text that one token stands for: so a text that cannot fit is known by its length.
        None where the tokenizer may drop text."""
        self._template = None if chat_template is None else _compile(chat_template)

    @classmethod
    def from_pretrained(cls, path: Path) -> Tokenizer:
        """Read tokenizer.json, and what there is of tokenizer_config.json and chat_template.jinja.

        Raises CheckpointError for files that are missing or damaged.
        """
        tokenizer_path = path / "tokenizer.json"
        read_json_object(tokenizer_path)  # for its messages: those of `tokenizers` do not name the file
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_path))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise CheckpointError(f"{tokenizer_path} is not a tokenizer that can be read: {error}") from error
        # Lengths are the caller's business: a prompt is never cut or filled up in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config_path = path / "tokenizer_config.json"
        config = read_json_object(config_path) if config_path.exists() else {}
        return cls(tokenizer, _chat_template(path, config), _special_tokens(config))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Tokens of a plain prompt, with what the tokenizer puts around one (BOS). Raises TokenizerError."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Tokens of a conversation up to where the next answer begins, by the checkpoint's chat template.

        messages: {"role": ..., "content": ...} each. Raises TokenizerError if there is no template or it
        refuses them.
        """
        if self._template is None:
            raise TokenizerError("this model has no chat template: send a plain prompt instead of messages")
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise TokenizerError(f"the model's chat template refuses these messages: {error}") from error
        # The template writes BOS itself where the model wants one.
        return self._encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def decode_one(self, token_id: int) -> str:
        """`decode` of one token, which is looked up after the first time."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode((token_id,))
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for in the middle of a text; perhaps only a part of a character.

        Special tokens are written out; an id that the tokenizer does not have stands for nothing.
        """
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level and _BYTE_OF_LETTER.keys() >= set(token):
            return bytes(_BYTE_OF_LETTER[letter] for letter in token)
        if self.is_byte(token_id):
            return bytes([int(token[3:5], 16)])
        # After another word: at the beginning of a text many decoders drop a leading space.
        decoder = self._tokenizer.decoder
        return token.encode() if decoder is None else decoder.decode(["a", token]).removeprefix("a").encode()

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text; parts of characters become U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def detokenizer(self) -> Detokenizer:
        """For one answer that arrives token by token."""
        return Detokenizer(self)

    def is_skipped(self, token_id: int) -> bool:
        """Whether `decode` passes over a token: a special one, or one that the tokenizer does not have."""
        return token_id not in self._text_ids

    def is_byte(self, token_id: int) -> bool:
        """Whether a token stands for a single byte (byte fallback) rather than for text."""
        return token_id in self._byte_ids

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode: {error}") from error
        # A batch of one: unlike `encode`, it lets other threads run meanwhile.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


class Detokenizer:
    """Turns one answer's tokens into text as they come: pushes and flush together are `decode` of all tokens.

    What a token means depends on its neighbours (a leading space, the bytes of one character), so each push
    decodes a window that begins at the last text that went out, and holds back what a later token may still
    change.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        # The window's first tokens, whose text has gone out already and is there only as context.
        self._num_sent = 0
        self._sent = ""

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; often one word, sometimes nothing."""
        if self._tokenizer.is_skipped(token_id):
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        # A trailing U+FFFD may be the beginning of a character; a run of byte tokens is judged as a whole.
        if len(text) <= len(self._sent) or text.endswith(_REPLACEMENT) or self._tokenizer.is_byte(token_id):
            return ""
        new = text[len(self._sent) :]
        self._window = self._window[self._num_sent :]
        self._num_sent = len(self._window)
        tokenizer, window = self._tokenizer, self._window
        self._sent = tokenizer.decode_one(window[0]) if len(window) == 1 else tokenizer.decode(window)
        return new

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        return self._tokenizer.decode(self._window)[len(self._sent) :]


def _longest_token_bytes(tokenizer: tokenizers.Tokenizer) -> int | None:
    """None unless every byte of a text is sure to be part of some token, as in byte-level tokenizers."""
    added = tokenizer.get_added_tokens_decoder().values()
    swallows = any(token.lstrip or token.rstrip for token in added)  # any number of blanks around it
    byte_level = isinstance(tokenizer.decoder, tokenizers.decoders.ByteLevel)
    if swallows or not byte_level or tokenizer.normalizer is not None:
        return None
    return max(len(token.encode()) for token in tokenizer.get_vocab(with_added_tokens=True))


def _compile(source: str) -> jinja2.Template:
    """In transformers' environment for templates, sandboxed: a checkpoint's template is somebody's code."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise CheckpointError(f"the checkpoint's chat template is not valid: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    """Unlike jinja2's own filter, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except ValueError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    template = config.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'}: chat_template is {type(template).__name__}; it must be a text"
        )
    return template


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and their like, each given as a text or as {"content": text}."""
    tokens = {}
    for key, value in config.items():
        if key.endswith("_token"):
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                tokens[key] = text
    return tokens
