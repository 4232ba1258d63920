"""Makes LLaDA a model of lm-evaluation-harness: `import llada_jax.evaluation.harness` registers it as "llada_jax".

    lm_eval.simple_evaluate(model="llada_jax", model_args="pretrained=runs/mine,mc_samples=64", tasks=["arc_easy"])
    lm_eval.simple_evaluate(model=llada_jax.evaluation.harness.LLaDA(model, tokenizer=tokenizer), tasks=["arc_easy"])

The likelihood of an answer is the bound of Eq. 6. An answer counts as the greedy one if low-confidence generation with
one token per step gives exactly this answer. Of a causal model, both are exact.

Results are written to lm_eval's request cache portion by portion, and all noise depends only on the seed and on the
content of a request. Therefore an evaluation that was interrupted and continued gives the same figures as an
uninterrupted one.

In a run of several processes every process makes the same calls, and the rows are spread over the mesh inside these
calls. To lm_eval each process therefore looks like the only one.
"""

import collections
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from llada_jax import loading
from llada_jax.cli import paths
from llada_jax.config import UserError
from llada_jax.devices import distributed
from llada_jax.evaluation import generation
from llada_jax.evaluation.pairs import CONTROL, END, Encoder
from llada_jax.formats import workdir
from llada_jax.model.transformer import Transformer
from llada_jax.sampling import lengths
from llada_jax.sampling.text_completion import Options, complete_ids
from llada_jax.scoring import likelihood
from llada_jax.scoring.next_token import exact
from llada_jax.text.tokenizer import Tokenizer

# Without this, lm_eval's bootstrap would fork this process, and the threads of JAX do not survive a fork.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

MC_SAMPLES = 128  # Monte Carlo samples per likelihood of a masked diffusion model
BATCH_SIZE = 8  # the number of prompts that are completed together
LIKELIHOOD_PORTION = 256  # the number of requests that are scored between two writes to the cache
GENERATION_PORTION = 4  # the number of batches that are generated between two writes to the cache
_CACHE_PART = 500  # the number of results that are sent to the other processes in one message
_PLACE = "\ufdd1"  # a Unicode noncharacter: a placeholder for the content of a message


@register_model("llada_jax")
class LLaDA(TemplateLM):
    """A LLaDA model with the interface that lm_eval expects.

    Args:
      pretrained: A folder as `llada_jax.load` takes it, or a model that `llada_jax.load` has returned.
      tokenizer: The tokenizer, if `pretrained` is a model and not a folder.
      model: Another name for `pretrained`.
      step: The step of a checkpoint in a training workdir. None means the newest checkpoint.
      dtype, weights: As in `llada_jax.load`.
      mesh: The mesh as in `llada_jax.load`.
      mc_samples: The number of Monte Carlo samples per likelihood. Short answers, always those of one token, are
        scored exactly instead, see `scoring.likelihood.log_likelihoods`.
      cfg_scale: The guidance scale w of Eq. 16, for likelihoods and for generation.
      gen_length: The number of tokens to generate. None means the number that the task sets, or 256 if it sets none;
        "auto" means the same with length="append", or with the length that is given; "fixed" contradicts it.
      length, steps, block_length, temperature, top_k, top_p, remasking, commit, commit_bound, cache, cache_refresh,
        suffix_window, revoke, revoke_bound, logits_eos_inf, confidence_eos_eot_inf: Settings of generation, see
        `sampling.text_completion.Options`. A temperature of None means the temperature that the task sets.
      max_length: The largest number of tokens of prompt and answer together. A longer prompt loses its beginning. None
        means the length that the model was trained with if `pretrained` is a folder, and no limit if that length is
        unknown or if `pretrained` is a model.
      seed: The seed of the noise.
      batch_size: The number of prompts that are completed together. None or "auto" means 8. Likelihoods are batched by
        their number of tokens instead.
      max_batch_size, device: Arguments that lm_eval passes. They are not used, because the mesh determines the devices
        and the batches.

    Raises:
      UserError: If the folder has no model or no tokenizer, or if a setting is out of range.
    """

    def __init__(
        self,
        pretrained: str | Path | Transformer | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        model: str | Path | Transformer | None = None,
        step: int | None = None,
        dtype: str | None = None,
        weights: str | None = None,
        mesh: jax.sharding.Mesh | None = None,
        mc_samples: int = MC_SAMPLES,
        cfg_scale: float = 0.0,
        gen_length: int | str | None = None,
        length: str | None = None,
        steps: int | None = None,
        block_length: int | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        remasking: str = "low_confidence",
        commit: str = "schedule",
        commit_bound: float | None = None,
        cache: str = "none",
        cache_refresh: int = 0,
        suffix_window: int = 0,
        revoke: str = "none",
        revoke_bound: float | None = None,
        logits_eos_inf: bool = False,
        confidence_eos_eot_inf: bool = False,
        max_length: int | None = None,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        source = pretrained if pretrained is not None else model
        if source is None:
            raise UserError("pretrained=DIR is missing: pass a training workdir, or a folder with a published model")
        if isinstance(source, str | Path):
            source = paths.expanded(source)
            self.model, self.tokenizer = loading.load_with_tokenizer(source, mesh, dtype, step, weights)
            self.max_length = workdir.trained_length(source) if max_length is None else max_length
        else:
            if tokenizer is None:
                raise UserError("tokenizer is missing: give the model's tokenizer together with the model")
            self.model, self.tokenizer, self.max_length = source, tokenizer, max_length
        self.batch_size = BATCH_SIZE if batch_size in (None, "auto") else int(batch_size)
        if self.batch_size < 1 or mc_samples < 1 or (self.max_length or 1) < 1:
            raise UserError(
                f"batch_size={batch_size}, mc_samples={mc_samples}, max_length={max_length}: each must be at least 1"
            )
        given = {name: x for name, x in (("gen_length", gen_length), ("length", length)) if x is not None}
        given = lengths.automatic(given, None)
        gen_length, length = given.get("gen_length"), given.get("length")
        if self.model.config.causal and mc_samples != MC_SAMPLES:
            raise UserError(
                f"mc_samples={mc_samples}: this model is causal, so its likelihoods are exact: leave it out"
            )
        self.mc_samples, self.gen_length, self.temperature = mc_samples, gen_length, temperature
        self.options = Options(
            length=length,
            steps=steps,
            top_k=top_k,
            top_p=top_p,
            remasking=remasking,
            commit=commit,
            commit_bound=commit_bound,
            cache=cache,
            cache_refresh=cache_refresh,
            suffix_window=suffix_window,
            revoke=revoke,
            revoke_bound=revoke_bound,
            cfg_scale=cfg_scale,
            logits_eos_inf=logits_eos_inf,
            confidence_eos_eot_inf=confidence_eos_eot_inf,
            **({} if block_length is None else {"block_length": block_length}),
        )
        self._control = self.tokenizer.control_pattern
        self._encoder = Encoder(self.tokenizer)
        self.key = jax.random.key(seed)
        self.ignored: set[str] = set()  # settings of tasks that were already reported as not used
        self.asked = False  # whether lm_eval has asked for anything yet

    # The methods and properties that lm_eval calls.

    @property
    def eot_token_id(self) -> int:
        """Returns the id of the token that ends a text."""
        return self.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        """Returns a name that lets lm_eval's caches distinguish tokenizers and chat templates."""
        template = hashlib.sha256(str(self.chat_template(True)).encode()).hexdigest()
        return f"llada_jax-{self.tokenizer.sha256[:16]}-{template[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the source of the folder's (default) chat template, or of LLaDA's own if the folder has none.

        The result is None if `chat_template` is false. Raises UserError if it is the name of a template.
        """
        if isinstance(chat_template, str):
            raise UserError(f"apply_chat_template={chat_template}: a template cannot be chosen by name, pass True")
        return (self.tokenizer.chat_template or self.tokenizer.default_chat_template) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders the dialogue as one text, with CONTROL in front of each control token that the template writes.

        Without `add_generation_prompt` the last message, which is the assistant's, is not closed, so that it can be
        continued. END separates what the template writes from what was begun.
        """
        if add_generation_prompt:
            return self._render(chat_history) + END
        *earlier, last = chat_history
        if earlier:
            return self._render(earlier) + END + last["content"]
        start, _, _ = self._render([last | {"content": _PLACE}], False).partition(_PLACE)
        return start + END + last["content"]

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text, back = self.tokenizer.marked_chat(messages, add_generation_prompt)
        return self._control.sub(lambda found: CONTROL + found[0], text).translate(back)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Encodes a text. Literals of control tokens are encoded as plain text unless they follow CONTROL.

        The ids that the tokenizer puts in front of every text are put in front of a text that is not a rendered chat.
        With `add_special_tokens` False they are put nowhere.
        """
        return self._encoder.text(string, add_special_tokens is not False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns for each (context, continuation) its log-likelihood in nats, and whether it is the greedy one."""
        self.asked = True
        encoded = [(request.args, *self._encode_pair(*request.args)) for request in requests]
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Returns the ids of a prompt and of its answer, see `pairs.Encoder.pair`."""
        return self._encoder.pair(context, continuation)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        self._tell_cut(sum(len(p) < len(given[1]) for (p, _), given in zip(pairs, requests, strict=True)))
        if count := sum(len(a) < len(given[2]) for (_, a), given in zip(pairs, requests, strict=True)):
            distributed.log(f"{count} answers lose their beginning: they alone pass {self.max_length} tokens")

        def score(portion: Sequence[int], report: Callable[[int], None]) -> list[tuple[float, bool]]:
            some, scale = [pairs[i] for i in portion], self.options.cfg_scale
            if self.model.config.causal:
                return exact(self.model, some, scale, None, report)
            scores = likelihood.log_likelihoods(
                self.model, some, samples=self.mc_samples, key=self.key, cfg_scale=scale, report=report
            )
            greedy = likelihood.greedy_matches(self.model, some, cfg_scale=scale)
            return [(float(s.value), bool(match)) for s, match in zip(scores, greedy, strict=True)]

        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        given = [strings for strings, _, _ in requests]
        return self._in_portions("loglikelihood", given, [order], LIKELIHOOD_PORTION, score, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood in nats of whole texts, scored in windows with the tokens before as the prompt."""
        self.asked = True
        documents = [self.tok_encode(request.args[0], False) for request in requests]
        longest = self.max_length or len(self.tokenizer.prefix) + max(map(len, documents), default=0) or 1

        def score(portion: Sequence[int], report: Callable[[int], None]) -> list[float]:
            scores = likelihood.rolling_log_likelihoods(
                self.model,
                [documents[i] for i in portion],
                max_length=longest,
                samples=self.mc_samples,
                key=self.key,
                cfg_scale=self.options.cfg_scale,
                prefix=self.tokenizer.prefix,
            )
            return [float(s.value) for s in scores]

        order = sorted(range(len(documents)), key=lambda i: -len(documents[i]))
        given = [request.args for request in requests]
        return self._in_portions("loglikelihood_rolling", given, [order], LIKELIHOOD_PORTION // 16, score, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completes the prompts. Each completion is cut at EOS and at the first of its stop strings."""
        self.asked = True
        prompts, stops, groups, cut = [], [], collections.defaultdict(list), 0
        for i, (context, gen_kwargs) in enumerate(request.args for request in requests):
            options, until = self._generation(gen_kwargs)
            room = None if self.max_length is None else self.max_length - options.gen_length
            prompt = self.tok_encode(context)
            prompts.append(prompt if room is None else self._cut(prompt, room))
            cut += len(prompts[-1]) < len(prompt)
            stops.append(until)
            groups[options].append(i)
        self._tell_cut(cut)
        options_of = {i: options for options, places in groups.items() for i in places}
        sampled = [bool(request.args[1].get("do_sample")) for request in requests]
        numbers = list(generation.numbers(prompts, sampled))

        def complete(portion: Sequence[int], report: Callable[[int], None]) -> list[str]:
            texts = complete_ids(
                self.model,
                self.tokenizer,
                [prompts[i] for i in portion],
                options_of[portion[0]],
                self.key,
                batch_size=self.batch_size,
                report=report,
                numbers=[numbers[i] for i in portion],
            )
            return [generation.cut(text, stops[i]) for text, i in zip(texts, portion, strict=True)]

        orders = [sorted(places, key=lambda i: -len(prompts[i])) for places in groups.values()]
        given = [request.args for request in requests]
        size = GENERATION_PORTION * self.batch_size
        return self._in_portions("generate_until", given, orders, size, complete, disable_tqdm)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Sets the cache for results, and sends the results in the cache of process 0 to the other processes."""
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None and distributed.count() > 1:
            found = list(cache_hook.dbdict.items()) if distributed.index() == 0 else []
            for part in range(distributed.first_decides("cached results", lambda: -(-len(found) // _CACHE_PART))):
                some = slice(part * _CACHE_PART, (part + 1) * _CACHE_PART)
                for name, result in distributed.first_decides("cached", lambda some=some: found[some]):
                    if distributed.index():
                        cache_hook.dbdict[name] = result

    def get_model_info(self) -> dict[str, Any]:
        """Returns the settings, which lm_eval writes into its results."""
        settings = dataclasses.asdict(self.options)
        settings |= {"gen_length": self.gen_length, "temperature": self.temperature}
        return settings | {"mc_samples": self.mc_samples, "max_length": self.max_length}

    # How the requests are processed.

    def _fitting(self, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """Cuts the prompt on the left so that both fit, and the answer if it alone is longer than max_length."""
        if self.max_length is None:
            return prompt, answer
        answer = answer[-self.max_length :]
        return self._cut(prompt, self.max_length - len(answer)), answer

    def _cut(self, prompt: list[int], room: int) -> list[int]:
        """Returns the end of a prompt, with the tokenizer's prefix in front if the prompt begins with it."""
        if len(prompt) <= room:
            return prompt
        prefix = list(self.tokenizer.prefix)
        kept = prefix if prompt[: len(prefix)] == prefix and len(prefix) < room else []
        return kept + prompt[len(prompt) - room + len(kept) :]

    def _tell_cut(self, count: int) -> None:
        if count:
            distributed.log(f"{count} prompts lose their beginning: with the answer they pass {self.max_length} tokens")

    def _generation(self, gen_kwargs: dict[str, Any]) -> tuple[Options, list[str]]:
        """Returns the options for a task's generation_kwargs, and its stop strings."""
        found = generation.interpret(gen_kwargs, self.options, self.gen_length, self.temperature, self.max_length)
        for name in found.unused.keys() - self.ignored:
            distributed.log(generation.about_unused(name, found.unused[name]))
            self.ignored.add(name)
        return found.options, found.until

    def _in_portions(
        self,
        kind: str,
        given: Sequence[tuple],
        orders: Iterable[Sequence[int]],
        size: int,
        work: Callable[[Sequence[int], Callable[[int], None]], list],
        quiet: bool,
    ) -> list:
        """Computes the results of all requests in portions, and caches each portion as soon as it is done.

        Args:
          kind: The kind of the requests. Together with its arguments it identifies a request in lm_eval's cache.
          given: The arguments of each request.
          orders: Groups of indices of requests that may be processed together, each in the order of processing.
          size: The number of requests in a portion.
          work: A function that processes the requests with the given indices, and reports how many of them are done.
          quiet: Whether to hide the progress bar.

        Returns:
          The results in the order of the requests.
        """
        results: dict[int, Any] = {}
        hidden = quiet or distributed.index() > 0
        with tqdm(total=len(given), desc=kind, disable=hidden, dynamic_ncols=True) as bar:
            for order in orders:
                for start in range(0, len(order), size):
                    portion = order[start : start + size]

                    def report(done: int, before: int = len(results)) -> None:
                        bar.update(before + done - bar.n)

                    for i, result in zip(portion, work(portion, report), strict=True):
                        results[i] = result
                        self.cache_hook.add_partial(kind, given[i], result)
                    report(0, len(results))
        return [results[i] for i in range(len(given))]
