"""Fields of OpenAI requests beyond those that are served: which are refused, which are harmless, which are
unknown.

A field that would change the answer and is not supported is refused by name, unless its value asks for
nothing. Fields that do not change the answer are accepted. What nobody has heard of (many clients send vendor
fields) is ignored, and logged once per name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from router.errors import InvalidRequestError

MAX_LOGGED_FIELDS = 1000
"""Names remembered as logged; clients choose them, so there must be an end."""

_log = logging.getLogger(__name__)


def _one_of(*neutral: Any) -> Callable[[Any], bool]:
    # 0 == False in Python, but not in a request: `priority: false` is not the neutral 0.
    return lambda value: any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral
    )


# By name: whether a value of it (null apart) asks for nothing.
UNSUPPORTED: Mapping[str, Callable[[Any], bool]] = {
    "tools": _one_of([]),
    "tool_choice": _one_of("none"),
    "functions": _one_of([]),
    "function_call": _one_of("none"),
    "response_format": _one_of({"type": "text"}),
    "top_logprobs": _one_of(0),  # of chat only
    "length_penalty": _one_of(1),
    "typical_p": _one_of(1),
    "best_of": _one_of(1),
    "use_beam_search": _one_of(False),
    "suffix": _one_of(""),
    "modalities": _one_of(["text"]),
    "audio": _one_of(),
    "prediction": _one_of(),
    "reasoning_effort": _one_of("none"),
    "web_search_options": _one_of(),
    "guided_json": _one_of(),
    "guided_regex": _one_of(""),
    "guided_choice": _one_of([]),
    "guided_grammar": _one_of(""),
    "structured_outputs": _one_of({}),
    "bad_words": _one_of([]),
    "include_stop_str_in_output": _one_of(False),
    "skip_special_tokens": _one_of(True),
    "add_generation_prompt": _one_of(True),
    "continue_final_message": _one_of(False),
    "chat_template": _one_of(),
    "chat_template_kwargs": _one_of({}),
    "documents": _one_of([]),
    "truncate_prompt_tokens": _one_of(),
    "prompt_embeds": _one_of(),
    "priority": _one_of(0),
}

HARMLESS = frozenset(
    {
        "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
        "prompt_cache_key", "prompt_cache_retention", "verbosity",
    }
)  # fmt: skip


class FieldWatch:
    """Judges the fields that the request models do not know."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def check(self, extra: Mapping[str, Any]) -> None:
        """Raises InvalidRequestError for an unsupported field that asks for something."""
        for name, value in extra.items():
            asks_for_nothing = UNSUPPORTED.get(name)
            if asks_for_nothing is not None:
                if value is not None and not asks_for_nothing(value):
                    raise InvalidRequestError(f"{name} is not supported by this server; leave it out", name)
            elif name not in HARMLESS and name not in self._logged and len(self._logged) < MAX_LOGGED_FIELDS:
                self._logged.add(name)
                _log.info("event=unknown_field_ignored name=%r", name[:80])
