"""What is the user's to mend, and what may mend itself."""

import errno


class UserError(ValueError):
  """Something the user can mend: a file, a key, a value.

  The message is one sentence that names the file or key, says what was found, and what to do. The
  command line prints it without a traceback and exits with status 2.
  """


# How TensorStore's errors begin, all of which are ValueErrors, when a bucket is out of reach, or a
# disk has failed: most numbers of the system's are UNKNOWN to it.
PASSING_CODES = (
  'UNAVAILABLE', 'DEADLINE_EXCEEDED', 'RESOURCE_EXHAUSTED', 'ABORTED', 'UNAUTHENTICATED', 'UNKNOWN',
  'INTERNAL',
)  # fmt: skip

_WRONG_PATH = (
  FileNotFoundError,
  FileExistsError,
  NotADirectoryError,
  IsADirectoryError,
  PermissionError,
)
_WRONG_NAME = (errno.ELOOP, errno.ENAMETOOLONG)


def may_pass(error: OSError) -> bool:
  """Whether the next start may be spared it: a full disk or a failing network, no wrong path."""
  if isinstance(error, _WRONG_PATH) or is_refused(error):
    return False
  return error.errno not in _WRONG_NAME


def is_refused(error: OSError) -> bool:
  """Whether an account lacks a permission, of which gcsfs tells in words alone."""
  in_words = error.errno is None and str(error).startswith('Forbidden')
  return isinstance(error, PermissionError) or in_words


def of_disk(error: Exception) -> bool:
  """Whether a file could not be read for the sake of a disk that fails, so may be as good as ever.

  Such an error goes through the readers as it is. Libraries raise OSError for a damaged file too,
  but without a number of the system's.
  """
  return isinstance(error, OSError) and error.errno is not None and may_pass(error)
