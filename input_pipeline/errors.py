"""What is the user's to mend, and what may mend itself."""


class UserError(ValueError):
  """Something the user can mend: a file, a key, a value.

  The message is one sentence that names the file or key, says what was found, and what to do. The
  command line prints it without a traceback and exits with status 2.
  """


_WRONG_PATH = (
  FileNotFoundError,
  FileExistsError,
  NotADirectoryError,
  IsADirectoryError,
  PermissionError,
)


def may_pass(error: OSError) -> bool:
  """Whether the next start may be spared it: a full disk or a failing network, no wrong path."""
  return not isinstance(error, _WRONG_PATH)
