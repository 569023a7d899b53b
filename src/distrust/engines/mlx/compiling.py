"""Whether steps are compiled.

On a GPU always: kernels are built in no time, and each saves a pass over memory. On a CPU only where
``--compile`` asks for it: mlx calls a C++ compiler there for every kernel, and the steps are no faster.
"""

from __future__ import annotations

import mlx.core as mx

from distrust.config import TrainConfig
from distrust.errors import ConfigError


def should_compile(config: TrainConfig, device: mx.Device) -> bool:
    """Whether to compile.

    Raises:
        ConfigError: if it is asked for, and mlx finds no compiler.
    """
    if device.type != mx.DeviceType.cpu:
        return True
    if not config.compile:
        return False
    try:
        mx.eval(mx.compile(lambda x: mx.exp(x) * x)(mx.ones(3)))
    except RuntimeError as error:
        raise ConfigError(
            f"--compile: mlx cannot compile on this CPU; leave it out ({' '.join(str(error).split())[:200]})"
        ) from error
    return True
