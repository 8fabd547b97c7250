"""The public HTTP interface as an OpenAPI 3.1 document: request bodies as the router reads them
(openai_protocol.py), answers as it writes them, and every status that there is."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from router.openai_protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

_Schema = dict[str, Any]

_ERRORS = {
    "400": "The request cannot be served as it is; `param` names the field.",
    "401": "A key is needed (`authorization: Bearer KEY`), or this one is none.",
    "404": "There is no such model.",
    "408": "The answer was not read in time.",
    "413": "The body is too large.",
    "429": "Too much at the moment; `Retry-After` says when to come again.",
    "503": "There are no workers for it at the moment.",
    "504": "It took too long.",
}
_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}


def _is(kind: str, **properties: _Schema) -> _Schema:
    found: _Schema = {"type": kind}
    if properties:
        found |= {"properties": properties, "required": list(properties)}
    return found


def _list_of(item: _Schema) -> _Schema:
    return {"type": "array", "items": item}


_TEXT, _NUMBER, _WHOLE, _OBJECT = _is("string"), _is("number"), _is("integer"), _is("object")
_USAGE = _is("object", prompt_tokens=_WHOLE, completion_tokens=_WHOLE, total_tokens=_WHOLE)
_MODEL = _is("object", id=_TEXT, object=_TEXT, created=_WHOLE, owned_by=_TEXT, max_model_len=_WHOLE)
_TOKENS = _is("object", tokens=_list_of(_WHOLE), count=_WHOLE, max_model_len=_WHOLE)
_OR_NOTHING: _Schema = {"type": ["string", "null"]}
_ERROR = _is("object", error=_is("object", message=_TEXT, type=_TEXT, param=_OR_NOTHING, code=_OR_NOTHING))
_ANSWER = {
    kind: _is(
        "object",
        id=_TEXT,
        object={"const": kind},
        created=_WHOLE,
        model=_TEXT,
        choices=_list_of(_is("object", index=_WHOLE, finish_reason={"enum": ["stop", "length"]}, **content)),
        usage=_USAGE,
    )
    for kind, content in (
        ("text_completion", {"text": _TEXT}),
        ("chat.completion", {"message": _is("object", role=_TEXT, content=_TEXT)}),
    )
}


def openapi() -> dict[str, Any]:
    """The document, as JSON has it."""
    kinds = [(body, "validation") for body in _BODIES.values()]
    _, schemas = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    name = {"name": "model", "in": "path", "required": True, "schema": _TEXT}
    unavailable = _content("There are no workers.", _is("object", status=_TEXT, workers=_OBJECT))
    answers = {path: _ANSWER[kind] for path, kind in _KINDS.items()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "prelay",
            "version": version("prelay"),
            "description": "OpenAI-compatible. Fields that are not listed are ignored, or refused by name if "
            "they would change the answer.",
        },
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
        "paths": {
            **{path: {"post": _generation(path, answer)} for path, answer in answers.items()},
            "/tokenize": {"post": _call("/tokenize", _TOKENS)},
            "/detokenize": {"post": _call("/detokenize", _is("object", prompt=_TEXT))},
            "/v1/models": {"get": {"responses": _responses(_is("object", data=_list_of(_MODEL)), "401")}},
            "/v1/models/{model}": {
                "parameters": [name],
                "get": {"responses": _responses(_MODEL, "401", "404")},
            },
            "/health": {
                "get": {
                    "security": [],
                    "responses": {
                        **_responses(_is("object", status=_TEXT, workers=_OBJECT)),
                        "503": unavailable,
                    },
                }
            },
            "/version": {"get": {"security": [], "responses": _responses(_is("object", version=_TEXT))}},
        },
    }


_KINDS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat.completion"}


def _call(path: str, answer: _Schema) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{_BODIES[path].__name__}"}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": _responses(answer, "400", "401", "404", "413"),
    }


def _generation(path: str, answer: _Schema) -> dict[str, Any]:
    call = _call(path, answer)
    call["responses"] = _responses(answer, *_ERRORS)
    call["responses"]["200"]["content"]["text/event-stream"] = {"schema": _TEXT}
    return call


def _responses(answer: _Schema, *errors: str) -> dict[str, Any]:
    refused = {"$ref": "#/components/schemas/Error"}
    return {"200": _content("Done.", answer), **{code: _content(_ERRORS[code], refused) for code in errors}}


def _content(description: str, schema: _Schema) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
