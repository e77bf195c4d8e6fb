"""Options and fixtures of `pytest bench/ --benchmark-only`.

A module names its CONTESTANTS and its cases(quick): name -> function that builds the race. Each
test is one contestant of one case; pytest-benchmark's table has those of a case side by side.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# The benches' own modules, and through harness.py those that they share with the tests.
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="tiny cases, two rounds: do the benches still run? (or FASTRES_BENCH_QUICK=1)",
    )


def _is_quick(config: pytest.Config) -> bool:
    return config.getoption("--quick") or os.environ.get("FASTRES_BENCH_QUICK") == "1"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "contestant"} <= set(metafunc.fixturenames):
        cases = metafunc.module.cases(_is_quick(metafunc.config))
        metafunc.parametrize("case", list(cases.values()), ids=list(cases), scope="module")
        metafunc.parametrize("contestant", metafunc.module.CONTESTANTS, scope="function")


@pytest.fixture(scope="module")
def judge(case):
    """The case's race with its exact answer, torch eager admitted as the yardstick."""
    from harness import Judge

    torch._dynamo.reset()
    judge = Judge(case())
    judge.yardstick = judge.admit(judge.race.yardstick)
    return judge


@pytest.fixture
def contest(benchmark, judge, contestant, request) -> Callable[[], None]:
    """Verify the contestant, then time it."""
    race = judge.race
    is_yardstick = contestant == race.yardstick

    def measure() -> None:
        runner = judge.yardstick if is_yardstick else judge.admit(contestant)
        benchmark.group = f"{race.suite} {race.case}"
        benchmark.extra_info.update(error=judge.errors[contestant], flops=race.flops)

        def run() -> None:
            runner.run()
            if race.device == "cuda":
                torch.cuda.synchronize()

        if _is_quick(request.config):
            benchmark.pedantic(run, rounds=2, iterations=1, warmup_rounds=1)
        else:
            run()
            benchmark(run)

    return measure
