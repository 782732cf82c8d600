"The sweeps of `cf_guidance.lab`, under the module's name of 2022."

from .lab.sweeps import (
    cos_harness,
    create_cos_expts,
    create_expts,
    measure,
    run,
    seed_everything,
    summarise,
)

__all__ = [
    'cos_harness',
    'create_cos_expts',
    'create_expts',
    'measure',
    'run',
    'seed_everything',
    'summarise',
]
_LATE = 'cf_sweep', 'sweep'  # they need more packages, so they are imported when asked for
__all__ += _LATE


def __getattr__(name):
    if name in _LATE:
        from .lab import commands

        return getattr(commands, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
