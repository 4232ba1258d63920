"""Chat templates, which turn messages into text: the Jinja template of a published folder, or LLaDA's own.

A template comes with a model, from whoever published that model, so it is not trusted: it runs in Jinja's sandbox and
can use what Hugging Face gives to a template and nothing else. The text that the user wrote is kept apart from the
text that the template wrote (see `render_marked`).
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llada_jax.config import UserError
from llada_jax.text.json_files import read_object, read_text

# The files are searched in this order; the first one that has a template is used.
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
FILES = (*TEMPLATE_FILES, "special_tokens_map.json")
# The usual roles of messages. Any other role counts as the template's own text only if the template names it.
_ROLES = frozenset("system user assistant tool function developer observation ipython environment model".split())
_MARKS = range(0xF0000, 0x10FFFE)  # private-use characters, which hardly any text contains


def find_source(files: Mapping[str, bytes]) -> str | None:
    """Returns the chat template in a tokenizer's files, or None if they have none.

    If a file has several named templates, this is the one named "default".

    Raises:
      UserError: If a file cannot be read, or its chat template is not a string. The message names the file.
    """
    for name in TEMPLATE_FILES:
        if name not in files:
            continue
        is_template = name.endswith(".jinja")
        found = read_text(files[name], name) if is_template else read_object(files[name], name).get("chat_template")
        if isinstance(found, list):
            named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
            found = named.get("default", named)
        if found is not None and not isinstance(found, str):
            raise UserError(f"{name}: chat_template must be a string, or a list of templates with one named default")
        if found is not None:
            return found
    return None


def special_tokens(files: Mapping[str, bytes], named: Mapping[str, str]) -> dict[str, Any]:
    """Returns the variables that a template gets beside the messages: bos_token, eos_token and so on.

    Args:
      files: The tokenizer's files, name -> content.
      named: Role -> literal, for the tokens that the tokenizer itself names. If the files name another literal for the
        same role, the files win.

    Returns:
      Name of the variable -> literal (a list of literals for additional_special_tokens).

    Raises:
      UserError: If a file cannot be read or has an unusual form. The message names the file.
    """
    found: dict[str, Any] = {f"{role}_token": literal for role, literal in named.items()}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_object(files.get(name, b"{}"), name).items():
            value = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(value, str):
                found[key] = value
            elif key == "additional_special_tokens" and isinstance(value, list):
                found[key] = [token.get("content") if isinstance(token, dict) else token for token in value]
                if not all(isinstance(token, str) for token in found[key]):
                    raise UserError(f"{name}: {key} must be a list of strings, or of objects whose content is a string")
    return found


def default_source(bos: str, start_header: str, end_header: str, eot: str) -> str:
    """Returns LLaDA's own template with these literals.

    Unlike the published template, it writes the header of the answer only if add_generation_prompt is true.
    """
    bos, start, end, eot = (json.dumps(text, ensure_ascii=False) for text in (bos, start_header, end_header, eot))
    return (
        f"{{{{ {bos} }}}}"
        "{% for message in messages %}"
        f"{{{{ {start} + message['role'] + {end} + '\\n\\n' + message['content'] | trim + {eot} }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {start} + 'assistant' + {end} + '\\n\\n' }}}}{{% endif %}}"
    )


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Checks that these are messages, each with a "role" and a "content" that are strings.

    Raises:
      UserError: If they are not, or if a message contains a value that JSON cannot hold.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UserError('a chat is a list of messages, each of the form {"role": "user", "content": "..."}')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f'message {i} of the chat must have the form {{"role": ..., "content": ...}}')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UserError(
                    f'message {i} of the chat needs a "{key}" that is a string, not {message.get(key)!r:.100}'
                )
        if (kind := _odd_kind(dict(message))) is not None:
            raise UserError(f"message {i} of the chat contains a {kind}: use only values that JSON can hold")


def _odd_kind(value: Any) -> str | None:
    """Returns the name of a type in a message that JSON does not have, or None if there is none."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            return "key that is not a string"
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next(filter(None, map(_odd_kind, value)), None)
    return None if value is None or isinstance(value, str | int | float) else type(value).__name__


def render(
    source: str, variables: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> str:
    """Returns the text of a chat.

    Args:
      source: The Jinja source of the template.
      variables: The template's other variables, from `special_tokens`.
      messages: The messages of the chat.
      add_generation_prompt: Whether the header of the assistant's answer follows. Some templates ignore it.

    Raises:
      UserError: If the template has a mistake, does what the sandbox forbids, or refuses these messages.
    """
    try:
        return _compiled(source).render(
            **{"tools": None, "documents": None, **variables},
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # an expression in the template may raise any exception, not only Jinja's
        raise UserError(f"the chat template fails: {' '.join(str(error).split())[:200]}") from error


def render_marked(
    source: str,
    render_text: Callable[[Sequence[Mapping[str, Any]]], str],
    messages: Sequence[Mapping[str, Any]],
    literals: Sequence[str],
) -> tuple[str, dict[int, str]]:
    """Returns the text of a chat in which no control token comes from the messages, not even in part.

    Before the template sees the messages, every character of theirs that occurs in the literal of a control token is
    replaced by a mark: a private-use character that occurs nowhere in the chat. With the marks turned back into the
    characters they stand for, the template's output must equal the text of the unchanged messages.

    A template that looks for words of its own in a message (for example "</think>") does not find them between marks,
    and its output differs. The messages are then rendered again with fewer marks: first only for characters that begin
    a literal, then only for the first characters of whole literals. The template must write the same control tokens as
    with all marks.

    The usual roles, and the roles and keys that the template itself names, count as the template's own text. They are
    not marked.

    Args:
      source: The Jinja source of the template.
      render_text: The function that turns messages into text.
      messages: The messages from the user.
      literals: The literals of all control tokens.

    Returns:
      The text with marks, and a table with which str.translate turns the marks back into the original characters.

    Raises:
      UserError: If a role contains a control token, or if the template may take a control token from a message.
    """
    pattern = re.compile("|".join(map(re.escape, sorted(literals, key=len, reverse=True))))
    for message in messages:
        if pattern.search(message["role"]):
            raise UserError(f"the role {message['role']!r:.100} contains a control token: use another role")
    plain = render_text(messages)
    taken = set(plain).union(*_texts(messages))
    free = (chr(i) for i in _MARKS if chr(i) not in taken)
    marks = {ord(character): next(free, "") for character in sorted(set().union(*literals))}
    back = {ord(mark): chr(character) for character, mark in marks.items() if mark}
    firsts = {ord(literal[0]): marks[ord(literal[0])] for literal in literals}
    changes = (
        lambda text: text.translate(marks),
        lambda text: text.translate(firsts),
        lambda text: pattern.sub(lambda found: marks[ord(found[0][0])] + found[0][1:], text),
    )
    wanted = None  # the control tokens that the template writes when all characters are marked
    for change in changes if len(back) == len(marks) else ():
        marked = render_text([_marked(message, change, source) for message in messages])
        found = pattern.findall(marked)
        wanted = found if wanted is None else wanted
        if marked.translate(back) == plain and found == wanted:
            return marked, back
    raise UserError("the chat template takes a control token, or part of one, from a message: remove it there")


def _marked(message: Mapping[str, Any], change: Callable[[str], str], source: str) -> dict[str, Any]:
    """Returns the message with the strings in its values and keys changed, except those that are the template's own."""
    result = {}
    for key, value in message.items():
        own_role = key == "role" and (value in _ROLES or _names(source, value))
        result[key] = value if own_role else _mapped(value, change, lambda name: _names(source, name))
    return result


def _names(source: str, name: str) -> bool:
    """Returns whether a template names this role or key, in quotes or after a dot."""
    return re.search(rf"""(['"]){re.escape(name)}\1|\.{re.escape(name)}(?!\w)""", source) is not None


def _mapped(value: Any, change: Callable[[str], str], own_key: Callable[[str], bool]) -> Any:
    """Returns the value with all strings in it changed, except the keys that are the template's own."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key if not isinstance(key, str) or own_key(key) else change(key): _mapped(each, change, own_key)
            for key, each in value.items()
        }
    return [_mapped(each, change, own_key) for each in value] if isinstance(value, list | tuple) else value


def _texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns all strings in the messages, including keys."""
    found: list[str] = []
    _mapped([dict(message) for message in messages], lambda text: found.append(text) or text, lambda _: False)
    return found


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """Compiles a template with the settings and functions that Hugging Face uses."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks an answer for training tools. Here only its body counts."""

        tags = {"generation"}  # noqa: RUF012 (Jinja requires it as a class attribute)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
