"Optional packages: an import that fails says which extra of cf_guidance to install."

from contextlib import contextmanager

_PACKAGES = {
    'diffusers': {'diffusers', 'transformers', 'accelerate', 'PIL', 'tqdm'},
    'sde': {'torchsde'},
    'lab': {
        *('diffusers', 'transformers', 'accelerate', 'torchsde', 'PIL', 'tqdm'),
        *('matplotlib', 'pandas', 'pyarrow', 'IPython', 'ipywidgets', 'anywidget', 'traitlets'),
        *('onnx', 'onnxruntime', 'optuna', 'scipy'),
    },
    'ray': {'ray'},
}


@contextmanager
def needs(
    extra: str,  # 'diffusers', 'sde', 'lab' or 'ray'
    who: str,  # what needs it, for the message: the name of a module or of a function
):
    "Around imports: if a package of `extra` is missing, raise an `ImportError` that names both."
    try:
        yield
    except ImportError as e:
        package = (e.name or '').partition('.')[0]
        missing = isinstance(e, ModuleNotFoundError) or hasattr(e, 'extra')
        if not missing or package not in _PACKAGES[extra]:
            raise
        message = f'{who} needs {package}: pip install "cf_guidance[{extra}]"'
        error = ImportError(message, name=package)
        error.extra = extra  # an outer `needs` knows it by this, and names its own extra instead
        raise error from None
