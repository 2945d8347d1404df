"""Reading the source of functions."""

import ast
import gc
import sys
import threading

import pytest
from diffusers import UNet2DConditionModel

from headscope.models.structure.source import source_tree


@pytest.fixture
def threads_switch_often():
    """Collections begin within most calls of the parser, and a collection's callback lets another thread run."""
    interval, threshold, callback = sys.getswitchinterval(), gc.get_threshold(), lambda *_: None
    sys.setswitchinterval(1e-6)
    gc.set_threshold(50)
    gc.callbacks.append(callback)
    yield
    gc.callbacks.remove(callback)
    gc.set_threshold(*threshold)
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("threads_switch_often")
def test_threads_read_at_once():
    """A model is looked at in each thread that makes a scope; CPython 3.11.7 fails here without a lock."""
    function = UNet2DConditionModel.forward
    expected, found = len(list(ast.walk(source_tree(function)))), []

    def read():
        for _ in range(30):
            try:
                found.append(len(list(ast.walk(source_tree(function)))) == expected)
            except SystemError as error:
                found.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 60


def test_a_builtin_has_none():
    assert source_tree(len).body == []
