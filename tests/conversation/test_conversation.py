import dataclasses
import shutil

import jax
import numpy as np
import pytest

import llada_jax
from llada_jax.config import UserError
from llada_jax.conversation import conversation
from llada_jax.conversation.conversation import Conversation, Settings
from llada_jax.model.transformer import merge, split
from llada_jax.sampling import text_completion
from llada_jax.text.tokenizer import load_tokenizer

SHORT = Settings(gen_length=12, block_length=4, temperature=0.9, seed=5)
COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if event.endswith("backend_compile_duration") else None
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def with_end(model, eos_id):
    """Returns a copy of the model with another token as EOS."""
    changed = merge(*split(model))
    changed.config = dataclasses.replace(model.config, eos_id=eos_id)
    return changed


def answered(talk):
    *_, last = talk.answer()
    assert last.done
    return talk.messages[-1]["content"]


def plain(model, tokenizer, messages, settings, turn, attempt):
    """Returns the answer and its ids from the sampler alone.

    The padding differs, the sampler does not stop at the end, and the answer is cut afterwards.
    """
    ids = np.asarray(tokenizer.encode_chat(messages), np.int32)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), turn), attempt)
    config = settings.sampler(0, settings.gen_length)
    prompt_BT = np.pad(ids[None], ((0, 0), (150 - len(ids), 0)))  # one length, so it compiles only once
    tokens_BT = llada_jax.generate(model, prompt_BT, config, key, np.arange(150)[None] >= 150 - len(ids))
    tokens_T = np.asarray(tokens_BT)[0, 150 - len(ids) :]
    prompt = text_completion.Prompt(ids, 0, settings.gen_length)
    return text_completion.finished_text(tokens_T, prompt, model, tokenizer), tokens_T[len(ids) :]


def test_answers_are_those_of_the_sampler_on_the_whole_chat(loaded):
    model, tokenizer = loaded
    talk = Conversation(*loaded, SHORT)
    talk.instruct("Be brief. <|eot_id|>")
    talk.say("def main")
    first = answered(talk)
    assert talk.messages == [{"role": "system", "content": "Be brief. <|eot_id|>"}, user("def main"), assistant(first)]
    assert first == plain(*loaded, talk.messages[:2], SHORT, turn=1, attempt=0)[0]
    talk.say("and then?")
    second = answered(talk)
    assert second == plain(*loaded, talk.messages[:4], SHORT, turn=2, attempt=0)[0]
    again = answered(talk)
    assert again == plain(*loaded, talk.messages[:4], SHORT, turn=2, attempt=1)[0] != second
    assert [message["role"] for message in talk.messages] == ["system", *["user", "assistant"] * 2]
    talk.instruct("")
    other = answered(talk)  # the message is the same, so the rejected answers must not come back
    assert other == plain(*loaded, talk.messages[:3], SHORT, turn=2, attempt=2)[0]
    # A literal in a user's text is not an end of turn. Only the template writes those, one for each message.
    talk.instruct("Be brief. <|eot_id|>")
    ids = tokenizer.encode_chat(talk.messages[:4])
    assert talk.length() == len(ids) + 12 and ids.count(tokenizer.eot_id) == 4


def test_an_answer_stops_at_its_end(loaded):
    model, tokenizer = loaded
    settings = dataclasses.replace(SHORT, gen_length=24)
    for text in ("def main", "import jax", "return", "class", "assert x", "the model", "for i in", "a", "b", "c"):
        _, ids_T = plain(*loaded, [user(text)], settings, turn=1, attempt=0)
        end = next((i for i in range(5, 8) if ids_T[i] not in ids_T[:i]), None)  # in the second of six blocks
        if end is not None:
            break
    ending = with_end(model, int(ids_T[end]))
    talk = Conversation(ending, tokenizer, settings, [user(text)])
    frames = list(talk.answer())
    expected, _ = plain(ending, tokenizer, [user(text)], settings, turn=1, attempt=0)
    assert talk.messages[1:] == [assistant(expected)] and frames[-1].ended
    assert talk.text(frames[-1]) == expected and len(frames[-1].tokens_T) == end
    # Neither the blocks after the end nor the rest of its own block are computed.
    assert frames[-1].step <= 8 and [frame.step for frame in frames] == list(range(len(frames)))
    mask_id = model.config.mask_id
    assert [frame.done for frame in frames] == [not (frame.tokens_T == mask_id).any() for frame in frames]
    for frame in frames:
        assert ids_T[end] not in frame.tokens_T
        assert frame.ended == (len(frame.tokens_T) == end)
        known = frame.tokens_T != mask_id
        np.testing.assert_array_equal(frame.tokens_T[known], ids_T[: len(known)][known])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"length": "append"}, marks=pytest.mark.slow),
        pytest.param({"length": "daedal", "commit": "threshold", "gen_length": 70}, marks=pytest.mark.slow),
        {"revoke": "wino", "commit": "threshold", "commit_bound": 0.02, "revoke_bound": 0.5},
    ],
    ids=["append", "daedal", "wino"],
)
def test_other_rules_of_the_sampler_answer_alike(loaded, changes):
    """What has no place yet is not shown, and an answer is not finished while tokens of it may be taken back."""
    model, tokenizer = loaded
    settings = dataclasses.replace(SHORT, **({"gen_length": 24, "block_length": 8} | changes))
    for text, end in (("def main", None), ("import jax", 5), ("return", 11)):
        talk = Conversation(model, tokenizer, settings, [user(text)])
        frames = list(talk.answer())
        expected, ids_T = plain(model, tokenizer, [user(text)], settings, turn=1, attempt=0)
        assert talk.messages[-1]["content"] == expected and frames[-1].done
        if end:  # as if this token, of the first or of the second block, were the end; other programs for each
            ending = with_end(model, int(ids_T[end]))
            talk = Conversation(ending, tokenizer, settings, [user(text)])
            frames = list(talk.answer())
            assert talk.messages[-1]["content"] == plain(ending, tokenizer, [user(text)], settings, 1, 0)[0]
        if settings.length == "append":
            assert len(frames[0].tokens_T) == 8


def test_a_stopped_answer_leaves_everything_as_it_was(loaded):
    talk = Conversation(*loaded, SHORT, [user("x"), assistant("y")])
    talk.say("def main")
    for frame in talk.answer():
        if frame.step == 3:
            break
    assert talk.messages == [user("x"), assistant("y"), user("def main")]
    first = answered(talk)
    assert first == plain(*loaded, talk.messages[:3], SHORT, turn=2, attempt=1)[0]
    next(talk.answer())
    assert talk.messages[-1] == assistant(first)  # it stays until the next answer is complete
    talk.say("more")
    next(talk.answer())
    talk.say("something else")  # replaces the message that has no answer
    assert talk.messages[3:] == [assistant(first), user("something else")]


@pytest.mark.parametrize(
    "change",
    [
        Conversation.restart,
        Conversation.undo,
        lambda talk: talk.say("other"),
        lambda talk: talk.edit("def main"),
        lambda talk: talk.instruct("Be brief."),
        lambda talk: talk.replace([user("x"), assistant("y")]),
        answered,
    ],
)
@pytest.mark.parametrize("step", [0, 11])
def test_an_answer_to_what_was_changed_meanwhile_is_dropped(loaded, change, step):
    talk = Conversation(*loaded, SHORT, [user("def main")])
    frames = talk.answer()
    while next(frames).step < step:
        pass
    change(talk)
    before = talk.messages
    assert next(frames, None) is None and talk.messages is before


def test_editing_taking_back_and_starting_anew(loaded):
    talk = Conversation(*loaded, SHORT)
    for impossible in (talk.undo, talk.last_message, talk.length, lambda: talk.edit("x"), lambda: next(talk.answer())):
        with pytest.raises(UserError, match="no message yet"):
            impossible()
    talk.say("one")
    one = answered(talk)
    talk.say("two")
    answered(talk)
    talk.edit("three")
    assert talk.messages[2:] == [user("three")] and talk.last_message() == "three"
    assert answered(talk) == plain(*loaded, talk.messages[:3], SHORT, turn=2, attempt=0)[0]
    talk.undo()
    assert talk.messages == [user("one"), assistant(one)]
    talk.instruct("Be kind.")
    assert talk.messages[0] == {"role": "system", "content": "Be kind."} and len(talk.messages) == 3
    talk.instruct("Be quick.")
    talk.restart()
    assert talk.messages == [{"role": "system", "content": "Be quick."}]
    talk.instruct("")
    assert talk.messages == []


def test_an_equal_conversation_has_equal_answers(loaded):
    def talk(seed, temperature):
        talk = Conversation(*loaded, dataclasses.replace(SHORT, seed=seed, temperature=temperature), [user("x")])
        return [answered(talk), answered(talk)]

    assert talk(1, 0.9) == talk(1, 0.9) != talk(2, 0.9)
    assert talk(1, 0.0)[0] == talk(1, 0.0)[1]


def test_most_turns_and_settings_compile_nothing(loaded):
    talk = Conversation(*loaded, dataclasses.replace(SHORT, gen_length=9), [user("def main")])
    answered(talk)
    COMPILED.clear()
    for i in range(4):
        talk.restart()
        talk.say("x" * (5 * i))
        talk.set("temperature", str(0.1 + i))
        talk.set("steps", str(i + 1))
        answered(talk)
    # A prompt of exactly LENGTH_MULTIPLE tokens is padded to the next length.
    texts = ("x" * n for n in range(400))
    exact = next(text for text in texts if len(loaded[1].encode_chat([user(text)])) == text_completion.LENGTH_MULTIPLE)
    talk.restart()
    talk.say(exact[:-1])
    answered(talk)
    assert not COMPILED
    talk.edit(exact)
    answered(talk)
    assert COMPILED, "a prompt of another length must compile another program"
    COMPILED.clear()
    talk.edit(exact + "x")
    answered(talk)
    assert not COMPILED


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("steps", "many", "steps=many: it must be a whole number"),
        ("steps", "0", "steps=0"),
        ("gen_length", "0", "gen_length=0: it must be at least 1"),
        ("gen_length", "1048577", "gen_length=1048577: it must be at least 1 and at most 1,048,576"),
        ("steps", "1" * 200, r"steps=1{48}\.\.\.1{49}: it must be a whole number"),
        ("x" * 200, "1", r"no setting 'x{48}\.\.\.x{49}': choose one of steps, "),
        ("block_length", "-1", "block_length=-1"),
        ("temperature", "hot", "temperature=hot: it must be a number"),
        ("temperature", "nan", "temperature=nan"),
        ("remasking", "best", "choose one of low_confidence, random"),
        ("cfg_scale", "-1", "cfg_scale=-1"),
        ("logits_eos_inf", "perhaps", "it must be on or off"),
        ("seed", "-1", "seed=-1"),
        ("beams", "4", "no setting 'beams': choose one of steps, "),
    ],
)
def test_an_impossible_setting_changes_nothing(loaded, name, text, words):
    talk = Conversation(*loaded, SHORT)
    with pytest.raises(UserError, match=words):
        talk.set(name, text)
    assert talk.settings == SHORT


def test_settings_are_changed_by_what_a_user_types(loaded):
    talk = Conversation(*loaded, SHORT)
    for name, text in {"steps": "7", "temperature": "0.5", "logits_eos_inf": "ON", "cfg_scale": "1"}.items():
        talk.set(name, text)
    assert talk.settings == dataclasses.replace(SHORT, steps=7, temperature=0.5, logits_eos_inf=True, cfg_scale=1.0)
    talk.set("steps", "default")
    assert talk.settings.steps is None
    described = talk.settings.described()
    assert described["steps"] == "one per token" and described["logits_eos_inf"] == "on"
    assert described["commit_bound"] == "that of the rule"
    changed = talk.settings.changed("commit", "threshold").changed("commit_bound", "0.7")
    assert changed.commit_bound == 0.7 and changed.changed("length", "append").changed("length", "default") == changed
    with pytest.raises(UserError, match="commit=.*: it must be a word or the word default"):
        changed.changed("commit", "x" * 10_000)
    assert described["gen_length"] == "12"


def test_what_the_model_cannot_do_is_said_at_the_start(loaded):
    model, tokenizer = loaded
    small = merge(*split(model))
    small.config = dataclasses.replace(model.config, vocab_size=396, mask_id=390, eos_id=391, eot_id=None)
    with pytest.raises(UserError, match="the model's vocabulary is 396: this model cannot converse"):
        Conversation(small, tokenizer, SHORT)
    with pytest.raises(UserError, match="which token is EOS"):
        Conversation(with_end(model, None), tokenizer, dataclasses.replace(SHORT, logits_eos_inf=True))


def test_what_the_template_refuses_changes_nothing(model_folder, loaded, tmp_path):
    for name in ("tokenizer.model", "tokenizer.json"):
        if (model_folder / name).exists():
            shutil.copy(model_folder / name, tmp_path)
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    talk = Conversation(loaded[0], load_tokenizer(tmp_path), SHORT)
    with pytest.raises(UserError, match="no system"):
        talk.instruct("Be brief.")
    talk.say("def main")
    answered(talk)
    before = talk.messages
    with pytest.raises(UserError, match="no system"):
        talk.replace([{"role": "system", "content": "x"}, user("y")])
    assert talk.messages == before and len(before) == 2


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte"),
        MemoryError("Unable to allocate 4. TiB"),  # as raised by NumPy
    ],
)
def test_too_little_memory_is_one_line(loaded, monkeypatch, error):
    def fail(*_):
        raise error
        yield

    talk = Conversation(*loaded, SHORT, [user("x")])
    monkeypatch.setattr(conversation, "denoise_steps", fail)
    with pytest.raises(UserError, match="not enough memory for 76 tokens"):
        next(talk.answer())
    assert talk.messages == [user("x")]
