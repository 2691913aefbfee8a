"""What a fit measures of the machine: its name and instructions, and the time of a step that is warm."""

import time

from latentdiff.fitting import machine


def slow_at_first(first, then):
    """A trial whose first step takes `first` seconds, and each later one `then` of its precision. It records the calls."""
    calls = []

    def trial(alone):
        def step(precision, batch):
            time.sleep(first if not calls else then[precision])
            calls.append((precision, batch))

        return step

    return trial, calls


def test_the_first_step_tells_nothing_and_the_faster_precision_is_taken():
    trial, _ = slow_at_first(0.2, {"float32": 0.03, "bfloat16": 0.01})
    timing = machine.time_steps(trial, "cpu", 32, patience=1.0)
    assert timing.precision == "bfloat16" and 0.01 <= timing.seconds < 0.1


def test_a_slow_machine_is_timed_on_few_samples():
    trial, calls = slow_at_first(0.1, {"float32": 0.1, "bfloat16": 0.1})
    timing = machine.time_steps(trial, "cpu", 32, patience=0.2)
    assert timing.precision == "float32" and 0.4 <= timing.seconds < 1.5
    assert len(calls) <= 5 and all(batch == 8 for _, batch in calls)


def test_what_does_not_fit_in_memory_has_no_time():
    def trial(alone):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    assert machine.time_steps(trial, "cpu", 8) is None


def test_the_processor_is_named_with_its_instructions(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("model name\t: A Processor\nflags\t\t: sse avx512_bf16\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    here = machine.measure()
    assert here.cores >= 1 and here.memory > 2**28
    if not here.gpu:
        assert here.name == "A Processor" and here.bfloat16 and "with bfloat16" in here.line()


def test_a_busy_machine_says_so():
    common = {"device": "cpu", "name": "A", "cores": 2, "threads": 2, "memory": 2**30, "bfloat16": False}
    assert "busy" in machine.Machine(**common, load=3.0).line() and "busy" not in machine.Machine(**common, load=0.9).line()
