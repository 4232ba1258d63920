"""The typed configuration tree: every setting of a run, with its unit and the meaning of its special values.

A config file under configs/ returns one `Config`. Any setting can be overridden on the command line
(`--config.optimizer.peak_learning_rate=3e-4`). `training/config_check.py` finds impossible values and combinations
before any device is used.
"""

import dataclasses
import typing

from llada_jax.config_tree import differences as differences
from llada_jax.config_tree import leaves as leaves


class UserError(Exception):
    """A mistake of the user. The message is one line that names the setting and says what to do.

    Entry points print the message without a traceback and exit with code 2.
    """


class NonFinite(Exception):
    """What a model computes is not finite: NaN or infinite. The message is one line.

    Entry points print the message without a traceback and exit with code 1.
    """

    def __init__(self, what: str = ""):
        """Makes the message from `what`. "" means that the output of the model is not finite."""
        super().__init__(
            what
            or "the model's output is not finite (NaN or infinite): its weights are damaged, or too large for its dtype"
        )


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class LoraConfig:
    """Low-rank adaptation (arXiv 2106.09685): W + alpha / rank A B, where only the adapters A and B are trained."""

    rank: int = 0  # r: the number of columns of A and of rows of B; 0 = no adapters, all weights are trained
    alpha: float = 16.0  # the product A B is scaled by alpha / rank
    # The matrices of each layer that get adapters.
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class ModelConfig:
    """The architecture and the special token ids. It is hashable, because it is static data of the model."""

    layers: int = 32  # L: the number of layers; 0 = the whole architecture is taken from config.init_from
    width: int = 4096  # D: the width of the hidden states
    heads: int = 32  # H: the number of query heads
    # G: the number of key/value heads. Equal to `heads` = multi-head attention, fewer = grouped-query attention.
    kv_heads: int = 32
    head_size: int = 0  # K: the width of one attention head; 0 = width / heads
    feed_forward: int = 12288  # F: the width of the feed-forward network
    # V: the number of rows of the embedding; 0 = the size of the tokenizer, rounded up to a multiple of 128.
    vocab_size: int = 0
    tied_embeddings: bool = False  # True = the output head is the transposed embedding
    rope_theta: float = 500_000.0  # the base of the rotary position embedding (RoPE)
    # The scaling of RoPE's frequencies of Llama 3: (factor, low_freq_factor, high_freq_factor, original length in
    # tokens); () = none.
    rope_scaling: tuple[float, ...] = ()
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    causal: bool = False  # True = a token sees itself and the tokens before it only: an autoregressive model
    qkv_bias: bool = False  # True = biases are added to queries, keys and values, as in Qwen2
    qk_norm: bool = False  # True = RMSNorm is applied to each head's queries and keys before RoPE, as in Qwen3
    # The number of token ids that the model may choose; None = the size of the tokenizer. The ids from token_count on
    # only fill up the embedding to vocab_size rows; the sampler never chooses them.
    token_count: int | None = None
    # Ranges (first, last + 1) of ids below token_count that are no tokens, so that the sampler never chooses them;
    # () = those that the tokenizer cannot decode.
    holes: tuple[tuple[int, int], ...] = ()
    mask_id: int | None = None  # the id of MASK; None = the tokenizer's id
    bos_id: int | None = None  # the id of BOS, the start of a text; None = the tokenizer's id
    eos_id: int | None = None  # the id of EOS, the end of a text; None = the tokenizer's id
    eot_id: int | None = None  # the id of the end of a turn in a chat; None = the tokenizer's id
    # Ids that also end a text, beside eos_id and eot_id; () = those that the folder of the model names.
    end_ids: tuple[int, ...] = ()
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    @property
    def head_width(self) -> int:
        """The width K of one attention head."""
        return self.head_size or self.width // self.heads


@dataclasses.dataclass(unsafe_hash=True, slots=True)
class ComputeConfig:
    """How the model is computed. These settings change speed and memory, not the mathematics."""

    # The dtype of activations and matmul operands: float32 | bfloat16 | "" (bfloat16 on accelerators, float32 on CPU).
    dtype: str = ""
    # Which results of a layer's forward pass are stored for the backward pass. The others are computed again (remat).
    #   none       no rematerialisation: all results are stored
    #   dots       the results of matmuls, RoPE and attention are stored
    #   rotated    the results of RoPE and of attention are stored
    #   attention  the result of attention is stored
    #   full       full rematerialisation: only the input of the layer is stored
    remat: str = "full"
    # The number of layers unrolled per iteration of the scan over layers. 0 = all layers: fastest on CPU, but slow to
    # compile.
    unroll: int = 1
    # The attention kernel.
    #   auto                the first of splash, cudnn, cpu and xla that can run on the devices in use
    #   splash              flash attention for TPU
    #   cudnn               flash attention for GPU, in bfloat16 only
    #   cpu                 a kernel for CPU that holds the scores of a few heads and queries at a time
    #   xla                 runs everywhere, in chunks of query_chunk queries
    #   reference           the plain definition, holds all (T, T) scores
    #   splash_interpreted  the splash kernel on any device, slowly, for tests
    attention: str = "auto"
    # True = on GPU, the train step gives bitwise the same result every time, but is slower, also because attention is
    # then computed by the kernel xla. On other devices it always gives the same result.
    deterministic: bool = False
    query_chunk: int = 512  # queries (tokens) per chunk of the attention kernel xla
    loss_chunk: int = 2048  # masked tokens whose logits each device holds at a time while it computes the loss


@dataclasses.dataclass(slots=True)
class DiffusionConfig:
    """The forward process q(x_t | x_0) and the training objective (equations of arXiv 2502.09992)."""

    # The training objective.
    #   pretrain   Eq. 3, on text
    #   sft        Eq. 5, on conversations: only answers (the paper's responses) are masked, prompts never are
    #   sft_whole  on conversations: prompts are masked like answers, as in iLLaDA
    #   next_token      on text, for an autoregressive model (model.causal): each token is predicted from those before
    #   next_token_sft  the same on conversations: only the tokens of answers are predicted
    objective: str = "pretrain"
    eps: float = 1e-3  # the least mask ratio: a token is masked with the probability p_mask = (1 - eps) t + eps
    # How the t of each row is drawn: independent (as in the paper) | low_discrepancy (t is spread evenly over the rows,
    # which lowers the variance of the loss).
    t_sampling: str = "low_discrepancy"
    # The part of (0, 1) that t is drawn from, (lowest, highest). (0.0, 1.0) is the paper's. With any other, the loss is
    # the mean over this part (about so with loss_weight=count) and no bound on the likelihood. Validation always uses
    # all of (0, 1).
    t_range: tuple[float, float] = (0.0, 1.0)
    # The weight of each of the n masked tokens of a row, of whose L tokens each can be masked. Validation does not
    # depend on it.
    #   elbo   1 / (p_mask L), the paper's
    #   count  (L + 1) / (n L): for t_range (0.0, 1.0) and eps -> 0 the same loss in the mean, with less variance
    #   plain  1 / L: all masked tokens count alike. This loss is no bound on the likelihood
    loss_weight: str = "elbo"
    # True = each sequence is in a batch twice, and each of its tokens is masked in exactly one of the two rows. Their
    # mask ratios are p_mask = (1 - 2 eps) t + eps and 1 - p_mask. batch_size counts rows, two for each sequence.
    complementary: bool = False
    # One row in every `random_length_every` rows is cut to a random length, uniform in 1..sequence_length; 0 = never.
    # It must be 0 for objectives on conversations.
    random_length_every: int = 100


@dataclasses.dataclass(slots=True)
class DataConfig:
    """The training data: either prepared sets (`path`), or files that the run prepares when it starts (`input`)."""

    # Prepared sets, separated by commas: folders written by llada_jax.prepare, or remote sets such as gs://BUCKET/SET.
    path: str = ""
    # Whether each host copies sets in gs:// and s3:// to `cache` before it trains. Otherwise rows are read where they
    # lie. Sets in az:// and hf:// are always copied.
    copy: bool = False
    # The folder in which each host keeps what it copies of remote sets: their tokenizer and the indices of their rows,
    # or the whole sets; "" = ~/.cache/llada_jax.
    cache: str = ""
    # The shares of the sets in the training rows, in any scale and in the order of `path`. () = in proportion to the
    # number of rows of each set (the number of conversations, for objectives on conversations).
    weights: tuple[float, ...] = ()
    # The files to prepare into the workdir: files or globs, separated by commas, or "stdlib" (the source files of
    # Python's standard library).
    input: str = ""
    # The tokenizer for `input`: a SentencePiece .model, a tokenizer.json, or a folder with either. "" = a tokenizer is
    # trained on the text; for conversations, the tokenizer of config.init_from is used.
    tokenizer: str = ""
    train_tokenizer: int = 4096  # the vocabulary size, in tokens, of the tokenizer that is trained if none is given
    # The fraction of the documents of `input` that is held out for validation; a document's hash decides. 0 = none.
    validation_fraction: float = 0.02
    workers: int = 0  # the number of processes that prepare `input`; 0 = one per CPU core
    read_threads: int = 1  # the number of threads per process that read rows
    prefetch: int = 4  # the number of batches that are read ahead of the current step


@dataclasses.dataclass(slots=True)
class MeshConfig:
    """The number of devices along each mesh axis. At most one axis may be -1: it takes all remaining devices."""

    data: int = 1  # the batch is sharded over this axis, and each shard has a replica of the parameters
    fsdp: int = -1  # the batch and the parameters are sharded over this axis
    tensor: int = 1  # heads, feed-forward and vocabulary are sharded over this axis


@dataclasses.dataclass(slots=True)
class OptimizerConfig:
    """The optimizer, AdamW or Muon, and the learning rate schedule."""

    # adamw (as in the paper) | muon (Muon for the matrices inside the layers, AdamW for all other parameters)
    name: str = "adamw"
    peak_learning_rate: float = 4e-4  # the learning rate is this value times the factor that `schedule` gives
    # Muon's updates are multiplied by this, so that AdamW can have another learning rate beside it: peak_learning_rate
    # and weight decay are AdamW's.
    muon_scale: float = 1.0
    # Points (position, factor) of a polyline. A position that is an int counts steps; one that is a float is a fraction
    # of config.steps. So 1 is the first step, and 1.0 is the end of the run. The factor is linear between two points,
    # and constant before the first and after the last point. The same position twice makes a jump.
    schedule: tuple[tuple[float, float], ...] = ((0, 0.0), (2000, 1.0))
    weight_decay: float = 0.1  # decoupled weight decay of matrices; norm weights are not decayed
    beta1: float = 0.9  # the decay rate of Adam's first moment; Muon's momentum is always 0.95
    beta2: float = 0.95  # the decay rate of Adam's second moment
    adam_eps: float = 1e-8  # added to the root of Adam's second moment
    clip_norm: float = 1.0  # gradients are scaled down to this global norm; 0 = no clipping
    # The dtype in which the moments are kept between steps: float32 | bfloat16 (half the memory). Updates are computed
    # in float32 in either case.
    state_dtype: str = "float32"
    # A step whose loss or gradients are not finite is skipped. The run ends after this many skipped steps in a row.
    max_nonfinite: int = 10


@dataclasses.dataclass(slots=True)
class CheckpointConfig:
    """When checkpoints are saved, and how many of them are kept."""

    every: int = 1000  # steps between checkpoints
    keep: int = 3  # the number of newest checkpoints that are kept; permanent ones among them count
    # Steps between permanent checkpoints, which are never removed: a multiple of `every`; 0 = none are permanent.
    permanent_every: int = 0


@dataclasses.dataclass(slots=True)
class ValidationConfig:
    """Validation: the likelihood bound (Eq. 6 of arXiv 2502.09992) of held-out rows.

    The prompt is empty for text; for conversations, it is the bound of the answer given its prompt.
    """

    every: int = 1000  # steps between validations; 0 = only at the end of the run
    rows: int = 256  # the largest number of held-out rows that are used; 0 = no validation
    samples: int = 1  # the number of Monte Carlo samples per row
    seed: int = 0  # the seed of the noise, which is the same in every validation


@dataclasses.dataclass(slots=True)
class LoggingConfig:
    """Which metrics are written during training, and where."""

    every: int = 10  # steps between log lines, each with a record in metrics.jsonl
    tensorboard: bool = True  # True = metrics are also written for TensorBoard, to workdir/tensorboard
    # The project on Weights & Biases that also gets the metrics; "" = none. It needs the extra: llada_jax[wandb].
    wandb_project: str = ""
    buckets: int = 10  # the mask ratio is divided into this many equal bins, and the loss of each bin is logged


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplerConfig:
    """The reverse process. It is hashable, because it is static data of the compiled sampler."""

    steps: int = 64  # the number of reverse steps in all, shared between the blocks; only commit=schedule uses it
    gen_length: int = 64  # the number of MASK tokens appended to the prompt; 0 = only fill in MASK tokens of the prompt
    # What the model sees of them: fixed (all) | append (those up to the end of the active block; a text ends after a
    # block with EOS) | daedal (as many as the model itself finds enough; sampling/daedal.py has the rule). With the
    # last two, gen_length is the largest number.
    length: str = "fixed"
    block_length: int = 32  # the number of MASK tokens per block; blocks are finished from left to right
    temperature: float = 0.0  # the scale of the Gumbel noise added to the logits; 0 = greedy decoding
    top_k: int = 0  # draw from this number of most probable tokens only; 0 = from all. Needs a temperature.
    top_p: float = 1.0  # draw from the fewest most probable tokens that have this probability together; 1 = from all
    # What the predictions of a reverse step are scored by; those with the highest scores are kept, and the others are
    # masked again: low_confidence (the probability) | margin (how much more probable the best token is than the second)
    # | entropy (the negative entropy) | random.
    remasking: str = "low_confidence"
    # How many predictions a reverse step keeps: schedule (a number that follows from `steps`) | threshold | factor |
    # frechet | entropy | local (as many as are sure, at least one; sampling/commit.py has the rules).
    commit: str = "schedule"
    commit_bound: float | None = None  # the bound of the rule; None = 0.9, 1.0, 0.25, 0.01 nats, 0.9, in that order
    # Which keys and values are kept within a block: none | prefix (those of all tokens before the block) | dual (those
    # of all tokens outside the block). Both approximate; sampling/cache.py has the details.
    cache: str = "none"
    cache_refresh: int = 0  # the number of steps of a row after which they are computed anew; 0 = once per block
    # The number of MASK tokens behind the active block that the model sees, besides the last position; 0 = all.
    suffix_window: int = 0
    # Which tokens of the active block are masked again: none | remdm_cap | remdm_rescale | remdm_conf | remdm_loop (at
    # random) | wino (those that the others make improbable). sampling/revoking.py has the rules.
    revoke: str = "none"
    # The bound of that rule, a probability; None = 0.008, 0.015, 1, 0.02, 0.9, in that order.
    revoke_bound: float | None = None
    # w of Eq. 16 in arXiv 2502.09992: how far classifier-free guidance moves the logits away from those that the model
    # gives without the prompt. 0 = no guidance; otherwise each reverse step takes two forward passes.
    cfg_scale: float = 0.0
    logits_eos_inf: bool = False  # True = the logits of EOS and of end_ids are -inf, so that these are never chosen
    # True = predictions of EOS, end of turn and end_ids have the lowest confidence: they are kept after all others.
    confidence_eos_eot_inf: bool = False
    # True = a row ends after a block in which an appended token became EOS, end of turn or one of end_ids: its later
    # blocks are not computed but filled with EOS.
    stop_at_end: bool = False
    mask_id: int | None = None  # the id of MASK; None = the model's id
    eos_id: int | None = None  # the id of EOS; None = the model's id
    eot_id: int | None = None  # the id of the end of a turn; None = the model's id
    end_ids: tuple[int, ...] | None = None  # further ids that end a text; None = the model's ids


@dataclasses.dataclass(slots=True)
class SamplingConfig:
    """The samples that are written during training. The settings of the sampler mean the same as in SamplerConfig."""

    every: int = 1000  # steps between samples; 0 = only at the end of the run
    # One sample is written for each prompt; () = no samples. A prompt that contains [MASK] is filled in; any other
    # prompt is continued. For objectives on conversations, each prompt is a message of the user and gets an answer.
    prompts: tuple[str, ...] = ("",)
    steps: int = 64  # the number of reverse steps in all, shared between the blocks
    gen_length: int = 64  # the number of MASK tokens appended to a prompt that is not filled in
    block_length: int = 32  # the number of MASK tokens per block
    temperature: float = 0.0  # the scale of the Gumbel noise added to the logits; 0 = greedy decoding


@dataclasses.dataclass(slots=True)
class ProfileConfig:
    """A trace of some steps by JAX's profiler, written to workdir/profile by process 0."""

    # The number of steps done before the trace begins. There is no trace if the run resumes after this step.
    first_step: int = 0
    steps: int = 0  # the number of traced steps; 0 = no trace


@dataclasses.dataclass(slots=True)
class DistributedConfig:
    """How long the processes of a run wait for each other. It has no effect on a run of one process."""

    initialization_timeout: int = 300  # seconds within which all processes must have started
    # Seconds without a sign of life after which a process counts as dead, and the others end.
    heartbeat_timeout: int = 30
    shutdown_timeout: int = 10  # seconds that a failed process waits for the others, so that all exit together


@dataclasses.dataclass(slots=True)
class Config:
    """One training run."""

    seed: int = 0  # the seed of the initial weights, the order of the data, the masking and the samples
    steps: int = 1000  # the total number of optimizer steps, including those before a resume
    # The length of the run in minutes, with the preparation of data, on the machine in use: the number of steps is
    # decided once, from a few timed steps, in place of `steps`, and a resumed run keeps it. 0.0 = `steps` decides.
    # --config.steps on the command line takes the place of `minutes` in the config file.
    minutes: float = 0.0
    batch_size: int = 8  # the number of rows per step, over all devices and micro-batches
    sequence_length: int = 4096  # T: the number of tokens per sequence
    # Gradient accumulation: the number of micro-batches into which the batch of a step is divided; 1 = none.
    accumulation: int = 1
    # Where the run starts from: a training workdir, or a published folder (which holds weights only). "" = new weights.
    init_from: str = ""
    init_step: int | None = None  # the step of the checkpoint in the workdir init_from; None = the newest one
    # True = take only the weights from init_from, and begin at step 0 with a new optimizer state.
    init_weights_only: bool = False
    # True = at the end of the run, print its likelihood bound beside the results of simpler models, and commands to try
    # next. The quickstart does so.
    report: bool = False
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
    """Returns the tree as nested dicts of values that JSON can hold."""
    return dataclasses.asdict(config)


def from_dict(record: dict, kind: type = Config):
    """Inverts `to_dict`. Raises TypeError on an unknown key; the types of values are checked by `config_check`."""
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
