"""Small programs as the TPU compiler writes them, and a chip on which their durations can be worked out by hand.

The chip does 1e9 cycles, 1e12 FLOPs and 1e9 bytes of memory traffic per second, and receives 1e9 bytes per second over
its links. So 1,000 cycles take a microsecond, and so do 1,000 bytes.
"""

from llada_jax.devices.hardware import Chip
from llada_jax.planning import report
from llada_jax.planning.durations import Rates
from llada_jax.planning.hlo import Module
from llada_jax.planning.schedule import simulate

CHIP = Chip("test", (), 1e12, 1e9, 1e9, 1e9, 1e9, {}, 1e9, 0.5)
MICRO = 1e-6


def op(name: str, cycles: int | None = None) -> str:
    """Returns the end of an instruction's line: where it comes from, and the compiler's estimate."""
    estimate = "" if cycles is None else f', backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    return f'metadata={{op_name="jit(train_step)/{name}"}}{estimate}'


def program(entry: str, others: str = "") -> Module:
    lines = "".join(f"  {line.strip()}\n" for line in entry.strip().splitlines())
    return Module(f"HloModule m, is_scheduled=true\n\n{others}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{lines}}}\n")


def run(module: Module, turns: float = 1, devices: int = 4):
    block = simulate(module, Rates(CHIP, CHIP.kernel_share), devices, 1, turns)
    return block, report.summary(module, block)


# A loop of a microsecond per iteration. LIMIT stands for the instruction that defines the number of iterations.
LOOP = f"""
%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %t = (s32[], f32[8]{{0}}) parameter(0)
  %x = f32[8]{{0}} get-tuple-element(%t), index=1
  %y = f32[8]{{0}} add(%x, %x), {op("transpose(jvp())/while/body/closed_call/attention/add", 1000)}
  ROOT %r = (s32[], f32[8]{{0}}) tuple(%t, %y)
}}

%condition (t: (s32[], f32[8])) -> pred[] {{
  %t = (s32[], f32[8]{{0}}) parameter(0)
  LIMIT
  ROOT %c = pred[] compare(%t, %n), direction=LT
}}
"""
WHILE = "%w = (s32[], f32[8]{0}) while(%p), condition=%condition, body=%body"

# A transfer by the SparseCores. Each of 4 devices receives 3,000 of the 4,000 bytes: 3 microseconds.
SPARSE = """
%gather (p: f32[250]) -> f32[1000] {
  %p = f32[250]{0} parameter(0)
  ROOT %g = f32[1000]{0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}
"""
START = "%s = ((f32[250]{0}), f32[1000]{0}) call-start(%p), to_apply=%gather, " + op("jvp()/reshard")
