"""Completes prompts or fills them in: python -m llada_jax.sample --model=DIR --prompt="..."

The program prints the continuation, cut at EOS, to stdout. If the prompt has [MASK] in it, it prints the whole text
with the masks filled in. Everything else goes to stderr. --prompts=FILE.jsonl (lines {"prompt": "..."}) with
--output=FILE completes many prompts at once. --save_html=FILE and --save_gif=FILE keep how the texts appeared.
"""

import sys
import time
from pathlib import Path

from absl import flags

from llada_jax.cli import entry_point, model_flags, outputs, paths, sampler_flags, streams
from llada_jax.config import UserError

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(sampler_flags)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A text to continue, or to fill in at [MASK]. May be repeated.")
_PROMPTS = paths.define("prompts", None, 'A JSONL file with one {"prompt": "..."} per line.')
_OUTPUT = paths.define(
    "output", None, 'A JSONL file that is written instead of stdout: the lines of --prompts with "completion" added.'
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "The number of prompts per batch. It does not change the completions."
)
_SHOW = flags.DEFINE_boolean("show", False, "Draw in the terminal how the text appears.")
_SAVE_HTML = paths.define("save_html", None, "A page (.html) to write that replays how the texts appeared.")
_SAVE_GIF = paths.define("save_gif", None, "A moving picture (.gif) to write of how the texts appeared; needs Pillow.")


def main() -> None:
    """Samples as the flags say. Mistakes that can be found without the model are reported before it is loaded."""
    with entry_point.importing():
        import jax

        from llada_jax.formats.workdir import trained_length
        from llada_jax.loading import load_with_tokenizer
        from llada_jax.sampling import keeping, lengths, terminal
        from llada_jax.sampling.drawing import complete_drawn
        from llada_jax.sampling.prompt_files import read_records, write_records
        from llada_jax.sampling.recording import Recorder
        from llada_jax.sampling.settings import check_settings
        from llada_jax.sampling.text_completion import DEFAULTS, Options, complete
        from llada_jax.text.json_files import check_unicode

    settings = sampler_flags.given()
    seed = settings.pop("seed", 0)
    if settings.get("length", lengths.FIXED) != lengths.FIXED:
        settings.setdefault("gen_length", lengths.AUTO)
    if settings.get("gen_length") == lengths.AUTO:
        settings = lengths.automatic(settings, lengths.automatic_limit(trained_length(model_flags.model())))
    options = Options(**settings)
    check_settings(options.sampler(0, DEFAULTS.gen_length if options.gen_length is None else options.gen_length))
    if _BATCH_SIZE.value < 1:
        raise UserError(f"--batch_size={_BATCH_SIZE.value}: it must be at least 1")
    for text in _PROMPT.value:
        check_unicode(text, f"--prompt={text!r:.60}")
    records = [{"prompt": text} for text in _PROMPT.value]
    if _PROMPTS.value is not None:
        records += read_records(Path(_PROMPTS.value))
    if not records:
        raise UserError('nothing to complete: give --prompt="..." or --prompts=FILE.jsonl')
    output = None if _OUTPUT.value is None else outputs.check_file(_OUTPUT.value)
    if output is None:
        streams.require_stdout("pass --output=FILE")
    kept = keeping.check({"save_html": _SAVE_HTML.value, "save_gif": _SAVE_GIF.value}, output, len(records))

    model, tokenizer = load_with_tokenizer(
        model_flags.model(), step=model_flags.STEP.value, weights=model_flags.WEIGHTS.value
    )
    texts, key = [record["prompt"] for record in records], jax.random.key(seed)
    shown = _SHOW.value and terminal.can_draw(sys.stderr)
    if _SHOW.value and not shown:
        print("--show: nothing is drawn, because stderr is not a terminal that can be redrawn", file=sys.stderr)
    recorder = Recorder(model, tokenizer, texts, options) if kept else None
    if shown:
        completions = complete_drawn(model, tokenizer, texts, options, key, recorder)
    else:
        started, report = time.monotonic(), _report(len(texts))
        if recorder is None:
            completions = complete(model, tokenizer, texts, options, key, _BATCH_SIZE.value, report)
        else:
            completions = recorder.complete(key, _BATCH_SIZE.value, report)
        print(f"{len(texts)} completed in {time.monotonic() - started:.1f} s", file=sys.stderr)

    if output is not None:
        pairs = zip(records, completions, strict=True)
        write_records(output, [record | {"completion": text} for record, text in pairs])
    elif not (shown and sys.stdout.isatty()):  # on a terminal the drawn text is there already
        for text in completions:
            print(text)
    if recorder is not None:
        named = {"model": _model_name(), "seed": seed}
        keeping.write(kept, [recorder.records[i] for i in range(len(texts))], named)


def _model_name() -> str:
    name = str(model_flags.model())
    return name if model_flags.STEP.value is None else f"{name}, step {model_flags.STEP.value}"


def _report(total: int):
    def report(done: int) -> None:
        if total > _BATCH_SIZE.value:
            print(f"{done} of {total}", file=sys.stderr)

    return report


if __name__ == "__main__":
    entry_point.run(main)
