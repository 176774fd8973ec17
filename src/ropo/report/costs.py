"""What a run will cost, in words: a sentence for the log and a table for `--dry_run`.

In: seconds by stage, bytes by kind, names of assumptions. Out: text.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

ASSUMED: Mapping[str, str] = MappingProxyType(
    {
        "few_layers": "the speed of a few layers of the model, timed now on this machine, holds for all of it",
        "no_communication": "communication between processes takes no time",
        "dequantization": "quantized weights are as fast as others; they are slower, how much was not measured",
        "suspects": "nothing is sampled, since the audit is yet to say how many pairs are filtered out; give --rho",
        "new_tokens": "sampled responses are half as long as max_new_tokens",
        "activations": "activations are those of a usual decoder, since this one does not run without data",
    }
)
"""What a forecast may have assumed, by name."""


def cost_sentence(seconds: Mapping[str, float], *, steps: int, memory_bytes: float, disk_bytes: float) -> str:
    """All of it in one sentence.

    Args:
        seconds: Of each stage.
        steps: Of the optimizer, in all stages.
        memory_bytes: Of each device.
        disk_bytes: Of the output folder.

    Examples:
        >>> cost_sentence({"reference": 60, "audit": 0}, steps=0, memory_bytes=2e9, disk_bytes=3e6)
        'If nothing of it is done yet, this run takes about 60 seconds (reference 60 seconds, audit with the reference, 0 steps), 2.0 GB on each device and 0.003 GB on disk.'
    """  # noqa: E501
    parts = ", ".join(f"{name} {_stage(value)}" for name, value in seconds.items())
    return (
        f"If nothing of it is done yet, this run takes about {duration(sum(seconds.values()))} ({parts}, "
        f"{steps:,} steps), {_gb(memory_bytes)} on each device and {_gb(disk_bytes)} on disk."
    )


def cost_table(
    seconds: Mapping[str, float], memory: Mapping[str, float], *, disk_bytes: float, layout: str, assumed: Sequence[str]
) -> str:
    """What `--dry_run` prints.

    Args:
        seconds: Of each stage.
        memory: Bytes on each device by kind; what is on the host is not of the device.
        disk_bytes: Of the output folder.
        layout: Of the forward pass.
        assumed: Names of `ASSUMED`.
    """
    device = {kind: value for kind, value in memory.items() if kind != "host"}
    rows = [
        ("time", ""),
        *((f"  {name}", _stage(value)) for name, value in seconds.items()),
        ("  all stages", duration(sum(seconds.values()))),
        ("memory of each device", ""),
        *((f"  {kind}", _gb(value)) for kind, value in device.items()),
        ("  all", _gb(sum(device.values()))),
        *([("memory of the host", _gb(memory["host"]))] if memory.get("host") else []),
        ("disk", _gb(disk_bytes)),
        ("forward", layout.replace("_", " ")),
    ]
    width = max(len(name) for name, _ in rows) + 2
    notes = [f"- {ASSUMED[name]}" for name in assumed]
    return "\n".join([f"{name:{width}}{value}".rstrip() for name, value in rows] + ["Assumed:", *notes])


def duration(seconds: float) -> str:
    """A time as people say it.

    Args:
        seconds: 0 or more.

    Examples:
        >>> duration(1), duration(200), duration(9000), duration(200_000)
        ('1 second', '3.3 minutes', '2.5 hours', '2.3 days')
    """
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {name}"
    return "1 second" if round(seconds) == 1 else f"{seconds:.0f} seconds"


def _stage(seconds: float) -> str:
    return duration(seconds) if seconds else "with the reference"


def _gb(num_bytes: float) -> str:
    """Gigabytes of 10^9 bytes, as devices and disks are sold; below one with three digits."""
    return f"{num_bytes / 1e9:.{1 if num_bytes >= 1e9 else 3}f} GB"
