"Optional packages: an import that fails says which extra of cf_guidance to install."

from contextlib import contextmanager

_PACKAGES = {
    'diffusers': {'diffusers', 'transformers', 'accelerate', 'PIL', 'tqdm'},
    'sde': {'torchsde'},
    'lab': {
        *('diffusers', 'transformers', 'accelerate', 'torchsde', 'PIL', 'tqdm'),
        *('matplotlib', 'pandas', 'pyarrow', 'IPython', 'ipywidgets'),
    },
}


@contextmanager
def needs(
    extra: str,  # 'diffusers', 'sde' or 'lab'
    who: str,  # what needs it, for the message: the name of a module or of a function
):
    "Around imports: if a package of `extra` is missing, raise an `ImportError` that names both."
    try:
        yield
    except ModuleNotFoundError as e:
        package = (e.name or '').partition('.')[0]
        if package not in _PACKAGES[extra]:
            raise
        message = f'{who} needs {package}: pip install "cf_guidance[{extra}]"'
        raise ImportError(message, name=package) from None
