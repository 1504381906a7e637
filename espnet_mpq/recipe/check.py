"""Checks all options of a recipe script before its first stage, and prints what follows from them.

    python3 -m espnet_mpq.recipe.check NAME=VALUE ...

With lm_exp, the options are those of mpq.sh, and the shell lines printed set options anew: folders
without slashes at their ends, the texts and the name of the run filled in.
"""

from __future__ import annotations

import logging
import shlex
import sys
from typing import Optional, Sequence

from espnet_mpq.bin.options import check_ngpu
from espnet_mpq.errors import MpqError
from espnet_mpq.recipe.lm_options import MpqOptions
from espnet_mpq.recipe.option_values import MAY_BE_EMPTY, check_values


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Check NAME=VALUE words; print shell lines, or the first fault with exit status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = dict(word.split("=", 1) for word in words)
    script, cuda_cmd = options.pop("script", "check"), options.pop("cuda_cmd", "")
    try:
        if "lm_exp" in options:
            check_values(options, MAY_BE_EMPTY - {"budget"})
            for key, value in MpqOptions(options, cuda_cmd).check().items():
                print(f"{key}={shlex.quote(value)}")
        else:
            check_values(options)
            if int(options["ngpu"]) > 0:
                check_ngpu(int(options["ngpu"]))
    except MpqError as error:
        print(f"{script}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    logging.getLogger("espnet_mpq").setLevel(logging.ERROR)  # mpq plan warns again
    main()
