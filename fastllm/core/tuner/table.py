"""The table of one device, in layers, and what is learned.

    lookup("cpu", "layer_norm.forward", "norm", key) -> "torch", or None: the caller's heuristic

`name` says what is chosen, `family` whose kernels it depends on, `key` for which call.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastllm.core.tuner import facts, store
from fastllm.core.tuner.store import Entries, Entry

MODES = ("off", "cached", "on")


def mode_of(text: str | None) -> str:
    """FASTLLM_TUNE as a mode; ValueError when it is none."""
    mode = (text or "cached").lower()
    if mode not in MODES:
        raise ValueError(f"FASTLLM_TUNE: expected one of {', '.join(MODES)}, found {text!r}")
    return mode


MODE = mode_of(os.environ.get("FASTLLM_TUNE"))  # off: no table; on: an unknown call is measured


@dataclass
class Layers:
    """Entries of one device: measured by this process, kept by the user, shipped."""

    shipped: Entries
    user: Entries
    process: Entries = field(default_factory=dict)

    def find(self, name: str, family: str, key: str, kind: str) -> tuple[Entry, str] | None:
        """The first valid entry and the layer it is in."""
        given = torch.are_deterministic_algorithms_enabled()
        layers = ("shipped",) if given else ("process", "user", "shipped")
        for layer in layers:
            entry = getattr(self, layer).get(name, {}).get(key)
            if entry is not None and entry.get("source") == facts.source_hash(family, kind):
                return entry, layer
        return None

    def names(self) -> set[str]:
        """All that any layer has entries for."""
        return {*self.shipped, *self.user, *self.process}


_lock = threading.Lock()
_devices: dict[str, Layers] = {}
_listeners: list[Callable[[], None]] = []


def device_name(device: torch.device | str) -> str:
    """cpu, cuda:0: a device as the tables know it, with its index."""
    device = torch.device(device)
    if device.type == "cpu" or device.index is not None:
        return "cpu" if device.type == "cpu" else str(device)
    return f"{device.type}:{torch.cuda.current_device() if device.type == 'cuda' else 0}"


def layers(device: str) -> Layers:
    """The table of a device, read from the disk when it is first asked for."""
    found = _devices.get(device)
    if found is None:
        with _lock:
            found = _devices.get(device)
            if found is None:
                found = _devices[device] = _load(device)
    return found


def _load(device: str) -> Layers:
    known = facts.facts(device)
    shipped = store.read(shipped_path(device), known, mine=False)
    return Layers(shipped, store.read(user_path(device), known))


def shipped_path(device: str) -> Any:
    """The table that the package has for this device and these versions, if it has one."""
    return facts.shipped_folder() / facts.file_name(device)


def user_path(device: str) -> Any:
    """The user's table for this device and these versions."""
    return facts.cache_folder() / facts.file_name(device)


def lookup(device: str, name: str, family: str, key: str) -> Any:
    """The value that was chosen by measurement, or None."""
    if MODE == "off":
        return None
    found = layers(device).find(name, family, key, torch.device(device).type)
    return None if found is None else found[0]["value"]


def learn(device: str, entries: Entries, keep: bool = True) -> None:
    """Takes new entries: into this process at once, and into the user's file if asked."""
    table = layers(device)
    for name, found in entries.items():
        table.process.setdefault(name, {}).update(found)
    announce()
    if keep and entries:
        store.merge(user_path(device), facts.facts(device), entries)


def adopt(device: str, user: Entries, process: Entries) -> None:
    """Takes another rank's table for this device's, in this process only."""
    table = layers(device)
    table.user, table.process = user, process
    announce()


def entry(family: str, device: str, value: Any, seconds: dict[str, float]) -> Entry:
    """A new entry, for the kernels as they are."""
    kind = torch.device(device).type
    rounded = {name: float(f"{s:.3g}") for name, s in seconds.items()}
    return {"value": value, "source": facts.source_hash(family, kind), "seconds": rounded}


def listen(listener: Callable[[], None]) -> None:
    """Calls `listener` whenever the table has changed."""
    _listeners.append(listener)


def announce() -> None:
    """Tells everyone who has remembered an answer to ask again."""
    for listener in _listeners:
        listener()


def forget() -> None:
    """Drops what this process knows; the files are read again when next asked."""
    with _lock:
        _devices.clear()
    announce()


def loaded() -> dict[str, Layers]:
    """The devices whose tables were asked for so far."""
    return dict(_devices)
