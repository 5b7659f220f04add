"""A file of somebody's in which calls are counted, that another file imports."""

import contextvars
import threading

STEP = 0
NUMBERS = [0]
LOCAL = threading.local()
VARIABLE = contextvars.ContextVar("steps", default=0)


class State:
    n = 0

    def step(self):
        self.n += 1
        return self.n


STATE = State()


def step():
    global STEP
    STEP += 1
    return STEP


def step_of_list():
    NUMBERS[0] += 1
    return NUMBERS[0]


def step_of_thread():
    LOCAL.n = getattr(LOCAL, "n", 0) + 1
    return LOCAL.n


def step_of_task():
    VARIABLE.set(VARIABLE.get() + 1)
    return VARIABLE.get()


def step_of_state():
    return STATE.step()
