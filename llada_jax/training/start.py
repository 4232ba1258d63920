"""Decides where a run begins. The decision is made once, before any device computes, and all later code uses it.

new        nothing exists yet: the parameters are freshly initialised
resumed    the workdir has checkpoints of this run: the run continues from the newest undamaged one, with its state,
           noise and position in the data
branched   config.init_from is the workdir of another run: the run takes the complete state of one of its checkpoints
weights    only the weights of config.init_from are taken: it is a published folder, a workdir that holds only weights
           (written by `convert`), a run whose optimizer state is not wanted, or a run that adapters are added to
"""

import dataclasses
import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from llada_jax import config as configs
from llada_jax.config import Config, ModelConfig, UserError
from llada_jax.data.sets import PreparedSets, prepares_with
from llada_jax.devices import distributed
from llada_jax.devices.distributed import log
from llada_jax.diffusion.forward import OBJECTIVES, OF_CAUSAL, is_chat
from llada_jax.formats import huggingface, published, weights, workdir
from llada_jax.model import lora
from llada_jax.model.transformer import split
from llada_jax.storage import objects
from llada_jax.storage.objects import Place
from llada_jax.text.agreement import fitted, template_hash
from llada_jax.text.tokenizer import find_tokenizer
from llada_jax.training.checkpoint import Checkpoints, load_state
from llada_jax.training.config_check import check_architecture
from llada_jax.training.step import TrainState, make_state

# The settings that must not change during a run, like the hashes of its data and its tokenizer.
FIXED = ("seed", "batch_size", "sequence_length", "optimizer.name", "optimizer.state_dtype")
FIXED_GROUPS = ("model.", "diffusion.")
# Settings of the model that no weight depends on: they concern sampling alone.
_NOT_COMPARED = ("end_ids", "holes")
_INIT = ("init_from", "init_step", "init_weights_only")


class Kind(enum.StrEnum):
    """The four beginnings of a run; see the docstring of the module."""

    NEW = "new"
    RESUMED = "resumed"
    BRANCHED = "branched"
    WEIGHTS = "weights"


@dataclasses.dataclass(frozen=True)
class Start:
    """The beginning of a run: its source, and what is known of the source without reading its arrays."""

    kind: Kind
    source: str = ""  # the folder that the state or the weights come from; "" for a new run
    step: int | None = None  # the step of the source's checkpoint; None if there is none, or if the run is resumed
    config: Config | None = None  # the source's configuration; for a published folder only `model` is known
    identity: dict = dataclasses.field(default_factory=dict)  # hashes of the source's data and tokenizer, if known
    template_sha256: str | None = None  # hash of the source's chat template, if the run trains on conversations
    told: Sequence[str] = ()  # the notes of the source's tokenizer that the user has read

    @property
    def resumes(self) -> bool:
        """Whether the run continues in its own workdir."""
        return self.kind is Kind.RESUMED

    @property
    def earlier(self) -> Config | None:
        """The configuration with which the run was started before; None unless it is resumed."""
        return self.config if self.resumes else None

    def architecture(self, wanted: ModelConfig) -> ModelConfig:
        """Returns the model config of the run.

        This is `wanted`, unless its number of layers is 0. Then it is the architecture of the source, with the adapters
        that `wanted` asks for.

        Raises:
          UserError: If the number of layers is 0 and `wanted` sets a value that differs from the source's value.
        """
        if wanted.layers:
            ends = self.config.model.end_ids if self.config else ()
            return dataclasses.replace(wanted, end_ids=wanted.end_ids or ends)
        found, default = self.config.model, ModelConfig()
        if wanted.causal:
            check_attention(found, wanted, self.source)
        for field in dataclasses.fields(ModelConfig):
            value, theirs = getattr(wanted, field.name), getattr(found, field.name)
            own = field.name in ("layers", "lora", *_NOT_COMPARED)
            if not own and value not in (getattr(default, field.name), theirs):
                raise UserError(
                    f"config.model.{field.name} is {value}, but config.model.layers=0 takes the architecture of "
                    f"{self.source}, which has {theirs}"
                )
        model = dataclasses.replace(found, lora=wanted.lora, end_ids=wanted.end_ids or found.end_ids)
        check_architecture(model)
        return model

    def check(self, config: Config, sets: PreparedSets | None = None) -> dict[str, tuple]:
        """Checks that the run agrees with its source where it must.

        Args:
          config: The configuration of the run.
          sets: The prepared sets of the run. None if they are not known yet: then only settings are compared, and the
            settings that the model config leaves to the tokenizer of the data are assumed to equal the source's.

        Returns:
          A dict of the settings that differ from the source's settings and may differ: dotted name -> (before, now).

        Raises:
          UserError: If something does not agree. The message names what does not agree.
        """
        if self.kind is Kind.NEW:
            return {}
        model = config.model if sets else _filled(config.model, self.config.model)
        identity = sets.identity(config) if sets else {}
        if not self.resumes:
            check_attention(self.config.model, model, self.source)
        if sets and not self.resumes:
            self._check_template(sets)
        if self.kind is Kind.WEIGHTS:
            tokenizer = self.identity.get("tokenizer")
            if sets and tokenizer is not None and tokenizer != identity["tokenizer"]:
                raise UserError(
                    f"the tokenizer differs from that of {self.source}: prepare the data with that tokenizer"
                )
            check_fits(self.config.model, model, self.source)
            return {}
        return self._check_same_run(dataclasses.replace(config, model=model), identity)

    def _check_same_run(self, config: Config, identity: dict) -> dict[str, tuple]:
        remedy = "set --config.init_weights_only to take its weights alone"
        if self.resumes:
            remedy = "take another --workdir, or set it back"
        changed, ignored = configs.differences(self.config, config), [f"model.{name}" for name in _NOT_COMPARED]
        for name, (before, after) in changed.items():
            if name in FIXED or (name.startswith(FIXED_GROUPS) and name not in ignored):
                raise UserError(f"config.{name} is {after}, but {self.source} was trained with {before}: {remedy}")
        for name, after in identity.items():
            if self.identity.get(name) != after:
                raise UserError(f"the {name} differs from that of {self.source} (by its hash or value): {remedy}")
        for name in _INIT if self.resumes else ():
            if name in changed:
                before, after = changed[name]
                raise UserError(f"config.{name} is {after!r}, but {self.source} was started with {before!r}: {remedy}")
        return changed

    def _check_template(self, sets: PreparedSets) -> None:
        learned = sets.template_sha256
        if learned and self.template_sha256 and learned != self.template_sha256:
            raise UserError(
                f"the conversations were prepared with another chat template than that of {self.source}: "
                f"prepare them with --tokenizer={self.source}"
            )

    def first_state(
        self, config: Config, mesh: jax.sharding.Mesh, compute_dtype: str, saved: Checkpoints
    ) -> tuple[TrainState, dict, dict]:
        """Returns the state that the first step is computed from.

        Args:
          config: The configuration of the run, which `check` has accepted.
          mesh: The mesh that the state is placed on, which must be in use.
          compute_dtype: The dtype of the weights that low-rank adapters are added to.
          saved: The checkpoints of the run's own workdir.

        Returns:
          The state; the frozen weights that low-rank adapters are added to, {} without adapters; and the record that a
          checkpoint keeps of the loop, {} unless the run is resumed.

        Raises:
          UserError: If the arrays cannot be read.
        """
        adapts = config.model.lora.rank > 0
        if self.kind is Kind.NEW:
            return make_state(config), {}, {}
        if self.kind is Kind.WEIGHTS:
            params = self._weights(config, mesh, jnp.dtype(compute_dtype if adapts else jnp.float32))
            return (make_state(config), params, {}) if adapts else (make_state(config, params), {}, {})
        if self.resumes:
            state, record = saved.restore(config, mesh, log)
            log(f"resuming {self.source} at step {int(state.step)}")
        else:
            log(f"branching from {self.source} at step {self.step}")
            state, record = load_state(self.source, self.step, config, mesh), {}
        frozen = weights.load_frozen(self.source, config, mesh, jnp.dtype(compute_dtype)) if adapts else {}
        return state, frozen, record

    def _weights(self, config: Config, mesh: jax.sharding.Mesh, dtype: jnp.dtype) -> dict:
        if self.step is not None:
            log(f"starting from the weights of {self.source} at step {self.step}")
            return weights.load_params(self.source, self.step, config, mesh, dtype)
        log(f"starting from the weights of {self.source}")
        wanted = lora.plain(config.model)
        # The folder is read again here, and may have changed since the decision.
        files = workdir.local_files(self.source, log)
        return split(huggingface.load_model(files, dtype, lambda m: check_fits(m, wanted, self.source)))[1]


def decide(config: Config, folder: Place) -> Start:
    """Decides where a run begins, in the same way for all its processes. No device is touched and no array is read.

    Args:
      config: The configuration of the run.
      folder: The workdir of the run.

    Raises:
      UserError: If the workdir holds something that cannot be resumed, or if config.init_from is not usable.
    """
    record = distributed.first_decides("start", lambda: dataclasses.asdict(_look(config, folder)))
    known = record["config"] and configs.from_dict(record["config"])
    begin = Start(**record | {"kind": Kind(record["kind"]), "config": known})
    if begin.source and not begin.resumes and distributed.index():
        _check_seen(begin)
    return begin


def _check_seen(begin: Start) -> None:
    """Raises UserError unless this process, too, sees the source: its arrays are read hours later."""
    source = objects.place(begin.source)
    if workdir.is_workdir(source, f"process {distributed.index()}: config.init_from="):
        workdir.choose_step(source, begin.step)
    elif not objects.is_bucket(source):  # of a bucket, every host makes a copy
        published.read_json(source / published.CONFIG)


def _look(config: Config, folder: Place) -> Start:
    if steps := workdir.steps_in(folder):
        return _resumed(folder, steps)
    if not config.init_from:
        return Start(Kind.NEW)
    source = objects.place(config.init_from)
    if workdir.is_workdir(source, "config.init_from="):
        return _from_workdir(config, source, workdir.choose_step(source, config.init_step))
    if config.init_step is not None:
        raise UserError(
            f"config.init_step={config.init_step}: {source} is a published folder and has no steps: leave init_step out"
        )
    files = workdir.local_files(source, log)
    found = huggingface.inspect(files)
    tokenizer = fitted(find_tokenizer(files), found.config, source)
    told = tokenizer.notes if tokenizer and prepares_with(config, folder) != config.init_from else ()
    for note in (*found.notes, *(f"{source}: {note}" for note in told)):
        log(note)
    return Start(
        Kind.WEIGHTS,
        config.init_from,
        config=Config(model=found.config),
        identity={"tokenizer": tokenizer and tokenizer.sha256},
        template_sha256=_template(config, source),
        told=told,
    )


def _resumed(folder: Place, steps: list[int]) -> Start:
    if weights.weights_record(folder, steps[-1]):
        raise UserError(
            f"{folder} holds only weights, not a run that can be resumed: take another --workdir, and start from them "
            f"with --config.init_from={folder}"
        )
    if not objects.exists(folder / published.CONFIG):
        raise UserError(f"{folder} has checkpoints but no config.json, so it cannot be resumed: take another --workdir")
    stored, identity = workdir.read_config(folder)
    return Start(Kind.RESUMED, str(folder), config=stored, identity=identity)


def _from_workdir(config: Config, source: Place, step: int) -> Start:
    parent, identity = workdir.read_config(source)
    adapts_anew = config.model.lora.rank > 0 and parent.model.lora.rank == 0
    alone = config.init_weights_only or adapts_anew or weights.weights_record(source, step) is not None
    return Start(
        Kind.WEIGHTS if alone else Kind.BRANCHED,
        config.init_from,
        step,
        parent,
        identity,
        _template(config, source),
    )


def _template(config: Config, source: Place) -> str | None:
    """Returns the hash of the chat template of the model to tune; None if no conversations are learned."""
    if not is_chat(config):
        return None
    files = workdir.local_files(source, log)
    tokenizer = find_tokenizer(files) or find_tokenizer(files / workdir.TOKENIZER)
    return tokenizer and template_hash(tokenizer)


def _filled(wanted: ModelConfig, found: ModelConfig) -> ModelConfig:
    """Returns a copy of `wanted`, in which the settings left open are taken from `found`."""
    unknown = [field.name for field in dataclasses.fields(ModelConfig) if getattr(wanted, field.name) is None]
    unknown += [] if wanted.vocab_size else ["vocab_size"]
    return dataclasses.replace(wanted, **{name: getattr(found, name) for name in unknown})


def check_attention(found: ModelConfig, wanted: ModelConfig, source: str) -> None:
    """Raises UserError if one of two models is autoregressive. No shape depends on it, but weights are made for one."""
    if found.causal == wanted.causal:
        return
    kind = "an autoregressive model (causal attention)" if found.causal else "a masked diffusion model (full attention)"
    objectives = OF_CAUSAL if found.causal else [name for name in OBJECTIVES if name not in OF_CAUSAL]
    raise UserError(
        f"config.model.causal is {wanted.causal}, but {source} holds {kind}: set config.model.causal={found.causal} "
        f"and config.diffusion.objective={' or '.join(objectives)}"
    )


def check_fits(found: ModelConfig, wanted: ModelConfig, source: str) -> ModelConfig:
    """Returns `wanted` if weights of `found` fit it. A setting that `found` leaves open (None) fits any value.

    Adapters are not compared, because the adapters of `found` are merged into its weights and `wanted` gets new ones.

    Raises:
      UserError: If a setting differs. The message names it and `source`.
    """
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(wanted, field.name), getattr(found, field.name)
        if theirs is not None and theirs != ours and field.name not in ("token_count", "lora", *_NOT_COMPARED):
            raise UserError(f"config.model.{field.name} is {ours}, but {source} has {theirs}: its weights do not fit")
    return wanted
