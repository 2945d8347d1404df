"""Random calls through every backend; `python -m ops.fuzz` makes as many as there is time for."""

from typing import Any

import pytest
import torch
from torch import Tensor

import contract
from headscope.ops import attention, cpu_library
from ops import fuzz, fuzz_backward
from ops.backends import require_backend

# an interpreted call and its backward take half a second to three seconds, by the processor
QUICK = {"reference": 40, "portable": 40, "cpu": 60, "triton": 4}
PIECES = [("reference", 0, 1000), ("portable", 0, 1000), ("triton", 0, 100), ("triton", 100, 100)]


def _check(backend: str, first: int, calls: int) -> None:
    tally = fuzz.run(backend, range(first, first + calls))
    assert not tally.past, f"calls {tally.past}\n{tally}"


@pytest.mark.parametrize("backend", QUICK)
def test_random_calls(backend: str):
    require_backend(backend)
    _check(backend, 0, QUICK[backend])


@pytest.mark.full
@pytest.mark.parametrize(("backend", "first", "calls"), PIECES)
def test_many_random_calls(backend: str, first: int, calls: int):
    require_backend(backend)
    _check(backend, first, calls)


@pytest.mark.full
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_many_random_calls_of_every_instruction_set(instruction_set: str, monkeypatch: pytest.MonkeyPatch):
    require_backend("cpu")
    library = cpu_library.load()
    monkeypatch.setattr(library, "instruction_set", instruction_set)
    try:
        library.instruction_set_name()
    except RuntimeError as error:
        pytest.skip(str(error))
    _check("cpu", 0, 1000)


def test_the_interpreter_with_less_to_do_gives_the_same(monkeypatch: pytest.MonkeyPatch):
    require_backend("triton")
    from triton.runtime import interpreter

    if not hasattr(interpreter._patch_lang, "stock"):
        pytest.skip("the kernels aren't interpreted, or as Triton does it by itself")
    found = [_results(number) for number in range(4)]
    monkeypatch.setattr(interpreter, "_patch_lang", interpreter._patch_lang.stock)
    for number, results in enumerate(found):
        stock = _results(number)
        assert stock.keys() == results.keys()
        for name, values in results.items():
            assert torch.equal(values.nan_to_num(7.0), stock[name].nan_to_num(7.0)), (number, name)


def _results(number: int) -> dict[str, Tensor]:
    result = fuzz.draw(number, "triton").attend("triton")
    return {"output": result.output, **result.statistics}


def _steeper(query: Tensor, *others: Any, **options: Any) -> Any:
    scale = query.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]
    return attention(query, *others, **{**options, "scale": scale * (1 + 1e-4)})


def _last_key_off(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    return attention(query, torch.cat([key[:, :, :-1], 1.01 * key[:, :, -1:]], 2), value, **options)


@pytest.mark.parametrize("wrong", [_steeper, _last_key_off])
def test_what_is_wrong_is_found(wrong: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contract, "attention", wrong)
    monkeypatch.setattr(fuzz_backward, "attention", wrong)
    tally = fuzz.run("reference", range(40))
    assert {"output", "logsumexp", "entropy", "d query", "d key", "d value"} <= set(tally.past), tally


def test_a_call_depends_on_its_number_only():
    first, second = (fuzz.draw(7) for _ in range(2))
    torch.testing.assert_close(first.query, second.query, rtol=0, atol=0, equal_nan=True)
    assert first.query.shape != fuzz.draw(8).query.shape
