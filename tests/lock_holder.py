"""Another process that holds a lock."""

import subprocess
import sys


def elsewhere(folder, ending="input()", **how):
    """Another process that holds the folder."""
    code = "from latentdiff.utils.locks import locked\n"
    code += f"with locked({str(folder)!r}, **{how!r}):\n print('held', flush=True)\n {ending}"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"held\n"
    return child
