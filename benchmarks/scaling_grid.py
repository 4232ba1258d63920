"""The runs of benchmarks/scaling.py: grids of sizes and budgets, and the settings of each run.

The CPU grid has Muon, because in a first trial LLaDA learned sooner with it than with AdamW. Not every learning rate of
AdamW was tried, and the baseline not at all.
"""

import dataclasses
import statistics

from llada_jax.config import Config
from llada_jax.diffusion.forward import masked_share
from llada_jax.model.transformer import parameter_count
from llada_jax.training.flops import flops_per_token

AUTOREGRESSIVE = "autoregressive"
# The settings of each kind, as NAME or SECTION.NAME.
KINDS = {
    AUTOREGRESSIVE: {"model.causal": True, "diffusion.objective": "next_token"},
    "llada": {"diffusion.loss_weight": "count"},
    "llada_window": {"diffusion.loss_weight": "count", "diffusion.t_range": (0.2, 0.9)},
}
# The settings of each optimizer. Muon is that of configs/quickstart.py: matrices of layers have a tenth of the peak.
OPTIMIZERS = {
    "adamw": {"beta2": 0.98},
    "muon": {"name": "muon", "muon_scale": 0.1, "beta2": 0.99, "weight_decay": 0.01},
}
RATES, COMPUTE, EPOCHS = "rates", "compute", "epochs"


@dataclasses.dataclass(frozen=True)
class Grid:
    """The runs of one machine."""

    layers: int
    head_size: int
    sequence_length: int
    batch_size: int  # rows per step
    widths: tuple[int, ...]
    budgets: tuple[float, ...]  # FLOPs
    optimizer: str  # a name in OPTIMIZERS
    fewest_steps: int
    most_epochs: float  # how often a run of RATES or COMPUTE may go over the text
    rates: tuple[float, ...]  # learning rates, see `peak`
    rates_width: int
    rates_budget: float
    epochs_width: int
    epochs_rows: int  # rows of the small part of the text
    epochs: tuple[int, ...]  # how often a run goes over the small part
    rows: int  # the most held-out rows of a result
    samples: int  # of the bound, each with other masks of all rows

    @property
    def vocabulary(self) -> int:
        """The number of ids with which both kinds have the same FLOPs per token."""
        return 2 * self.layers * self.sequence_length

    @property
    def tokens(self) -> int:
        """The number of tokens per step."""
        return self.batch_size * self.sequence_length


GRIDS = {
    "cpu": Grid(
        layers=4, head_size=32, sequence_length=64, batch_size=16,
        widths=(32, 64, 128), budgets=(1.25e10, 5e10, 2e11, 8e11, 1.6e12, 3.2e12, 6.4e12, 1.28e13), optimizer="muon",
        fewest_steps=30, most_epochs=2.0,
        rates=(2e-3, 4e-3, 8e-3), rates_width=32, rates_budget=8e11,
        epochs_width=64, epochs_rows=512, epochs=(2, 8, 32, 128), rows=512, samples=8,
    ),
    "gpu": Grid(
        layers=16, head_size=64, sequence_length=512, batch_size=64,
        widths=(256, 512, 768, 1152), budgets=(1e15, 2e15, 4e15, 8e15, 3.2e16, 1e17),
        optimizer="adamw", fewest_steps=250, most_epochs=5.0,
        rates=(2e-3, 4e-3, 8e-3), rates_width=256, rates_budget=2e15,
        epochs_width=256, epochs_rows=2048, epochs=(1, 4, 16, 64), rows=512, samples=16,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a grid."""

    experiment: str
    kind: str
    width: int
    budget: float  # FLOPs; 0 for the experiment epochs
    steps: int
    unique_rows: int  # the rows of its text
    optimizer: str
    learning_rate: float  # the peak
    seed: int


def peak(optimizer: str, rate: float, width: int) -> float:
    """Returns the peak learning rate of a width for a rate of the grid.

    AdamW's is the rate at width 128, and falls with the width. Muon's updates have their size by themselves; its peak
    is 15 times the rate at any width.
    """
    return 15 * rate if optimizer == "muon" else rate * 128 / width


def config_of(grid: Grid, run: Run, data: str = "") -> Config:
    """Returns the settings of a run on the prepared set `data`."""
    config = Config(seed=run.seed, steps=run.steps, batch_size=grid.batch_size, sequence_length=grid.sequence_length)
    model, optimizer = config.model, config.optimizer
    model.layers, model.width = grid.layers, run.width
    model.heads = model.kv_heads = run.width // grid.head_size
    model.feed_forward = 64 * round(run.width / 24)  # 8 / 3 of the width
    model.vocab_size = grid.vocabulary
    model.tied_embeddings, model.rope_theta = True, 10_000.0
    config.compute.unroll, config.compute.remat = 0, "none"
    config.compute.loss_chunk = min(grid.tokens // 4, 8192)
    optimizer.peak_learning_rate = run.learning_rate
    optimizer.schedule = ((0.0, 0.0), (0.05, 1.0), (1.0, 0.0))
    for name, value in OPTIMIZERS[run.optimizer].items():
        setattr(optimizer, name, value)
    config.diffusion.random_length_every = 0  # or a step would have fewer tokens
    config.data.path = data
    config.checkpoint.every, config.checkpoint.keep = 1000, 1
    config.logging.every, config.logging.tensorboard = max(1, run.steps // 10), False
    config.validation.rows = 0  # `nats` is called at the end
    config.sampling.prompts = ()
    for name, value in KINDS[run.kind].items():
        section, _, leaf = name.rpartition(".")
        setattr(getattr(config, section), leaf, value)
    return config


def flops_per_step(grid: Grid, kind: str, width: int) -> float:
    """Returns the FLOPs of a training step."""
    config = config_of(grid, Run(COMPUTE, kind, width, 0.0, 1, 0, "adamw", 1e-3, 0))
    return grid.tokens * flops_per_token(config.model, grid.sequence_length, masked_share(config.diffusion))


def runs_of(
    grid: Grid,
    rows: int,
    kinds: list[str],
    experiments: list[str],
    rates: dict[str, float],
    seeds: int = 1,
) -> list[Run]:
    """Returns the runs of a grid, the cheapest first.

    Args:
      grid: The grid.
      rows: The number of rows of the text.
      kinds: Names in KINDS.
      experiments: Some of RATES, COMPUTE and EPOCHS.
      rates: The rate of each kind, one of the grid's, for COMPUTE and EPOCHS.
      seeds: The number of runs that differ in the seed only; RATES has one.
    """
    cells = [(RATES, grid.rates_width, grid.rates_budget)] if RATES in experiments else []
    cells += [(COMPUTE, width, budget) for width in grid.widths for budget in grid.budgets if COMPUTE in experiments]
    runs = []
    for kind in kinds:
        for experiment, width, budget in cells:
            steps = round(budget / flops_per_step(grid, kind, width))
            if grid.fewest_steps <= steps <= grid.most_epochs * rows / grid.batch_size:
                for rate in grid.rates if experiment == RATES else [rates[kind]]:
                    for seed in range(1 if experiment == RATES else seeds):
                        how = grid.optimizer, peak(grid.optimizer, rate, width), seed
                        runs.append(Run(experiment, kind, width, budget, steps, rows, *how))
        for epochs in grid.epochs if EPOCHS in experiments else ():
            steps, width = epochs * grid.epochs_rows // grid.batch_size, grid.epochs_width
            for seed in range(seeds):
                how = grid.optimizer, peak(grid.optimizer, rates[kind], width), seed
                runs.append(Run(EPOCHS, kind, width, 0.0, steps, grid.epochs_rows, *how))
    return sorted(runs, key=lambda run: run.steps * flops_per_step(grid, run.kind, run.width))


def best_rates(grid: Grid, lines: list[dict], kinds: list[str]) -> dict[str, float]:
    """Returns the rate of the grid with which each kind did best in RATES, or else the middle one."""
    peaks = {peak(grid.optimizer, rate, grid.rates_width): rate for rate in grid.rates}
    best = {}
    for kind in kinds:
        tried = {
            peaks[line["learning_rate"]]: line["nats_per_token"]
            for line in lines
            if (line["experiment"], line["kind"]) == (RATES, kind) and line["learning_rate"] in peaks
        }
        best[kind] = min(tried, key=tried.get) if tried else statistics.median_low(grid.rates)
    return best


def about(grid: Grid, run: Run) -> dict[str, object]:
    """Returns what a line says of a run before it has begun."""
    config = config_of(grid, run)
    tokens = run.steps * grid.tokens
    return dataclasses.asdict(run) | {
        "parameters": parameter_count(config.model),
        "flops": run.steps * flops_per_step(grid, run.kind, run.width),
        "tokens": tokens,
        "epochs": round(tokens / (run.unique_rows * grid.sequence_length), 3),
    }
