"""The command line: `fastllm info | check | bench | demo`."""

from fastllm.cli.app import main as main
