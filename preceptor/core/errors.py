"""Errors for the person who meets them: one line with what, where and how to mend it."""


class UserError(ValueError):
    """The request was wrong: a recipe, a file, a key, a setting. The command ends with exit code 2."""


class WorkError(RuntimeError):
    """The request was right and the work failed: a dead endpoint, a full disk. Exit code 1."""
