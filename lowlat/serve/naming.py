"""Errors under the names that the client knows, where its fields reach the engine under others.

Owns the rewording alone; which names a route changes is in its own file.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping

from lowlat.serve.errors import describe
from lowlat.serve.protocol.failure import RequestError
from lowlat.utils.errors import UserError


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors about a field in `names` tell of the field that it is there.

    Raises RequestError in place of RequestError and UserError about those fields.
    """
    try:
        yield
    except (RequestError, UserError) as error:
        status, message, param, code = describe(error)
        field = re.split(r"[.\[]", param or "", maxsplit=1)[0]
        if field not in names:
            raise
        new = names[field]
        # What lies inside has another place in the field that the client sent.
        text = re.sub(rf"\b{field}\b(?:[.\[][^: ]*)?", new, message)
        raise RequestError(
            text if text.startswith(new) else f"{new}: {text}", param=new, code=code, status=status
        ) from error
