"""The one exception whose text is meant for the user."""


class UserError(ValueError):
  """Something the user can mend: a file, a key, a value.

  The message is one sentence that names the file or key, says what was found, and what to do. The
  command line prints it without a traceback and exits with status 2.
  """
