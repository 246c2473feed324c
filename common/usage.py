"""`--help` of a script: its arguments in the sections of its source; what a preset sets beside the paper's values."""

import ast
import dataclasses
import inspect
import shlex
import textwrap
from typing import Annotated, get_type_hints

import tyro


def described(args_class: type) -> dict[str, tuple[str, str]]:
    """Section and text of each argument.

    Its section is the comment that stands alone above it, or above others of its class before it, where it is first
    declared; its text is that of the class that had the last word.
    """
    found = {}
    for cls in filter(dataclasses.is_dataclass, reversed(args_class.__mro__)):
        source = textwrap.dedent(inspect.getsource(cls))
        titles = [(i, line[6:]) for i, line in enumerate(source.splitlines(), 1) if line.startswith("    # ")]
        body = ast.parse(source).body[0].body
        for field, text in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                section = next((title for i, title in reversed(titles) if i < field.lineno), "")
                words = " ".join(ast.literal_eval(text.value).split())
                found[field.target.id] = found.get(field.target.id, (section,))[0], words
    return found


def flag_of(name: str) -> str:
    """An argument's name as it is typed: "--align-steps"."""
    return "--" + {"go_on": "continue"}.get(name, name).replace("_", "-")


def flag(name: str, value) -> list[str]:
    """An argument as it is typed, word by word."""
    typed = flag_of(name)
    if isinstance(value, bool):
        return [typed if value else f"--no-{typed[2:]}"]
    return [typed, *map(str, value if isinstance(value, tuple | list) else [value])]


def shown(name: str, value) -> str:
    """The value alone as it is typed; of what is on or off, or without any, that is the whole argument."""
    words = flag(name, value)
    return shlex.join(words[1:] or words)


def unlike(name: str, value, where: str, other) -> str:
    """An argument as it is typed, and in brackets what it is instead somewhere: "--align (now --no-align)"."""
    return f"{shlex.join(flag(name, value))} ({where} {shown(name, other)})"


def of_families(families: dict[str, dict]) -> str:
    """What --help says of what a script sets otherwise for a family of data."""
    flags = {family: [" ".join(flag(*item)) for item in values.items()] for family, values in families.items()}
    lines = [f"    {family}: {', '.join(found)}" for family, found in flags.items()]
    return "\n\nOther defaults for a family of data:\n\n" + "\n".join(lines) if lines else ""


def of_preset(preset: str, changes: dict[str, tuple]) -> str:
    """What --help says of a preset: each argument that it sets, and what it would be without it."""
    lines = [f"    {' '.join(flag(name, now))} ({shown(name, before)})" for name, (now, before) in changes.items()]
    words = f"--preset {preset} sets, and in brackets what it would be without it, the paper's where there is one:"
    return f"\n\n{words}\n\n" + "\n".join(lines) if lines else ""


def show(args_class: type, defaults, changes: dict[str, tuple], description: str) -> None:
    """Print --help with these `defaults`, and end the program. `changes`: see `of_preset`."""
    hints, words, parts = get_type_hints(args_class, include_extras=True), described(args_class), {}
    for field in dataclasses.fields(args_class):
        section, text = words.get(field.name, ("", ""))
        if field.name in changes:
            text += f"; without the preset {shown(field.name, changes[field.name][1])}"
        hint = Annotated[hints[field.name], tyro.conf.arg(help=text)]
        value = dataclasses.field(default=getattr(defaults, field.name))
        parts.setdefault(section, []).append((field.name, hint, value))
    nested = []
    for i, (title, fields) in enumerate(parts.items()):
        part = dataclasses.make_dataclass("Part", fields)
        titled = Annotated[part, tyro.conf.arg(name=title or "other")]
        nested.append((f"part_{i}", titled, dataclasses.field(default_factory=part)))
    whole = tyro.conf.OmitArgPrefixes[dataclasses.make_dataclass("Parts", nested)]
    tyro.cli(whole, args=["--help"], description=description)
