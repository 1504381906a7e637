"""What lm_conf.nas may say, and how wrong values are answered."""

from __future__ import annotations

import pytest

from espnet_mpq.errors import InputError
from espnet_mpq.search.nas_options import NasOptions


def test_json_form_without_defaults_and_back():
    options = NasOptions(budget=2.5, bits=(2, 8), lr=0.1)
    assert options.to_dict() == {"budget": 2.5, "bits": [2, 8], "lr": 0.1}
    assert NasOptions.from_dict(options.to_dict()) == options


@pytest.mark.parametrize("bits", [[[1], 2], [1, "2"], "12", 4, [1, True], None])
def test_candidates_that_are_no_list_of_numbers_are_refused(bits):
    with pytest.raises(InputError) as caught:
        NasOptions.from_dict({"budget": 2.0, "bits": bits})
    assert str(caught.value) == f"nas.bits: found {bits!r}; expected a list such as [1, 2, 4]"
