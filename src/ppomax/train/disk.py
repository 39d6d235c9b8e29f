"""What a run says when its disk refuses. Saving itself is in `checkpoint`."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ppomax import checkpoint
from ppomax.errors import CheckpointError

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE)
"""Full or broken, whatever was written."""
REFUSALS_HERE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT)
"""Not to be written, or gone: the run's disk where the file is the run's, else another's fault."""


@contextmanager
def refusals_told(run: Path) -> Iterator[None]:
    """Inside, a refusal of the disk becomes one line: what happened, what is safe, how to go on.

    Raises:
        CheckpointError: that line.
    """
    try:
        yield
    except Exception as error:
        if not _is_refusal(error, run):
            raise
        last = checkpoint.latest(run / "checkpoints")
        safe = f"the last good checkpoint is {last.path.name}" if last else "nothing is damaged"
        raise CheckpointError(
            f"{run}: cannot be written ({error}); {safe}. Once it can be, go on with "
            f"`ppomax resume {run}`"
        ) from error


def _is_refusal(error: Exception, run: Path) -> bool:
    if isinstance(error, OSError):
        name = error.filename
        inside = isinstance(name, str | Path) and run.absolute() in Path(name).absolute().parents
        return error.errno in REFUSALS or (inside and error.errno in REFUSALS_HERE)
    if type(error) not in (SafetensorError, Exception):
        return False
    # safetensors and tokenizers write through Rust, which keeps the number and drops the type
    number = re.search(r"\(os error (\d+)\)", str(error))
    return number is not None and int(number[1]) in (*REFUSALS, *REFUSALS_HERE)
