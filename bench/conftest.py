"""`pytest bench` times, although plain `pytest` has pytest-benchmark switched off."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if "--benchmark-disable" not in config.invocation_params.args:
        config.option.benchmark_disable = False
    if config.option.benchmark_max_time == "1.0":  # pytest-benchmark's default: long, for so many
        config.option.benchmark_max_time = "0.3"
