"""Folders with a tokenizer and a chat template."""

import json

import tokenizers

# The chat template in LLaDA-8B's tokenizer_config.json. It always writes the header of the assistant's answer.
PUBLISHED = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
SPECIAL = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL += ["<|eot_id|>", "<|user|>", "<|assistant|>"]
TEXTS = [
    "Hello",
    "  What is 1 < 2?\n\n ",
    "a [list] of <b>html</b> <|not_special|> <| |>",
    "</think> x <think>",
    "",
    "ends with <|eot_id",
    "|> begins with",
    "\u00e9\U0001f600\uf8ff\U000f0000\U000f0001",
]


def make_folder(folder, template=None, files=None):
    """Writes a byte-level tokenizer with LLaDA's special tokens, and `template` in its tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([" ".join(TEXTS), PUBLISHED] * 3, trainer)
    model.add_special_tokens(SPECIAL)
    model.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|startoftext|>", "eos_token": {"content": "<|endoftext|>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in (files or {}).items():
        (folder / name).write_text(content)
    return folder
