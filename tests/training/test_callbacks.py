"""What Ctrl-C says and does."""

import os
import signal

import pytest

from tokenward.training.callbacks import StopOnInterrupt


def test_the_first_interrupt_is_answered_at_once_and_the_second_stops(capfd):
    with StopOnInterrupt().listening() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.interrupted
        assert "stopping after this step" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""
