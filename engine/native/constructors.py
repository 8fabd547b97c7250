"""Writes down the constructors that dataclasses have, in the copy of the sources that is compiled.

The compiler leaves them to `dataclasses`, which makes Python functions of them that set one attribute after
the other through descriptors: a tenth of a microsecond becomes a whole one, for objects that a simulation
makes by the hundred for each request.
"""

from __future__ import annotations

import ast

_OPTIONS = {"frozen", "slots", "eq", "order"}
"""Of `dataclass`, that leave its constructor as it is."""


def with_constructors(source: str) -> str:
    """The same module with an `__init__` for every dataclass that has none and no field of a special kind.
    Each takes one line that was blank, so that all others keep their numbers."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and _is_plain_dataclass(node):
            fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
            place = fields[-1].end_lineno if fields else None
            while place is not None and place < len(lines) and lines[place].strip():
                place += 1  # a docstring of the field
            if place is None or any(map(_is_special, fields)):
                continue
            if place == len(lines):
                lines.append("")
            post = any(isinstance(one, ast.FunctionDef) and one.name == "__post_init__" for one in node.body)
            lines[place] = " " * fields[0].col_offset + _constructor(fields, post)
    return "\n".join(lines) + "\n"


def _is_plain_dataclass(node: ast.ClassDef) -> bool:
    if node.bases or node.keywords or len(node.decorator_list) != 1:
        return False
    if any(isinstance(one, ast.FunctionDef) and one.name == "__init__" for one in node.body):
        return False
    decorator = node.decorator_list[0]
    options = set()
    if isinstance(decorator, ast.Call):
        options = {keyword.arg for keyword in decorator.keywords}
        decorator = decorator.func
    return isinstance(decorator, ast.Name) and decorator.id == "dataclass" and options <= _OPTIONS


def _is_special(field: ast.AnnAssign) -> bool:
    """Has its default made anew for each object, say, or is no field at all."""
    kind = ast.unparse(field.annotation)
    return isinstance(field.value, ast.Call) or "ClassVar" in kind or "InitVar" in kind


def _constructor(fields: list[ast.AnnAssign], post: bool) -> str:
    parameters, statements = ["self"], []
    for field in fields:
        name = ast.unparse(field.target)
        default = "" if field.value is None else f" = {ast.unparse(field.value)}"
        parameters.append(f"{name}: {ast.unparse(field.annotation)}{default}")
        statements.append(f"self.{name} = {name}")
    if post:
        statements.append("self.__post_init__()")
    # In the eyes of the type checker attributes of a frozen class are never set.
    return f"def __init__({', '.join(parameters)}) -> None: {'; '.join(statements)}  # type: ignore"
