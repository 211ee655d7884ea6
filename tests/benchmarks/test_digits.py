# SPDX-License-Identifier: Apache-2.0
"""Digits: what is compared with what, and how it is shown."""

from benchmarks.training import digits, tables


def test_matrices_of_both_methods_take_the_same_rates() -> None:
    for rate in digits.RATES:
        adamw, galore = (digits.run_of(name, rate) for name in ("adamw", "galore"))
        assert adamw.learning_rate == rate
        assert galore.learning_rate / 4 == rate  # scale and full_size_rate are 0.25
        assert (adamw.seed, adamw.epochs) == (galore.seed, galore.epochs)


def test_the_table_has_what_was_run_by_rate() -> None:
    run = {"loss": [0.5, 0.25], "accuracy": [0.9, 0.95], "state_bytes": 1234}
    found = {
        "runs": {
            "b": run | {"method": "galore", "rate": 4e-3},
            "c": run | {"method": "adamw", "rate": 2e-3},
            "a": run | {"method": "adamw", "rate": 1e-3},
        }
    }
    assert tables.digits(found).splitlines()[2:] == [
        "| AdamW | 0.001 | 0.2500 | 95.00% | 1,234 bytes |",
        "| AdamW | 0.002 | 0.2500 | 95.00% | 1,234 bytes |",
        "| GaLore | 0.004 | 0.2500 | 95.00% | 1,234 bytes |",
    ]
