"""The process of one step, ``child STEP SETTING``: the last line is its figures as JSON, or an error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
import warnings

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import STEPS


def main() -> None:
    """Run the step; exits with 1 if it fails."""
    name, *arguments = sys.argv[1:]
    setting = Setting.parse(*arguments)
    (step,) = (step for step in STEPS if step.name == name)
    os.environ |= {
        "DISTRUST_CACHE": str(setting.folder / "cache"),
        "HF_HOME": str(setting.folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    warnings.simplefilter("ignore")
    print(f"== {name}", file=sys.stderr, flush=True)
    code = 0
    with contextlib.redirect_stdout(sys.stderr):
        try:
            answer = json.dumps(step.run(setting))
        except Exception as error:  # whatever it is, the other steps run
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            answer, code = f"{type(error).__name__}: {lines[-1]}"[:300], 1
    print(answer, flush=True)
    os._exit(code)  # some libraries hang at the interpreter's end


if __name__ == "__main__":
    main()
