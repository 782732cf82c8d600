"One check of errors for several test files: one short sentence that names the argument."

import pytest

KINDS = (ValueError, TypeError, OSError, FloatingPointError)


def check(call, argument, most=160):
    "An error from our own code, in one sentence that begins with (or names) the argument."
    with pytest.raises(KINDS) as caught:
        call()
    text = str(caught.value)
    assert argument in text
    assert '\n' not in text
    assert len(text) < most + 60 * text.count('/')  # paths may be long
    assert 'allowed are' not in text
    assert '/cf_guidance/' in str(caught.traceback[-1].path)
