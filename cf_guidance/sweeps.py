"The sweeps of `cf_guidance.lab.sweeps`, under the module's name of 2022."

from .lab.sweeps import (
    cf_sweep,
    cos_harness,
    create_cos_expts,
    create_expts,
    measure,
    run,
    seed_everything,
    summarise,
    sweep,
)

__all__ = [
    'cf_sweep',
    'cos_harness',
    'create_cos_expts',
    'create_expts',
    'measure',
    'run',
    'seed_everything',
    'summarise',
    'sweep',
]
