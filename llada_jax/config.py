"""The typed configuration tree: everything a run can be told, with units.

A config file under configs/ returns one `Config`. Any leaf can be overridden on the
command line (`--config.optimizer.peak_learning_rate=3e-4`). config_check.py finds impossible
combinations before any device work.
"""

import dataclasses
import typing
from collections.abc import Iterator


class UserError(Exception):
    """A mistake of the user's: its message is one line that names the setting and the remedy.

    Entry points print it without a traceback and leave with exit code 2.
    """


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class LoraConfig:
    """Low-rank adaptation (arXiv 2106.09685): W + alpha / rank A B, of which only A and B are trained."""

    rank: int = 0  # r, columns of A and rows of B; 0 = none: all weights are trained
    alpha: float = 16.0  # the adapters' product is scaled by alpha / rank
    # The matrices inside the layers that get adapters.
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class ModelConfig:
    """Architecture (hashable: it is static data of the model) and the ids it gives special meaning."""

    layers: int = 32  # L; 0 = all of the architecture is that of config.init_from
    width: int = 4096  # D
    heads: int = 32  # H, query heads; head width K = width / heads
    kv_heads: int = 32  # G, key/value heads: heads = multi-head, fewer = grouped-query attention
    feed_forward: int = 12288  # F
    vocab_size: int = 0  # V, rows of the embedding; 0 = the tokenizer's size, rounded up to a multiple of 128
    tied_embeddings: bool = False  # the head is the transposed embedding
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5
    # Ids; None = taken from the tokenizer. Ids >= token_count fill up the vocabulary and are never chosen.
    token_count: int | None = None
    mask_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    eot_id: int | None = None
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.width // self.heads


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class ComputeConfig:
    """How the model is computed; changes speed and memory, not the mathematics."""

    dtype: str = ""  # of activations and matmul operands; "" = bfloat16 on accelerators, float32 on CPU
    # What the backward pass keeps of a layer: none (of it is recomputed) | dots (matmuls and attention are kept) |
    # attention (its output is kept) | full (nothing is kept: all of it is recomputed).
    remat: str = "full"
    unroll: int = 1  # layers unrolled per iteration of the scan over layers; 0 = all (fastest on CPU, slow to compile)
    # Kernel: auto (splash on TPU, cudnn on GPU in bfloat16, else xla) | splash | cudnn | xla (chunked over
    # queries) | reference (plain, holds (T, T) scores) | splash_interpreted (for tests).
    attention: str = "auto"
    deterministic: bool = False  # on GPU: the train step gives bitwise the same every time, slower; elsewhere it does
    query_chunk: int = 512  # tokens: queries per chunk of the xla kernel
    loss_chunk: int = 2048  # masked tokens per chunk of the loss (per device): logits held at once


@dataclasses.dataclass(slots=True)
class DiffusionConfig:
    """The forward process q(x_t | x_0) and the objective."""

    # pretrain (Eq. 3) | sft (Eq. 5, of responses given prompts) | sft_whole (prompts are masked too, as in iLLaDA)
    objective: str = "pretrain"
    eps: float = 1e-3  # p_mask = (1 - eps) t + eps
    t_sampling: str = "low_discrepancy"  # independent (the paper) | low_discrepancy (lower variance)
    random_length_every: int = 100  # rows: one row in every so many gets a random length; 0 = never


@dataclasses.dataclass(slots=True)
class DataConfig:
    """What is trained on: prepared sets, or text that is prepared on first use."""

    path: str = ""  # prepared sets: comma-separated folders written by llada_jax.prepare, or gs://BUCKET/SET
    cache: str = ""  # folder where each host keeps copies of remote sets; "" = ~/.cache/llada_jax
    weights: tuple[float, ...] = ()  # mixture weights in the order of path; () = by number of rows
    input: str = ""  # text to prepare into the workdir: comma-separated files or globs, or "stdlib"
    tokenizer: str = ""  # SentencePiece .model, tokenizer.json or a folder for `input`; "" = train one
    train_tokenizer: int = 4096  # vocabulary size of the tokenizer trained when none is given
    validation_fraction: float = 0.02  # of the documents of `input`, chosen by their hash
    workers: int = 0  # processes that prepare `input`; 0 = one per core
    read_threads: int = 1  # threads that read rows
    prefetch: int = 4  # batches read ahead of the step


@dataclasses.dataclass(slots=True)
class MeshConfig:
    """Devices per mesh axis. At most one may be -1: all that are left."""

    data: int = 1  # replicas of the parameters
    fsdp: int = -1  # batch and parameters sharded
    tensor: int = 1  # heads, feed-forward and vocabulary sharded


@dataclasses.dataclass(slots=True)
class OptimizerConfig:
    """AdamW or Muon, and the schedule."""

    name: str = "adamw"  # adamw (the paper) | muon (matrices inside the layers by Muon, the rest by AdamW)
    peak_learning_rate: float = 4e-4
    # Polyline of (position, factor of the peak): an int position counts steps, a float one is a
    # fraction of `steps`; linear in between, the same position twice is a jump, flat at both ends.
    schedule: tuple[tuple[float, float], ...] = ((0, 0.0), (2000, 1.0))
    weight_decay: float = 0.1  # on matrices, not on norm weights
    beta1: float = 0.9
    beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_norm: float = 1.0  # global gradient norm; 0 = no clipping
    # Of the moments between steps: float32 | bfloat16 (half the memory; updates are computed in float32 all the same).
    state_dtype: str = "float32"
    max_nonfinite: int = 10  # non-finite steps in a row (each is skipped) that end the run


@dataclasses.dataclass(slots=True)
class CheckpointConfig:
    """When the state is saved and how much of it stays."""

    every: int = 1000  # steps between rolling checkpoints
    keep: int = 3  # newest checkpoints kept, permanent ones among them counted
    permanent_every: int = 0  # steps between checkpoints that are never removed; 0 = none


@dataclasses.dataclass(slots=True)
class ValidationConfig:
    """The likelihood bound (Eq. 6, empty prompt) on held-out rows."""

    every: int = 1000  # steps; 0 = only at the end
    rows: int = 256  # held-out rows at most; 0 = no validation
    samples: int = 1  # Monte Carlo samples per row
    seed: int = 0  # of the fixed noise


@dataclasses.dataclass(slots=True)
class LoggingConfig:
    """What is written while training."""

    every: int = 10  # steps between log lines
    tensorboard: bool = True
    wandb_project: str = ""  # "" = off; needs the extra [wandb]
    buckets: int = 10  # equal bins of the mask ratio, each with its own loss


@dataclasses.dataclass(frozen=True, slots=True)
class SamplerConfig:
    """The reverse process (hashable: static data of the compiled sampler)."""

    steps: int = 64  # reverse steps, shared between the blocks
    gen_length: int = 64  # MASK tokens appended to the prompt; 0 = only fill in the prompt's own
    block_length: int = 32  # MASK tokens per block; blocks are finished left to right
    temperature: float = 0.0  # 0 = greedy
    remasking: str = "low_confidence"  # low_confidence | random
    cfg_scale: float = 0.0  # w of Eq. 16, guidance away from what comes without the prompt; 0 = none
    logits_eos_inf: bool = False  # EOS is never chosen: its logit is -inf
    confidence_eos_eot_inf: bool = False  # EOS and end of turn stay only when nothing else can: least confident of all
    stop_at_end: bool = False  # blocks after one with EOS or end of turn in it are not computed: all of them is EOS
    # Ids; None = the model's own.
    mask_id: int | None = None
    eos_id: int | None = None
    eot_id: int | None = None


@dataclasses.dataclass(slots=True)
class SamplingConfig:
    """Samples written during training."""

    every: int = 1000  # steps; 0 = only at the end
    prompts: tuple[str, ...] = ("",)  # a prompt with [MASK] in it is filled in
    steps: int = 64
    gen_length: int = 64
    block_length: int = 32
    temperature: float = 0.0


@dataclasses.dataclass(slots=True)
class ProfileConfig:
    """A profiler trace into workdir/profile."""

    first_step: int = 0  # first traced step
    steps: int = 0  # traced steps; 0 = off


@dataclasses.dataclass(slots=True)
class DistributedConfig:
    """How long the processes of a run wait for one another; without effect on a run of one process."""

    initialization_timeout: int = 300  # seconds until all must have started
    heartbeat_timeout: int = 30  # seconds of silence after which a process counts as dead, and the others end
    shutdown_timeout: int = 10  # seconds that a process which failed gives the others to leave with it


@dataclasses.dataclass(slots=True)
class Config:
    """One training run."""

    seed: int = 0
    steps: int = 1000  # optimiser steps in all
    batch_size: int = 8  # sequences per step, over all devices
    sequence_length: int = 4096  # T, tokens
    accumulation: int = 1  # micro-batches per step
    init_from: str = ""  # start from: a workdir, or a published folder (weights only)
    init_step: int | None = None  # of init_from; None = its newest checkpoint
    init_weights_only: bool = False  # leave optimiser, step and data position of init_from behind
    report: bool = False  # end with yardsticks and the next commands (the quickstart)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    diffusion: DiffusionConfig = dataclasses.field(default_factory=DiffusionConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)


def to_dict(config: Config) -> dict:
    """The tree as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_dict(record: dict, kind: type = Config):
    """The inverse of `to_dict`. Raises TypeError on an unknown key; types of values are config_check's matter."""
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in record.items():
        if name not in hints:
            raise TypeError(f"unknown setting {name!r}")
        if dataclasses.is_dataclass(hints[name]):
            values[name] = from_dict(value, hints[name])
        else:
            values[name] = _as_tuples(value)
    return kind(**values)


def _as_tuples(value):
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def differences(old: Config, new: Config) -> dict[str, tuple]:
    """Dotted name -> (old, new) of the leaves that differ."""
    after = dict(leaves(new))
    return {name: (value, after[name]) for name, value in leaves(old) if not _same(value, after[name])}


def _same(one, other) -> bool:
    # 1 and 1.0 are equal numbers, but in a schedule a step and a fraction of the run.
    return one == other and (not isinstance(one, tuple) or repr(one) == repr(other))


def leaves(node, prefix: str = "") -> Iterator[tuple[str, typing.Any]]:
    """(dotted name, value) of every setting below `node`."""
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value
