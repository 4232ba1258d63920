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
from llada_jax.text.chat_messages import odd_kind, strings_of
from llada_jax.text.json_files import read_object, read_text

# The files are searched in this order; the first one that has a template is used.
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json")
FILES = (*TEMPLATE_FILES, "special_tokens_map.json")
# The usual roles of messages. Any other role counts as the template's own text only if the template names it.
_ROLES = frozenset("system user assistant tool function developer observation ipython environment model".split())
# Values of a key "type" that count as the template's own text too, because templates choose by them what they write.
_TYPES = frozenset({"text", "function", "object", "string"})
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")  # finds the tag that marks what a model writes
# Variables of the template that stand at the beginning and at the end of the body of that tag.
GENERATION_BOUNDS = ("generation_begins_here", "generation_ends_here")
_MARKS = range(0xF0000, 0x10FFFE)  # private-use characters, which hardly any text contains


def find_source(files: Mapping[str, bytes], name_of: str = "default") -> str | None:
    """Returns the chat template in a tokenizer's files, or None if they have none.

    If a file has several named templates, this is the one named `name_of`. An unnamed template is the default.

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
            found = named.get(name_of, named if name_of == "default" else None)
        elif name_of != "default":
            found = None
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
        if (kind := odd_kind(dict(message))) is not None:
            raise UserError(f"message {i} of the chat contains a {kind}: use only values that JSON can hold")


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
    render_text: Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], str],
    messages: Sequence[Mapping[str, Any]],
    literals: Sequence[str],
    variables: Mapping[str, Any],
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
    not marked. Variables such as the tools come from the user like the messages.

    Args:
      source: The Jinja source of the template.
      render_text: The function that turns messages and variables into text.
      messages: The messages from the user.
      literals: The literals of all control tokens.
      variables: The variables from the user.

    Returns:
      The text with marks, and a table with which str.translate turns the marks back into the original characters.

    Raises:
      UserError: If a role contains a control token, or if the template may take a control token from a message.
    """
    pattern = re.compile("|".join(map(re.escape, sorted(literals, key=len, reverse=True))))
    for message in messages:
        if pattern.search(message["role"]):
            raise UserError(f"the role {message['role']!r:.100} contains a control token: use another role")
    plain = render_text(messages, variables)
    taken = set(plain).union(*strings_of([dict(variables), *messages]))
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
        chat = [_marked(message, change, source) for message in messages]
        marked = render_text(chat, {name: _of_user(value, change, source) for name, value in variables.items()})
        found = pattern.findall(marked)
        wanted = found if wanted is None else wanted
        if marked.translate(back) == plain and found == wanted:
            return marked, back
    raise UserError("the chat template takes a control token, or part of one, from a message: remove it there")


def _marked(message: Mapping[str, Any], change: Callable[[str], str], source: str) -> dict[str, Any]:
    """Returns the message with the strings in its values and keys changed, except those that are the template's own."""
    result = {key: _of_user(value, change, source) for key, value in message.items()}
    role = message["role"]
    return result | ({"role": role} if role in _ROLES or names(source, role) else {})


@functools.lru_cache(maxsize=1024)
def names(source: str, name: str) -> bool:
    """Returns whether a template names this role or key, in quotes or after a dot."""
    return re.search(rf"""(['"]){re.escape(name)}\1|\.{re.escape(name)}(?!\w)""", source) is not None


def _of_user(value: Any, change: Callable[[str], str], source: str) -> Any:
    """Returns the value with all strings in it changed, except the keys and types that are the template's own."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            key if not isinstance(key, str) or names(source, key) else change(key): each
            if key == "type" and isinstance(each, str) and (each in _TYPES or names(source, each))
            else _of_user(each, change, source)
            for key, each in value.items()
        }
    return [_of_user(each, change, source) for each in value] if isinstance(value, list | tuple) else value


@functools.lru_cache(maxsize=8)
def takes_only_parts(source: str) -> bool:
    """Returns whether a template writes the content of a message only if it is a list of parts, not if it is a text."""
    probe = "content of a message"
    for content, wanted in ((probe, False), ([{"type": "text", "text": probe}], True)):
        try:
            message = {"role": "user", "content": content}
            if probe in render(source, {"bos_token": "", "eos_token": ""}, [message], True):
                return wanted
        except UserError:
            continue
    return False


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """Compiles a template with the settings and functions that Hugging Face uses."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks an answer. The variables at its bounds are usually empty."""

        tags = {"generation"}  # noqa: RUF012 (Jinja requires it as a class attribute)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (
                jinja2.nodes.Output([jinja2.nodes.Name(name, "load", lineno=line)], lineno=line)
                for name in GENERATION_BOUNDS
            )
            return jinja2.nodes.Scope([begin, *body, end], lineno=line)

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
