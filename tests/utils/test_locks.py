"""A folder belongs to one job at a time: who is refused, how, and that nothing is left of a lock."""

import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest
from lock_holder import elsewhere

from latentdiff.errors import ReportedElsewhere, UserError
from latentdiff.utils import locks, processes


def refusal(folder, **how) -> str:
    with pytest.raises(UserError) as error, locks.locked(folder, **how):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("beside", [False, True])
def test_another_process_is_named_and_the_lock_goes_with_it(tmp_path, beside):
    folder = tmp_path / "a" / "run"
    child = elsewhere(folder, beside=beside)
    said = refusal(folder, beside=beside)
    assert said.startswith(f"{folder}: is in use by another run (process {child.pid} on ") and "output=" in said
    assert "wait for tea" in refusal(folder, beside=beside, advice="wait for tea")
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1  # the file stays, the lock does not
    with locks.locked(folder, beside=beside):
        (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert locks.is_lock(file) and locks.contents(folder) == []
        assert file.read_text().startswith(f"process {os.getpid()} on ")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_that_the_lock_made_and_nobody_used_goes_again(tmp_path):
    with locks.locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with locks.locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]


def test_the_same_thread_may_hold_a_folder_twice_and_another_may_not(tmp_path):
    said = []
    with locks.locked(tmp_path):
        with locks.locked(tmp_path), locks.locked(tmp_path, shared=True):
            pass
        thread = threading.Thread(target=lambda: said.append(refusal(tmp_path)))
        thread.start()
        thread.join()
        assert f"process {os.getpid()} on" in said[0]
        child = subprocess.run(
            [sys.executable, "-c", f"from latentdiff.utils.locks import locked\nwith locked({str(tmp_path)!r}): pass"],
            capture_output=True,
            text=True,
        )
        assert "is in use by another run" in child.stderr  # leaving the inner blocks did not give the lock back
    with locks.locked(tmp_path):
        pass


def test_a_forked_child_does_not_keep_what_its_killed_parent_held(tmp_path):
    parent = elsewhere(tmp_path, "import os; os.fork(); input()")
    parent.kill()
    parent.wait()
    with locks.locked(tmp_path):  # the child is still there: it waits for its input
        pass
    parent.stdin.close()
    parent.stdout.close()


def test_a_forked_child_that_leaves_the_block_leaves_the_lock(tmp_path):
    with locks.locked(tmp_path):
        child = os.fork()
        if child == 0:
            with locks.locked(tmp_path / "b"):
                pass
            for lock in list(locks._held.values()):
                lock.give_back()
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / locks.NAME).exists()
        code = f"from latentdiff.utils.locks import locked\nwith locked({str(tmp_path)!r}): pass"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 1


def test_shared_holders_share_and_an_exclusive_one_waits_for_the_last(tmp_path):
    first, second = elsewhere(tmp_path, shared=True), elsewhere(tmp_path, shared=True)
    assert "in use" in refusal(tmp_path)
    first.communicate(b"\n")
    assert first.returncode == 0 and (tmp_path / locks.NAME).exists() and "in use" in refusal(tmp_path)
    with locks.locked(tmp_path, shared=True):
        pass
    second.communicate(b"\n")
    assert list(tmp_path.iterdir()) == []
    with locks.locked(tmp_path):
        assert "in use" not in "".join(path.name for path in locks.contents(tmp_path))


def test_without_locks_of_the_file_system_the_job_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    def fail(handle, how):
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", fail)
    for _ in range(2):
        with locks.locked(tmp_path / "run"):
            pass
    assert capsys.readouterr().err.count("this file system has no locks") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file' / 'run'}: cannot be written to" in refusal(tmp_path / "file" / "run")


def test_the_other_processes_of_a_launch_learn_the_outcome_and_take_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "rank", lambda: 1)
    monkeypatch.setattr(processes, "agree", lambda value: False)
    with pytest.raises(ReportedElsewhere), locks.locked(tmp_path):
        pass
    monkeypatch.setattr(processes, "agree", lambda value: True)
    with locks.locked(tmp_path):
        assert list(tmp_path.iterdir()) == []
