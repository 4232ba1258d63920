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
_MARKS = range(0xF0000, 0x10FFFE)  # characters for private use, of which nearly all texts have none


def find_source(files: Mapping[str, bytes]) -> str | None:
    """The chat template in a tokenizer's files (of several named ones "default"), None if there is none.

    Raises UserError if what stands in its place is no template.
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
                found[key] = [token["content"] if isinstance(token, dict) else token for token in value]
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
    render_text: Callable[[Sequence[Mapping[str, Any]]], str],
    messages: Sequence[Mapping[str, Any]],
    literals: re.Pattern[str],
    first_characters: set[str],
) -> tuple[str, dict[int, str]]:
    """The text of a chat in which no literal of a control token stems from the messages.

    Before the template sees them, characters of the messages that a literal could begin with are replaced by ones
    that occur nowhere. A template that looks for such characters itself (as for "</think>") would then write something
    else; it is given the messages with only the whole literals broken up.

    Args:
      render_text: messages to text.
      messages: from the user.
      literals: matches those of the control tokens.
      first_characters: of these.

    Returns:
      The text, and a table for str.translate that gives it back its true characters.

    Raises UserError: a role that holds a control token, or a template to which literals in a message mean something.
    """
    for message in messages:
        if literals.search(message["role"]):
            raise UserError(f"the role {message['role']!r:.100} holds a control token")
    plain = render_text(messages)
    taken = set(plain).union(*_texts(messages))
    free = (chr(i) for i in _MARKS if chr(i) not in taken)
    table = {ord(character): next(free, "") for character in sorted(first_characters)}
    back = {ord(mark): chr(character) for character, mark in table.items() if mark}
    if len(back) == len(table):
        for protect in (
            lambda text: text.translate(table),
            lambda text: literals.sub(lambda found: table[ord(found[0][0])] + found[0][1:], text),
        ):
            protected = [{k: v if k == "role" else _mapped(v, protect) for k, v in m.items()} for m in messages]
            marked = plain if protected == messages else render_text(protected)
            if marked.translate(back) == plain:
                return marked, back
    raise UserError("the chat template reads control tokens out of a message: take their literals out of it")


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with all texts in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(each, change) for key, each in value.items()}
    return [_mapped(each, change) for each in value] if isinstance(value, list | tuple) else value


def _texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    found: list[str] = []
    _mapped([dict(message) for message in messages], lambda text: found.append(text) or text)
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
