"""The states that a part of the suite can be in, as gpu.json names them."""

WAITING = "waiting"
RUNNING = "running"
DONE = "done"
FAILED = "failed"
CUT = "cut"
"""It was ended, because it took far longer than its time."""
NOT_RUN = "not run"

NO_TIME = "no time left"
"""Why a part, or a contender in one, was not begun."""
