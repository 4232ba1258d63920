"""Chat templates: messages to text, by the Jinja template of a published folder or by LLaDA's own.

A template comes with a model, from whoever published it: it runs in Jinja's sandbox, with what Hugging Face gives
a template and nothing else. What a user wrote is kept apart from what the template wrote (see `render_marked`).
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llada_jax.config import UserError

# In the order in which they are looked into; the first that has a template wins.
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
FILES = (*TEMPLATE_FILES, "special_tokens_map.json")
# Of messages; others are the template's own only where it names them.
_ROLES = frozenset("system user assistant tool function developer observation ipython environment model".split())
_MARKS = range(0xF0000, 0x10FFFE)  # characters for private use, of which nearly all texts have none


def find_source(files: Mapping[str, bytes]) -> str | None:
    """The chat template in a tokenizer's files (of several named ones "default"), None if there is none.

    Raises UserError, which names the file, if what stands in its place is no template.
    """
    for name in TEMPLATE_FILES:
        if name not in files:
            continue
        try:
            text = files[name].decode()
            found = text if name.endswith(".jinja") else json.loads(text).get("chat_template")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{name} cannot be read: {error}") from error
        if isinstance(found, list):
            named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
            found = named.get("default", named)
        if found is not None and not isinstance(found, str):
            raise UserError(f"{name}: chat_template must be a text, or a list of named ones with a default")
        if found is not None:
            return found
    return None


def special_tokens(files: Mapping[str, bytes], named: Mapping[str, str]) -> dict[str, Any]:
    """The variables of a template beside the messages: bos_token and its like, as the tokenizer's files say.

    Args:
      files: the tokenizer's.
      named: role -> literal, where the tokenizer itself knows; the files come first.

    Raises UserError, which names the file, if it does not say that in the usual form.
    """
    found: dict[str, Any] = {f"{role}_token": literal for role, literal in named.items()}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            items = json.loads(files.get(name, b"{}")).items()
        except (ValueError, AttributeError) as error:
            raise UserError(f"{name} cannot be read: {error}") from error
        for key, value in items:
            value = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(value, str):
                found[key] = value
            elif key == "additional_special_tokens" and isinstance(value, list):
                found[key] = [token.get("content") if isinstance(token, dict) else token for token in value]
                if not all(isinstance(token, str) for token in found[key]):
                    raise UserError(f"{name}: {key} must be a list of texts, or of objects with a text content")
    return found


def default_source(bos: str, start_header: str, end_header: str, eot: str) -> str:
    """LLaDA's own template with these literals; unlike the published one it heeds add_generation_prompt."""
    bos, start, end, eot = (json.dumps(text, ensure_ascii=False) for text in (bos, start_header, end_header, eot))
    return (
        f"{{{{ {bos} }}}}"
        "{% for message in messages %}"
        f"{{{{ {start} + message['role'] + {end} + '\\n\\n' + message['content'] | trim + {eot} }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {start} + 'assistant' + {end} + '\\n\\n' }}}}{{% endif %}}"
    )


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """UserError unless these are messages, each with a text "role" and a text "content"."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UserError('a chat is a list of messages, {"role": "user", "content": "..."} each')
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f'message {i} of the chat must be {{"role": ..., "content": ...}}')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UserError(f'message {i} of the chat needs a text "{key}", it has {message.get(key)!r:.100}')
        if (kind := _odd_kind(dict(message))) is not None:
            raise UserError(f"message {i} of the chat holds a {kind}: only what JSON has can be in it")


def _odd_kind(value: Any) -> str | None:
    """The name of a type in a message that JSON does not have, None if there is none."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            return "key that is no text"
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next(filter(None, map(_odd_kind, value)), None)
    return None if value is None or isinstance(value, str | int | float) else type(value).__name__


def render(
    source: str, variables: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> str:
    """The text of a chat.

    Args:
      source: the template.
      variables: from `special_tokens`.
      messages: from the user.
      add_generation_prompt: whether the header of the assistant's answer follows, where the template heeds it.

    Raises UserError: the template has a mistake, leaves the sandbox, or refuses these messages.
    """
    try:
        return _compiled(source).render(
            **{"tools": None, "documents": None, **variables},
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # of Jinja's kinds and of any that an expression of the template may raise
        raise UserError(f"the chat template fails: {' '.join(str(error).split())[:200]}") from error


def render_marked(
    source: str,
    render_text: Callable[[Sequence[Mapping[str, Any]]], str],
    messages: Sequence[Mapping[str, Any]],
    literals: Sequence[str],
) -> tuple[str, dict[int, str]]:
    """The text of a chat in which no literal of a control token stems from the messages, not even in part.

    Before the template sees them, all characters of the messages that occur in a literal are replaced by ones that
    occur nowhere; what the template makes of that must be the chat's own text but for these. A template that looks
    for words of its own (as for "</think>") does something else then. It is given the messages with just the
    beginnings of literals replaced, and must write the same control tokens as before. Roles and keys that the
    template itself names are its own, and so are the common roles: they are left as they are.

    Args:
      source: of the template.
      render_text: messages to text.
      messages: from the user.
      literals: those of the control tokens.

    Returns:
      The text, and a table for str.translate that gives it back its true characters.

    Raises UserError: a role that holds a control token, or a chat of which this cannot be shown.
    """
    pattern = re.compile("|".join(map(re.escape, sorted(literals, key=len, reverse=True))))
    for message in messages:
        if pattern.search(message["role"]):
            raise UserError(f"the role {message['role']!r:.100} holds a control token")
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
    wanted = None  # the control tokens that the template writes
    for change in changes if len(back) == len(marks) else ():
        marked = render_text([_marked(message, change, source) for message in messages])
        found = pattern.findall(marked)
        wanted = found if wanted is None else wanted
        if marked.translate(back) == plain and found == wanted:
            return marked, back
    raise UserError("the chat template reads control tokens out of a message, or parts of them: take them out of it")


def _marked(message: Mapping[str, Any], change: Callable[[str], str], source: str) -> dict[str, Any]:
    """The message with its texts changed, those in its values and keys; what is the template's stays."""
    result = {}
    for key, value in message.items():
        own_role = key == "role" and (value in _ROLES or _names(source, value))
        result[key] = value if own_role else _mapped(value, change, lambda name: _names(source, name))
    return result


def _names(source: str, name: str) -> bool:
    """Whether a template names this role or key, in quotes or after a dot."""
    return re.search(rf"""(['"]){re.escape(name)}\1|\.{re.escape(name)}(?!\w)""", source) is not None


def _mapped(value: Any, change: Callable[[str], str], own_key: Callable[[str], bool]) -> Any:
    """The value with all texts in it changed, but for the keys that are the template's own."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key if not isinstance(key, str) or own_key(key) else change(key): _mapped(each, change, own_key)
            for key, each in value.items()
        }
    return [_mapped(each, change, own_key) for each in value] if isinstance(value, list | tuple) else value


def _texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """All texts in the messages, keys too."""
    found: list[str] = []
    _mapped([dict(message) for message in messages], lambda text: found.append(text) or text, lambda _: False)
    return found


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """The template as Hugging Face would compile it."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}: marks an answer in training tools, is just its body here."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja has it)

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
