"""Some hundreds of inputs that were made to hurt; `make fuzz` runs ten thousand."""

import os
import shutil
import signal
from collections import Counter

import pytest

from tests.fuzzing import attack

CASES = int(os.environ.get("FUZZ_CASES", "300"))
FIRST = int(os.environ.get("FUZZ_FIRST", "0"))
SECONDS = 30  # a case takes some milliseconds


@pytest.mark.filterwarnings("ignore")
def test_hostile_inputs_are_merged_rightly_or_refused_in_words(tmp_path):
    def hangs(number, frame):
        raise TimeoutError(f"seed {seed} took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, hangs)
    verdicts, faults = Counter(), []
    try:
        for seed in range(FIRST, FIRST + CASES):
            folder = tmp_path / str(seed)
            folder.mkdir()
            signal.alarm(SECONDS)
            try:
                verdicts[attack(seed, folder)] += 1
            except Exception as fault:  # all of them are shown together
                faults.append(f"seed {seed}: {type(fault).__name__}: {fault}")
            signal.alarm(0)
            shutil.rmtree(folder)
    finally:
        signal.signal(signal.SIGALRM, before)
    print(dict(verdicts), len(faults), "faults")
    assert not faults, "\n".join(faults[:20])
    assert verdicts["right"] > CASES / 8, "the cases hurt too much to show that good input passes"
    assert verdicts["refused"] > CASES / 4
