"""The storyteller's tokenizer and chat template: made from the corpus, saved in Hugging Face format."""

import json
from collections.abc import Iterable
from pathlib import Path

from corpus import BOS, EOS, ROLE_MARKERS, SPECIAL_TOKENS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    f"{ROLE_MARKERS['assistant']}{{{{ message['content'] | trim }}}}{{{{ eos_token }}}}"
    "{% elif message['role'] == 'system' %}"
    f"{ROLE_MARKERS['system']}{{{{ message['content'] | trim }}}}"
    "{% else %}"
    f"{ROLE_MARKERS['user']}{{{{ message['content'] | trim }}}}"
    "{% endif %}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{ROLE_MARKERS['assistant']}{{% endif %}}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (digits one by one) that puts BOS in front of a plain text by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_and_eos(tokenizer)[0])]
    )
    return tokenizer


def bos_and_eos(tokenizer: Tokenizer) -> tuple[int, int]:
    """Their ids, which the order of ``SPECIAL_TOKENS`` fixes."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    if bos is None or eos is None:
        raise ValueError(f"the tokenizer lacks {BOS!r} or {EOS!r}; train it with train_tokenizer()")
    return bos, eos


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "extra_special_tokens": list(ROLE_MARKERS.values()),
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
