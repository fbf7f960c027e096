"""A kernel's config, chosen by measurement: Triton block sizes, CPU block sizes, one mechanism.

    TILES = Tunable(
        "linear.triton", "matmul",
        configs=lambda m, n, k, dtype: CONFIGS,
        default=lambda m, n, k, dtype: default_config(m, n, k),
        build=lambda device, m, n, k, dtype: (torch.randn(m, k, ...), torch.randn(n, k, ...)),
        run=lambda config, x, w: kernels.linear_fwd(x, w, config=config),
    )
    ...
    kernels.linear_fwd(x, w, config=TILES(x.device, m, n, k, x.dtype))

A config is a flat dict of JSON's own types. Sizes are ints, dtypes, strings, bools or None. What
is measured runs on arguments that `build` made, copied for each round: a run may write to them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastllm.core.tuner import table
from fastllm.core.tuner.routes import words

Config = dict[str, Any]
Sizes = tuple[Any, ...]
TUNABLES: dict[str, "Tunable"] = {}

_MOST = 4096
_threads = torch.get_num_threads
_deterministic = torch._C._get_deterministic_algorithms


class Tunable:
    """One choice among configs, as the module says.

    configs   configs(*sizes): all that may win; the default need not be among them
    default   default(*sizes): the heuristic, which runs where nothing was measured
    build     build(device, *sizes): the arguments of a run
    run       run(config, *arguments)
    samples   sizes worth tuning when nobody says which
    fits      fits(config, device, *sizes): False for a config that cannot run or cannot win
    kind      the only type of device that it is about: "cpu" or "cuda"; None: every one
    """

    def __init__(
        self,
        name: str,
        family: str,
        *,
        configs: Callable[..., Sequence[Config]],
        default: Callable[..., Config],
        build: Callable[..., tuple],
        run: Callable[..., Any],
        samples: Sequence[Sizes] = (),
        fits: Callable[..., bool] | None = None,
        kind: str | None = None,
    ) -> None:
        if name in TUNABLES:
            raise ValueError(f"name: a tunable {name!r} exists already")
        self.name, self.family = name, family
        self.configs, self.default, self.build, self.run = configs, default, build, run
        self.samples, self.fits, self.kind = tuple(samples), fits, kind
        self.seen: set[tuple[str, Sizes]] | None = None  # calls that are being recorded
        self._known: dict[tuple, Config] = {}
        TUNABLES[name] = self
        table.listen(self._known.clear)

    def __call__(self, device: torch.device, *sizes: Any) -> Config:
        """The config for these sizes: measured, or the heuristic's. Never measures."""
        key = (device, _threads(), _deterministic(), sizes)
        found = self._known.get(key)
        if found is None or self.seen is not None:
            return self._look(key, device, sizes)
        return found

    def _look(self, key: tuple, device: torch.device, sizes: Sizes) -> Config:
        name = table.device_name(device) if device.type in ("cpu", "cuda") else None
        if name is not None and self.seen is not None:
            self.seen.add((name, sizes))
        value = (
            None
            if name is None
            else table.lookup(name, self.name, self.family, self.word(name, sizes))
        )
        if value is None and name is not None and table.MODE == "on" and self.seen is None:
            from fastllm.core.tuner import jobs  # it imports this module

            change = jobs.measure_config(self, name, sizes)
            value = None if change is None else change.after
        default = self.default(*sizes)
        if not isinstance(value, dict) or value.keys() != default.keys():
            value = default
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[key] = value
        return value

    def word(self, device: str, sizes: Sizes) -> str:
        """The key in the table."""
        word = " ".join(words(s) if not isinstance(s, torch.dtype) else _dtype(s) for s in sizes)
        return f"{word} t{_threads()}" if device == "cpu" else word

    def candidates(self, device: str, sizes: Sizes) -> dict[str, Config]:
        """The configs worth measuring by a name, the default first."""
        default = self.default(*sizes)
        found = {label(default): default}
        for config in self.configs(*sizes):
            if self.fits is None or self.fits(config, device, *sizes):
                found.setdefault(label(config), config)
        return found


def label(config: Config) -> str:
    """A config in a line."""
    return " ".join(f"{name}={value}" for name, value in config.items())


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
